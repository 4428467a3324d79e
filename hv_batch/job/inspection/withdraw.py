"""Removes samples from an output root for good: `hv-batch withdraw`.

The order of the writes leaves a valid state at any time: the tombstone, then for its shard the seals (`unseal_shard`),
the record, the files; then the shard is sealed again, and summary, report, card and `_SUCCESS` of a finished run are
written again. The same command finishes what a killed one has begun, because each step looks at what is left.

The manifest and its checked copy in `plan/` keep the row: without it, every later sample would move to another place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hv_batch.job import layout
from hv_batch.job.config.sections import OutputConfig
from hv_batch.job.dataset.card import write_card
from hv_batch.job.dataset.lost_media import release_lost
from hv_batch.job.dataset.seal import is_sealed, read_committed, read_table, seal_records
from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.manifest.index import read_index, read_part
from hv_batch.job.manifest.planned_keys import PlannedKeys, belongs_to
from hv_batch.job.manifest.samples import sample_keys
from hv_batch.job.records.commits import read_commit, scan_shard
from hv_batch.job.records.run_document import dataset_schema, finish_run, recorded_spool_folder
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.records.spool import Spool
from hv_batch.job.records.withdrawn import delete_remnants, read_tombstone, remnants, tombstone
from hv_batch.job.redaction import public_url
from hv_batch.job.report.report_files import forget_shard
from hv_batch.job.report.update import update_report
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from hv_batch.job.user_input import shorten
from hv_batch.protocol import UserError

MAX_REASON_CHARS = 1000

_VIDEO = re.compile(r"(?P<row>.+)-v(?:0|[1-9]\d*)")


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """Where the checked manifest has a sample. `row` is from 1, `video_index` from 0."""

    shard: int
    key: str
    id: str
    row: int
    video_index: int


@dataclass(slots=True)
class Withdrawal:
    """What a withdrawal has done."""

    samples: list[str]  # keys
    removed: list[str] = field(default_factory=list)  # objects of these samples
    spooled: int = 0  # files of these samples that waited on the disk of this machine
    sealed: list[int] = field(default_factory=list)  # shards that were sealed again
    finished: bool = False  # whether no sample of the run is pending and every shard is sealed


def find_samples(store: Store, run: Mapping[str, Any], name: str) -> list[PlannedSample]:
    """The samples with this id or key: all videos of a row, or one (`<key>-v1`). `run` is the run.json.

    Raises UserError if there is none, if several rows match, or if the root has no valid index.
    """
    name = name.encode(errors="replace").decode()
    size, before = run["config"]["output"]["shard_size"], 0
    found = []
    for part in _index_parts(store, run):
        table = read_part(store, part, ["row", "key", "id", "videos"])
        ends = before + np.cumsum(table["videos"].to_numpy())
        for at in np.flatnonzero(_rows_named(table, name)):
            row = {column: table[column][int(at)].as_py() for column in table.column_names}
            first = int(ends[at]) - row["videos"]
            for index, key in enumerate(sample_keys(row["key"], row["videos"])):
                if name in (key, row["key"], row["id"]):
                    shard, sample_id = (first + index) // size, row["id"] or row["key"]
                    found.append(PlannedSample(shard, key, sample_id, row["row"], index))
        before += part.samples
    if not found:
        raise UserError(
            f"No sample of {public_url(store.url)} has the id or key {shorten(name)}. Give an id of the manifest, or "
            "the name of a video in data/ without its hash."
        )
    if len(rows := {sample.row for sample in found}) > 1:
        raise UserError(
            f"{shorten(name)} is the id or key of several rows of the manifest ({', '.join(map(str, sorted(rows)))}). "
            f"Give one of the keys {', '.join(sample.key for sample in found)}."
        )
    return found


def withdraw(
    store: Store, run: Mapping[str, Any], samples: Sequence[PlannedSample], reason: str, check_lease: Callable[[], None]
) -> Withdrawal:
    """Withdraw samples; `run` is the run.json. A sample that is withdrawn already keeps its tombstone.

    The lease of the root must be held; `check_lease` is called before each change. Raises UserError for an empty reason
    or one of more than MAX_REASON_CHARS characters.
    """
    reason = reason.strip()
    if not 0 < len(reason) <= MAX_REASON_CHARS:
        raise UserError(
            f"--reason has {len(reason):,} characters; allowed: 1 to {MAX_REASON_CHARS:,}. It is kept for good, so "
            "say why the sample must not be in the dataset."
        )
    result = Withdrawal([sample.key for sample in samples])
    planned = PlannedKeys(store, run)
    shards = [(shard, list(group)) for shard, group in groupby(samples, key=attrgetter("shard"))]
    for shard, of_shard in shards:
        keys = frozenset(sample.key for sample in of_shard)
        check_lease()
        for sample in of_shard:
            _put_tombstone(store, sample, reason)
        if _needs_unseal(store, shard, keys):
            unseal_shard(store, shard)
        result.removed += delete_remnants(store, shard, keys)
        if not is_sealed(store, shard):  # otherwise nothing was changed
            forget_shard(store, shard)
        result.spooled += sum(spool.discard(shard, key) for spool in _spools(store, run) for key in keys)
        check_lease()
        if not is_sealed(store, shard) and _seal(store, run, planned, shard):
            result.sealed.append(shard)
    check_lease()
    result.finished = _finish(store, run, [shard for shard, _ in shards])
    return result


def _index_parts(store: Store, run: Mapping[str, Any]) -> Sequence[Any]:
    try:
        index = read_index(store)
    except FileNotFoundError:
        index = None
    if index is None or not belongs_to(index.document, run):
        raise UserError(
            f"{public_url(store.url)} has no checked manifest of its run in plan/, so the place of the sample is "
            "unknown. Run the same run command again, which writes plan/ from the manifest, and then withdraw."
        )
    return index.parts


def _rows_named(table: pa.Table, name: str) -> np.ndarray:
    """A mask of the rows of an index part with this id or key, or with a video of this key."""
    mask = pc.or_(pc.equal(table["key"], name), pc.fill_null(pc.equal(table["id"], name), False))
    if video := _VIDEO.fullmatch(name):
        mask = pc.or_(mask, pc.and_(pc.equal(table["key"], video["row"]), pc.greater(table["videos"], 1)))
    return np.asarray(mask)


def _put_tombstone(store: Store, sample: PlannedSample, reason: str) -> None:
    """Put the tombstone of a sample if it is absent; one that is damaged is replaced."""
    shard, key = sample.shard, sample.key
    try:
        sha256 = read_commit(store, shard, key)["sha256"]
    except (FileNotFoundError, InvalidObjectError):
        sha256 = None
    document = encode(tombstone(asdict(sample), reason=reason, sha256=sha256))
    name = layout.withdrawn_key(shard, key)
    if not store.put_new(name, document):
        try:
            read_tombstone(store, shard, key)
        except InvalidObjectError:
            store.put(name, document)


def _needs_unseal(store: Store, shard: int, keys: frozenset[str]) -> bool:
    """Whether something of the samples is left: objects, or a row. Then the seals of the shard and the run must go."""
    if remnants(store, shard, keys):
        return True
    try:
        return bool(keys & set(read_table(store, shard, ["key"])["key"].to_pylist()))
    except FileNotFoundError:
        return False
    except (ValueError, KeyError):  # a damaged table
        return True


def _spools(store: Store, run: Mapping[str, Any]) -> Iterator[Spool]:
    """The spools of the run on this machine, also of its former identities. They are emptied, but never created."""
    for folder in dict.fromkeys((None, recorded_spool_folder(run))):
        for each in (run, *run.get("earlier", ())):
            yield Spool(OutputConfig(spool_folder=folder), store, each["fingerprint"])


def _seal(store: Store, run: Mapping[str, Any], planned: PlannedKeys, shard: int) -> bool:
    """Seal a shard if none of its samples is pending. Returns whether it was sealed."""
    keys = planned.of(shard)
    if keys is None or keys - scan_shard(store, shard, sealed=False, keys=keys).terminal:
        return False
    records = sorted(read_committed(store, shard, sorted(keys)), key=itemgetter("row", "video_index"))
    if release_lost(store, shard, records):
        return False
    return seal_records(
        store,
        shard,
        records,
        read_index(store).extra_kinds,
        identity=run["identity"],
        earlier=run.get("earlier", ()),
        schema=dataset_schema(run),
        webdataset=bool(run["config"]["output"].get("webdataset")),
    )


def _finish(store: Store, run: Mapping[str, Any], shards: Sequence[int]) -> bool:
    """Write what describes the whole run again, if a run has written it or if the run is complete now.

    Returns whether the run is finished.
    """
    if store.exists(layout.SUCCESS):  # nothing was changed
        return True
    was_finished, is_complete = store.exists(layout.SUMMARY), False
    if was_finished or all(is_sealed(store, shard) for shard in shards):
        summary = aggregate(store)
        is_complete = summary["pending"] == 0 and summary["shards_sealed"] == summary["shards"]
    if is_complete or store.exists(layout.REPORT):
        with suppress(UserError):  # a run with too many shards has no report
            update_report(store, running=False)
    if is_complete or was_finished:
        write_card(store, run, summary)
        finish_run(store, summary)
    return is_complete
