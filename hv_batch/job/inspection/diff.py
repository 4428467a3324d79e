"""Compares two runs sample by sample, from storage alone.

Samples are matched by key. The samples of sealed shards are read from their tables (one object each), those of open
shards from their records. Both runs are read shard by shard at the same time. If they have the same layout, one shard
of each is held in memory (P7); otherwise rows are held until the matching rows of the other run are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.seal import describe_row, read_rows
from hv_batch.job.inspection.identity_counts import name_paths
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.records.choices import read_choices
from hv_batch.job.records.commits import find_shards, read_commit, scan_shard
from hv_batch.job.records.identity_differences import differences, find_differences
from hv_batch.job.records.run_document import plan_size, read_run
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

MAX_LINES = 20  # samples listed in the text for each category

# The columns with the sample's parameters. The other columns hold its position in the manifest and its results.
PARAMETER_COLUMNS = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "seed",
    "guidance_scale",
    "cfg_scale",
    "guidance_rescale",
    "flow_shift",
    "lora",  # absent from tables of version 1, whose videos have none
)

Row = Mapping[str, Any] | None  # a row of the metadata table, _WITHDRAWN, or None for a quarantined sample
_WITHDRAWN: Row = {}


@dataclass(slots=True)
class Comparison:
    """The result of a comparison. Lists hold sample keys in the order of the comparison; equal samples are counted."""

    a: str
    b: str
    identity: list[str] = field(default_factory=list)  # differences between the two identities, as lines
    equal_bytes: int = 0
    quarantined_in_both: int = 0
    other_bytes: list[str] = field(default_factory=list)  # equal frames: another encoder, or other encoder settings
    other_frames: list[str] = field(default_factory=list)  # equal parameters
    other_parameters: dict[str, list[str]] = field(default_factory=dict)  # key -> the columns that differ
    only_in_a: list[str] = field(default_factory=list)  # no record in the other run
    only_in_b: list[str] = field(default_factory=list)
    quarantined_in_a: list[str] = field(default_factory=list)  # committed in the other run
    quarantined_in_b: list[str] = field(default_factory=list)

    withdrawn_in_both: int = 0
    withdrawn_in_a: list[str] = field(default_factory=list)  # not in the other run
    withdrawn_in_b: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Whether every sample has the same bytes in both runs. The identities of the runs may differ."""
        return not any(samples for _, samples in self._categories())

    def _categories(self) -> list[tuple[str, list[str]]]:
        parameters = [f"{key} ({', '.join(columns)})" for key, columns in self.other_parameters.items()]
        return [
            ("only in A", self.only_in_a),
            ("only in B", self.only_in_b),
            ("quarantined in A only", self.quarantined_in_a),
            ("quarantined in B only", self.quarantined_in_b),
            ("withdrawn in A only", self.withdrawn_in_a),
            ("withdrawn in B only", self.withdrawn_in_b),
            ("with different parameters", parameters),
            ("with equal parameters and different frames", self.other_frames),
            ("with equal frames and different bytes", self.other_bytes),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values. Fields about withdrawn samples are absent if they are empty."""
        values = {name: getattr(self, name) for name in self.__slots__}
        kept = {name: value for name, value in values.items() if value or not name.startswith("withdrawn")}
        return kept | {"equal": self.is_equal}

    def render(self) -> str:
        lines = [f"A: {self.a}", f"B: {self.b}"]
        lines += ["the runs differ in (A -> B):", *(f"  {line}" for line in self.identity)] if self.identity else []
        lines.append(f"{self.equal_bytes:,} samples with equal bytes, {self.quarantined_in_both:,} quarantined in both")
        if self.withdrawn_in_both:
            lines.append(f"{self.withdrawn_in_both:,} withdrawn in both")
        for title, samples in self._categories():
            if samples:
                more = f" and {len(samples) - MAX_LINES:,} more" if len(samples) > MAX_LINES else ""
                lines.append(f"{len(samples):,} {title}: {', '.join(samples[:MAX_LINES])}{more}")
        return "\n".join(lines)


def compare(a: Store, b: Store) -> Comparison:
    """Compare the runs in two output roots. Raises UserError if one of them has no run."""
    run_a, run_b = read_run(a), read_run(b)
    result = Comparison(a.url, b.url, find_differences(run_a, run_b))
    result.identity += differences(dict(read_choices(a)), dict(read_choices(b)), "choices")
    result.identity += [*_changes("A", run_a), *_changes("B", run_b)]
    unmatched_a: dict[str, Row] = {}
    unmatched_b: dict[str, Row] = {}
    shards_a, shards_b = _Shards(a, run_a), _Shards(b, run_b)
    for shard in sorted({*shards_a.numbers, *shards_b.numbers}):
        rows_a, rows_b = shards_a.rows(shard), shards_b.rows(shard)
        unmatched_a |= rows_a
        unmatched_b |= rows_b
        for key in dict.fromkeys((*rows_a, *rows_b)):
            if key in unmatched_a and key in unmatched_b:
                _compare_sample(result, key, unmatched_a.pop(key), unmatched_b.pop(key))
    for unmatched, only, withdrawn in (
        (unmatched_a, result.only_in_a, result.withdrawn_in_a),
        (unmatched_b, result.only_in_b, result.withdrawn_in_b),
    ):
        for key, row in unmatched.items():
            (withdrawn if row is _WITHDRAWN else only).append(key)
    return result


def _changes(name: str, run: Mapping[str, Any]) -> Iterator[str]:
    """A line for each change with which a run continued: its samples do not all have the identity of run.json."""
    for each in run.get("earlier", ()):
        yield f"({name} continued at {each['replaced_at']} with other values of {name_paths(each['changed'])})"


def _compare_sample(result: Comparison, key: str, in_a: Row, in_b: Row) -> None:
    if in_a is _WITHDRAWN and in_b is _WITHDRAWN:
        result.withdrawn_in_both += 1
    elif in_a is _WITHDRAWN:
        result.withdrawn_in_a.append(key)
    elif in_b is _WITHDRAWN:
        result.withdrawn_in_b.append(key)
    elif in_a is None and in_b is None:
        result.quarantined_in_both += 1
    elif in_a is None:
        result.quarantined_in_a.append(key)
    elif in_b is None:
        result.quarantined_in_b.append(key)
    elif changed := [column for column in PARAMETER_COLUMNS if in_a.get(column) != in_b.get(column)]:
        result.other_parameters[key] = changed
    elif in_a["sha256"] == in_b["sha256"]:
        result.equal_bytes += 1
    elif in_a["frames_sha256"] == in_b["frames_sha256"]:
        result.other_bytes.append(key)
    else:
        result.other_frames.append(key)


class _Shards:
    """The shards of a run of which the root holds a record."""

    def __init__(self, store: Store, run: Mapping[str, Any]) -> None:
        self._store = store
        self._planned = PlannedKeys(store, run)
        folders = (layout.COMMITS, layout.QUARANTINE, layout.WITHDRAWN)
        self.numbers = frozenset(find_shards(store, range(plan_size(run)[1]), folders))

    def rows(self, shard: int) -> dict[str, Row]:
        """The terminal samples of a shard: key -> row, in plan order."""
        if shard not in self.numbers:
            return {}
        state = scan_shard(self._store, shard, keys=self._planned.of(shard))
        quarantined: dict[str, Row] = dict.fromkeys(sorted(state.quarantined))
        quarantined |= dict.fromkeys(sorted(state.withdrawn), _WITHDRAWN)
        rows = _table(self._store, shard, state.committed) if state.sealed else None
        if rows is None:
            read = partial(read_commit, self._store, shard)
            records = map_in_threads(read, sorted(state.committed), self._store.readers)
            rows = [describe_row(record) for record in records]
        return quarantined | {row["key"]: row for row in sorted(rows, key=lambda row: (row["row"], row["video_index"]))}


def _table(store: Store, shard: int, committed: frozenset[str]) -> list[dict[str, Any]] | None:
    """The rows of the sealed table; None if they are not those of the records, which `verify` reports."""
    try:
        rows = read_rows(store, shard)
    except (FileNotFoundError, ValueError):
        return None
    return rows if {row["key"] for row in rows} == committed else None
