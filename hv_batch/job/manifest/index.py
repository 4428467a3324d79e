"""The checked manifest in the output root: what a run reads its samples from, tonight and at every resume.

Written once, after the check and as soon as the root is claimed: `plan/index.json` tells of which manifest and defaults
it is, and which parts there are; a part is a Parquet file of some 20,000 rows. So a run does not depend on its manifest
once it has begun, and the next start neither reads nor judges it again when its files are still of the versions noted.
Whatever is wrong with an index (damaged, of another manifest, by another version), it is as good as none.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from hv_batch import __version__
from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.samples import CheckedRow, ManifestSummary, Sample, make_samples
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.parquet import read_parquet
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads
from hv_batch.protocol import UserError

SCHEMA = "hv_batch/plan/1"
CARRIERS = 8  # parts copied or checked at a time, each of a few MB


@dataclass(frozen=True, slots=True)
class IndexPart:
    name: str  # its key in the store
    sha256: str  # of its bytes, hex
    rows: int
    samples: int


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """What an output root's own index tells without its config."""

    parts: tuple[IndexPart, ...]
    extra_kinds: Mapping[str, ColumnType]  # of the manifest's further columns


class Index:
    """The samples of a checked manifest, shard by shard; a part of a few MB is held at a time (P7)."""

    def __init__(self, store: Store, document: Mapping[str, Any], config: RunConfig) -> None:
        self.summary = _read_summary(document["summary"], config)
        self._store = store
        self._document = document
        self._config = config
        self._defaults = config.defaults.model_dump()
        self._parts = [IndexPart(**part) for part in document["parts"]]
        ends = np.cumsum([part.samples for part in self._parts])
        self._starts = [0, *ends.tolist()]
        self._held: tuple[IndexPart, _Rows] | None = None

    @property
    def shards(self) -> int:
        return self.summary.shards

    def size(self, shard: int) -> int:
        """Samples of a shard; every one is full but the last."""
        size = self._config.output.shard_size
        return min(size, self.summary.samples - shard * size)

    def samples(self, shard: int) -> list[Sample]:
        """Samples of a shard in plan order. Raises UserError when a part is no longer what was written."""
        first = shard * self._config.output.shard_size
        end = first + self.size(shard)
        found: list[Sample] = []
        at = bisect_right(self._starts, first) - 1
        while self._starts[at] < end:
            start = self._starts[at]
            rows = self._rows(self._parts[at])
            for before, row in rows.between(first - start, end - start):
                found += make_samples(row, start + before, self._config, self._defaults)
            at += 1
        return [sample for sample in found if sample.shard == shard]

    def __iter__(self) -> Iterator[Sample]:
        for shard in range(self.shards):
            yield from self.samples(shard)

    def publish(self, store: Store) -> None:
        """Copy the index into the output root, unless it is from there; the document last, when all it names is there.

        This run goes on with its own copy.
        """
        if store.url == self._store.url:
            return

        def copy(part: IndexPart) -> None:
            store.put(part.name, self._store.get(part.name))

        for _ in map_in_threads(copy, self._parts, CARRIERS):
            pass
        store.put(layout.INDEX, json.dumps(self._document, indent=1).encode())

    def is_whole(self) -> bool:
        """Whether every part is there with the bytes that were written."""
        return all(map_in_threads(partial(is_whole, self._store), self._parts, CARRIERS))

    def _rows(self, part: IndexPart) -> _Rows:
        if self._held is None or self._held[0] is not part:
            self._held = None  # before the next is read: one is enough to hold
            self._held = (part, _Rows(_read_part(self._store, part)))
        return self._held[1]


class _Rows:
    """The rows of one part."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._ends = np.cumsum(table["videos"].to_numpy())  # samples up to and with a row

    def between(self, first: int, end: int) -> Iterator[tuple[int, CheckedRow]]:
        """Rows that have samples from `first` to before `end`, with the number of samples before each."""
        begin = int(np.searchsorted(self._ends, max(first, 0), side="right"))
        stop = int(np.searchsorted(self._ends, end, side="left")) + 1
        before = int(self._ends[begin - 1]) if begin else 0
        for row in self._table.slice(begin, stop - begin).to_pylist():
            values, extra = json.loads(row["content"])
            yield before, CheckedRow(number=row["row"], key=row["key"], id=row["id"], values=values, extra=extra)
            before += row["videos"]


class IndexWriter:
    """Takes the parts in order, each `data` a Parquet file of `judge.PART_SCHEMA`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.parts: list[IndexPart] = []

    def add(self, data: bytes, rows: int, samples: int) -> None:
        digest = hashlib.sha256(data).hexdigest()
        part = IndexPart(layout.index_part(len(self.parts), digest), digest, rows, samples)
        self.store.put(part.name, data)
        self.parts.append(part)

    def finish(self, summary: ManifestSummary, manifest: Manifest, config: RunConfig) -> Index:
        document = {
            "schema": SCHEMA,
            "key": index_key(config),
            "files": _versions(manifest),
            "summary": {**asdict(summary), "shapes": [[*shape, count] for shape, count in summary.shapes.items()]},
            "parts": [asdict(part) for part in self.parts],
        }
        return Index(self.store, document, config)


def read_rows(writer: IndexWriter, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows written so far."""
    for part in writer.parts:
        yield from _read_part(writer.store, part, columns).to_pylist()


def load_index(store: Store, manifest: Manifest, config: RunConfig) -> Index | None:
    """The index of this manifest and config in an output root, or None when there is none to be trusted.

    The manifest is not read as long as its files are of the versions noted; else only to compare its digest. Raises
    UserError when a file of the manifest is missing.
    """
    try:
        data = store.get(layout.INDEX)
    except OSError:  # no index; or the root cannot be read at all, which its probe tells better
        return None
    try:
        document = json.loads(data)
        if document["schema"] != SCHEMA or document["key"] != index_key(config):
            return None
        index = Index(store, document, config)
        is_same = document["files"] == _versions(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not is_same and manifest.read_digest() != index.summary.digest:
        return None
    return index if index.is_whole() else None


def read_index(store: Store) -> IndexManifest:
    """Of which parts the index in an output root says to be. Raises FileNotFoundError, and ValueError for no index."""
    try:
        document = json.loads(store.get(layout.INDEX))
        parts = tuple(IndexPart(**part) for part in document["parts"])
        return IndexManifest(parts, _read_kinds(document["summary"]["extra_kinds"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{layout.INDEX} cannot be read: {type(error).__name__}: {error}") from error


def is_whole(store: Store, part: IndexPart) -> bool:
    """Whether a part is there with the bytes that were written."""
    try:
        return hashlib.sha256(store.get(part.name)).hexdigest() == part.sha256
    except FileNotFoundError:
        return False


def index_key(config: RunConfig) -> str:
    """Hex digest of all but the manifest that an index depends on."""
    facts = [__version__, config.defaults.model_dump(mode="json"), config.parallel.cfg_degree]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _versions(manifest: Manifest) -> list[dict[str, Any]]:
    return [{"name": public_url(source.name), "version": dict(source.version)} for source in manifest.sources]


def _read_summary(written: Mapping[str, Any], config: RunConfig) -> ManifestSummary:
    fields = {
        **written,
        "shards": -(-written["samples"] // config.output.shard_size),
        "shapes": {(height, width, frames): count for height, width, frames, count in written["shapes"]},
        "extra_kinds": _read_kinds(written["extra_kinds"]),
        "warnings": tuple(written["warnings"]),
    }
    return ManifestSummary(**fields)


def _read_kinds(written: Mapping[str, str]) -> dict[str, ColumnType]:
    return {name: ColumnType(kind) for name, kind in written.items()}


def _read_part(store: Store, part: IndexPart, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        data = store.get(part.name)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise UserError(
            f"{part.name} in the output root {public_url(store.url)} is missing or damaged. What is committed stays; "
            "run the same command again, which writes it anew from the manifest."
        )
    return read_parquet(data, columns)
