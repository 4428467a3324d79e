"""Two runs compared sample by sample, from storage alone.

Samples are matched by key. Sealed shards are read from their tables, one object each; open ones from their records.
Both runs are walked shard by shard together, so that two runs with the same layout are compared in the memory of one
shard each (P7); where the layouts differ, rows wait until their counterparts come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

from hv_batch.job.dataset.seal import describe_row, read_rows
from hv_batch.job.records.commits import read_commit, scan_shard
from hv_batch.job.records.run_document import find_differences, plan_size, read_run
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

MAX_LINES = 20  # of samples a category in the text

# The columns that say what was asked for; the others say where it stands and what came out.
ASKED = (
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
)

Facts = Mapping[str, Any] | None  # a row of the metadata, or None of a quarantined sample


@dataclass(slots=True)
class Comparison:
    """What two runs share. Lists hold keys, in the order found; equal samples are only counted."""

    a: str
    b: str
    identity: list[str] = field(default_factory=list)  # differences of the runs themselves, as lines
    equal_bytes: int = 0
    quarantined_in_both: int = 0
    other_bytes: list[str] = field(default_factory=list)  # of equal frames: another encoder, or other settings of it
    other_frames: list[str] = field(default_factory=list)  # of equal parameters
    other_parameters: dict[str, list[str]] = field(default_factory=dict)  # by key, the columns that differ
    only_in_a: list[str] = field(default_factory=list)  # no record in the other one
    only_in_b: list[str] = field(default_factory=list)
    quarantined_in_a: list[str] = field(default_factory=list)  # and committed in the other one
    quarantined_in_b: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Whether every sample of either has the same bytes in the other, whatever the runs say of themselves."""
        return not any(samples for _, samples in self._categories())

    def _categories(self) -> list[tuple[str, list[str]]]:
        parameters = [f"{key} ({', '.join(columns)})" for key, columns in self.other_parameters.items()]
        return [
            ("only in A", self.only_in_a),
            ("only in B", self.only_in_b),
            ("quarantined in A only", self.quarantined_in_a),
            ("quarantined in B only", self.quarantined_in_b),
            ("other parameters", parameters),
            ("equal parameters, other frames", self.other_frames),
            ("equal frames, other bytes", self.other_bytes),
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: getattr(self, name) for name in self.__slots__} | {"equal": self.is_equal}

    def render(self) -> str:
        lines = [f"A: {self.a}", f"B: {self.b}"]
        lines += ["the runs differ in (A -> B):", *(f"  {line}" for line in self.identity)] if self.identity else []
        lines.append(f"{self.equal_bytes:,} samples with equal bytes, {self.quarantined_in_both:,} quarantined in both")
        for title, samples in self._categories():
            if samples:
                more = f" and {len(samples) - MAX_LINES:,} more" if len(samples) > MAX_LINES else ""
                lines.append(f"{len(samples):,} {title}: {', '.join(samples[:MAX_LINES])}{more}")
        return "\n".join(lines)


def compare(a: Store, b: Store) -> Comparison:
    """Raises UserError when one of them holds no run."""
    run_a, run_b = read_run(a), read_run(b)
    result = Comparison(a.url, b.url, find_differences(run_a, run_b))
    waiting_a: dict[str, Facts] = {}
    waiting_b: dict[str, Facts] = {}
    nothing: dict[str, Facts] = {}
    for of_a, of_b in zip_longest(_shards(a, run_a), _shards(b, run_b), fillvalue=nothing):
        waiting_a |= of_a
        waiting_b |= of_b
        for key in dict.fromkeys((*of_a, *of_b)):
            if key in waiting_a and key in waiting_b:
                _judge(result, key, waiting_a.pop(key), waiting_b.pop(key))
    result.only_in_a += waiting_a
    result.only_in_b += waiting_b
    return result


def _judge(result: Comparison, key: str, in_a: Facts, in_b: Facts) -> None:
    if in_a is None and in_b is None:
        result.quarantined_in_both += 1
    elif in_a is None:
        result.quarantined_in_a.append(key)
    elif in_b is None:
        result.quarantined_in_b.append(key)
    elif changed := [column for column in ASKED if in_a[column] != in_b[column]]:
        result.other_parameters[key] = changed
    elif in_a["sha256"] == in_b["sha256"]:
        result.equal_bytes += 1
    elif in_a["frames_sha256"] == in_b["frames_sha256"]:
        result.other_bytes.append(key)
    else:
        result.other_frames.append(key)


def _shards(store: Store, run: Mapping[str, Any]) -> Iterator[dict[str, Facts]]:
    """Every terminal sample of a run, a shard at a time."""
    for shard in range(plan_size(run)[1]):
        state = scan_shard(store, shard)
        facts: dict[str, Facts] = dict.fromkeys(sorted(state.quarantined))
        rows = _table(store, shard, state.committed) if state.sealed else None
        if rows is None:
            records = map_in_threads(partial(read_commit, store, shard), sorted(state.committed), store.readers)
            rows = [describe_row(record) for record in records]
        yield facts | {row["key"]: row for row in sorted(rows, key=lambda row: (row["row"], row["video_index"]))}


def _table(store: Store, shard: int, committed: frozenset[str]) -> list[dict[str, Any]] | None:
    """The sealed table's rows; None when it is not that of the records, which `verify` would tell."""
    try:
        rows = read_rows(store, shard)
    except (FileNotFoundError, ValueError):
        return None
    return rows if {row["key"] for row in rows} == committed else None
