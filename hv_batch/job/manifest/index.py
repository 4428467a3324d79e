"""The index: the validated manifest in the output root, from which a run and each resume read their samples.

The index is written once, after the manifest check and the lease of the root. `plan/index.json` identifies the manifest
and the defaults, and lists the parts; a part is a Parquet file of about 20,000 rows. Once a run has started, it does
not depend on its manifest. The next start does not read or validate the manifest again if the versions of its files are
unchanged. An index that is damaged, or belongs to another manifest or version of hv_batch, is treated as missing.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from hv_batch import __version__
from hv_batch.job import layout
from hv_batch.job.config.field_rules import MAX_VIDEOS
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.documents.reading import InvalidObjectError, parse_row, read
from hv_batch.job.documents.schema import IndexDocument
from hv_batch.job.manifest.extra_columns import ColumnType
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.row_validation import PART_SCHEMA
from hv_batch.job.manifest.samples import CheckedRow, ManifestSummary, Sample, make_samples, sample_keys
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.parquet import read_parquet
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads
from hv_batch.protocol import UserError

SCHEMA = "hv_batch/plan/1"
COPY_THREADS = 8  # copy or verify parts, each of a few MB


@dataclass(frozen=True, slots=True)
class IndexPart:
    name: str  # the key in the store
    sha256: str  # hex, of the bytes
    rows: int
    samples: int


@dataclass(frozen=True, slots=True)
class IndexManifest:
    """The content of the index document of an output root that can be read without the run's config."""

    parts: tuple[IndexPart, ...]
    extra_kinds: Mapping[str, ColumnType]  # common types of the manifest's further columns
    document: Mapping[str, Any]  # the whole of it


class Index:
    """The samples of a valid manifest, shard by shard. One part of a few MB is held at a time (P7)."""

    def __init__(self, store: Store, document: Mapping[str, Any], config: RunConfig) -> None:
        self.summary = _read_summary(document["summary"], config)
        self._store = store
        self._document = document
        self._config = config
        self._defaults = config.defaults.model_dump()
        self._parts = [IndexPart(**part) for part in document["parts"]]
        ends = np.cumsum([part.samples for part in self._parts])
        self._starts = [0, *ends.tolist()]
        self._cached: tuple[IndexPart, IndexRows] | None = None

    @property
    def shards(self) -> int:
        return self.summary.shards

    def size(self, shard: int) -> int:
        """The number of samples of a shard. All shards except the last are full."""
        size = self._config.output.shard_size
        return min(size, self.summary.samples - shard * size)

    def samples(self, shard: int) -> list[Sample]:
        """The samples of a shard, in the order of the manifest. Raises UserError if a part is missing or damaged."""
        return [
            sample
            for first, row in self.rows(shard)
            for sample in make_samples(row, first, self._config, self._defaults)
            if sample.shard == shard
        ]

    def rows(self, shard: int) -> Iterator[tuple[int, CheckedRow]]:
        """The rows with any sample of a shard, each with the number of its first sample in the manifest."""
        first = shard * self._config.output.shard_size
        end = first + self.size(shard)
        at = bisect_right(self._starts, first) - 1
        while self._starts[at] < end:
            start = self._starts[at]
            for before, row in self._rows(self._parts[at]).between(first - start, end - start):
                yield start + before, row
            at += 1

    def keys(self, shard: int) -> frozenset[str]:
        """The keys of the samples of a shard, without parsing their rows. Raises UserError as `samples`."""
        first = shard * self._config.output.shard_size
        end = first + self.size(shard)
        keys: list[str] = []
        at = bisect_right(self._starts, first) - 1
        while self._starts[at] < end:
            start = self._starts[at]
            keys += self._rows(self._parts[at]).keys(first - start, end - start)
            at += 1
        return frozenset(keys)

    def __iter__(self) -> Iterator[Sample]:
        for shard in range(self.shards):
            yield from self.samples(shard)

    def parts(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of each part with all columns, and their `values` and `extra` (`parse_row`)."""
        for part in self._parts:
            rows = read_part(self._store, part).to_pylist()
            yield [
                row | dict(zip(("values", "extra"), parse_row(row["key"], row["content"]), strict=True)) for row in rows
            ]

    def tables(self) -> Iterator[pa.Table]:
        """The rows as tables of `row_validation.PART_SCHEMA`, part by part. Raises UserError as `samples`."""
        for part in self._parts:
            yield read_part(self._store, part)

    def publish(self, store: Store) -> None:
        """Copy the index into the output root `store`, unless it was read from there.

        The document is written last, when all its parts exist. This object continues to read from its own store.
        """
        if store.url == self._store.url:
            return

        def copy(part: IndexPart) -> None:
            store.put(part.name, self._store.get(part.name))

        for _ in map_in_threads(copy, self._parts, COPY_THREADS):
            pass
        store.put(layout.INDEX, json.dumps(self._document, indent=1).encode())

    def is_whole(self) -> bool:
        """Whether all parts exist and have the recorded digests."""
        return all(map_in_threads(partial(is_whole, self._store), self._parts, COPY_THREADS))

    def _rows(self, part: IndexPart) -> IndexRows:
        if self._cached is None or self._cached[0] is not part:
            self._cached = None  # release the old part before the next one is read
            self._cached = (part, IndexRows(part, read_part(self._store, part)))
        return self._cached[1]


class IndexRows:
    """The rows of one part, or only their columns `key` and `videos`."""

    def __init__(self, part: IndexPart, table: pa.Table) -> None:
        self._part = part
        self._table = table
        self._ends = np.cumsum(table["videos"].to_numpy())  # number of samples up to and including each row

    def keys(self, first: int, end: int) -> Iterator[str]:
        """The keys of the samples number `first` to `end` of the part."""
        begin, stop, before = self._range(first, end)
        for row_key, after in zip(self._table["key"][begin:stop].to_pylist(), self._ends[begin:stop], strict=True):
            videos = int(after) - before
            yield from islice(sample_keys(row_key, videos), max(first - before, 0), max(end - before, 0))
            before += videos

    def _range(self, first: int, end: int) -> tuple[int, int, int]:
        """The range of the rows with any sample in [first, end), and the number of samples before it."""
        begin = int(np.searchsorted(self._ends, max(first, 0), side="right"))
        stop = int(np.searchsorted(self._ends, end, side="left")) + 1
        return begin, stop, int(self._ends[begin - 1]) if begin else 0

    def between(self, first: int, end: int) -> Iterator[tuple[int, CheckedRow]]:
        """The rows with any sample in [first, end), each with the number of samples before it."""
        begin, stop, before = self._range(first, end)
        for row in self._table.slice(begin, stop - begin).to_pylist():
            try:
                values, extra = parse_row(row["key"], row["content"])
            except ValueError as error:
                raise InvalidObjectError(self._part.name, f"its row {row['row']}: {error}") from error
            yield before, CheckedRow(number=row["row"], key=row["key"], id=row["id"], values=values, extra=extra)
            before += row["videos"]


class IndexWriter:
    """Writes the parts of an index in order. Each `data` is a Parquet file of `row_validation.PART_SCHEMA`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.parts: list[IndexPart] = []

    def add(self, data: bytes, rows: int, samples: int) -> None:
        digest = hashlib.sha256(data).hexdigest()
        part = IndexPart(layout.index_part(len(self.parts), digest), digest, rows, samples)
        self.store.put(part.name, data)
        self.parts.append(part)

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """A part as it was written, or only `columns` of it."""
        return read_part(self.store, self.parts[number], columns)

    def replace(self, number: int, data: bytes, rows: int, samples: int) -> None:
        """Write another content of a part. The old object stays in the store and does not belong to the index."""
        digest = hashlib.sha256(data).hexdigest()
        part = IndexPart(layout.index_part(number, digest), digest, rows, samples)
        self.store.put(part.name, data)
        self.parts[number] = part

    def finish(self, summary: ManifestSummary, manifest: Manifest, config: RunConfig) -> Index:
        document = {
            "schema": SCHEMA,
            "key": index_key(config),
            "files": _versions(manifest),
            "summary": _write_summary(summary),
            "parts": [asdict(part) for part in self.parts],
        }
        return Index(self.store, document, config)


def read_rows(writer: IndexWriter, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The given columns of all rows written so far."""
    for part in writer.parts:
        yield from read_part(writer.store, part, columns).to_pylist()


def load_index(store: Store, manifest: Manifest, config: RunConfig) -> Index | None:
    """The valid index of this manifest and config in an output root, or None.

    The manifest is read only if the versions of its files have changed, and then only to compare its digest. Raises
    UserError if a file of the manifest is missing.
    """
    try:
        document = read(store, layout.INDEX, IndexDocument)
    except (OSError, InvalidObjectError):  # no index, or an unreadable root, which the probe of the root reports better
        return None
    if document["key"] != index_key(config):
        return None
    index = Index(store, document, config)
    is_same = document["files"] == _versions(manifest)
    if not is_same and manifest.read_digest() != index.summary.digest:
        return None
    return index if index.is_whole() else None


def load_recorded_index(store: Store, config: RunConfig, digest: str) -> Index | None:
    """The complete index of the run in an output root, whose manifest had this digest; None if there is none.

    Nothing but the root is read. `config` must be that of the root's run.json. An index of another version of hv_batch
    is valid as well: its rows were validated when the run began.
    """
    try:
        document = read(store, layout.INDEX, IndexDocument)
    except (FileNotFoundError, InvalidObjectError):
        return None
    if document["summary"]["digest"] != digest:
        return None
    index = Index(store, document, config)
    return index if index.is_whole() else None


def read_index(store: Store) -> IndexManifest:
    """Read the index document of an output root. Raises FileNotFoundError, or InvalidObjectError if it is damaged."""
    document = read(store, layout.INDEX, IndexDocument)
    parts = tuple(IndexPart(**part) for part in document["parts"])
    return IndexManifest(parts, _read_types(document["summary"]["extra_kinds"]), document)


def is_whole(store: Store, part: IndexPart) -> bool:
    """Whether a part exists and has the recorded digest."""
    try:
        return hashlib.sha256(store.get(part.name)).hexdigest() == part.sha256
    except FileNotFoundError:
        return False


def index_key(config: RunConfig) -> str:
    """Hex digest of everything except the manifest that an index depends on."""
    facts: list[Any] = [
        __version__,
        config.defaults.model_dump(mode="json"),
        config.parallel.cfg_degree,
        config.media.codec,
    ]
    if config.hooks.prompt:
        facts.append(config.hooks.prompt)
    facts += [options] if (options := config.manifest.identity()) else []
    facts += [sorted(config.model.loras)] if config.model.loras else []  # the names that rows may use
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _versions(manifest: Manifest) -> list[dict[str, Any]]:
    return [{"name": public_url(source.name), "version": dict(source.version)} for source in manifest.sources]


def _write_summary(summary: ManifestSummary) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(summary).items() if name != "prompt_hook" or value}
    return {**fields, "shapes": [[*shape, count] for shape, count in summary.shapes.items()]}


def _read_summary(document: Mapping[str, Any], config: RunConfig) -> ManifestSummary:
    fields = {
        **document,
        "shards": -(-document["samples"] // config.output.shard_size),
        "shapes": {(height, width, frames): count for height, width, frames, count in document["shapes"]},
        "extra_kinds": _read_types(document["extra_kinds"]),
        "warnings": tuple(document["warnings"]),
    }
    return ManifestSummary(**fields)


def _read_types(recorded: Mapping[str, str]) -> dict[str, ColumnType]:
    return {name: ColumnType(type_) for name, type_ in recorded.items()}


def read_part(store: Store, part: IndexPart, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a part, or only `columns` of them. Raises UserError if it is missing or damaged."""
    try:
        data = store.get(part.name)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise UserError(
            f"{part.name} in the output root {public_url(store.url)} is missing or damaged. Committed samples are "
            "kept. Run the same command again, which writes the index again from the manifest."
        )
    try:
        table = read_parquet(data, columns)
    except (pa.ArrowException, OSError) as error:
        raise InvalidObjectError(part.name, f"it is not a Parquet file: {error}", url=store.url) from error
    if problem := _part_problem(table, part, columns or PART_SCHEMA.names):
        raise InvalidObjectError(part.name, problem, url=store.url)
    return table


def _part_problem(table: pa.Table, part: IndexPart, columns: Sequence[str]) -> str | None:
    """Why `table` is not what the manifest check writes; None if it is. The digest only shows that it is unchanged."""
    expected = pa.schema([field for field in PART_SCHEMA if field.name in columns])
    if table.schema != expected or table.num_rows != part.rows:
        return f"it does not hold {part.rows:,} rows with the columns {', '.join(columns)}"
    if any(table[name].null_count for name in columns if name != "id"):
        return "it has empty values"
    if part.rows and "videos" in columns:
        videos = table["videos"].to_numpy()
        if videos.min() < 1 or videos.max() > MAX_VIDEOS or videos.sum(dtype=np.int64) != part.samples:
            return f"its rows do not have {part.samples:,} samples"
    return None
