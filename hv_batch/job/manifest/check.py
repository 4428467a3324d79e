"""The check of a whole manifest before anything starts, and the index it leaves behind.

One streaming pass in which chunks are judged by several processes; of the samples only 8 bytes each are held, for the
check of unique keys, and problems in full only up to a number (P6, P7).
"""

from __future__ import annotations

import difflib
import multiprocessing
import os
import signal
import threading
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from hv_batch.job.config.field_rules import KNOWN_COLUMNS
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest.extra_columns import ColumnType, common_type
from hv_batch.job.manifest.index import Index, IndexWriter, read_rows
from hv_batch.job.manifest.reader import Chunk, Manifest
from hv_batch.job.manifest.row_validation import (
    MAX_COLUMNS,
    MAX_REPORTED,
    ChunkResult,
    describe,
    hash_key,
    validate_chunk,
)
from hv_batch.job.manifest.samples import ManifestSummary, sample_keys
from hv_batch.job.storage.store import Store
from hv_batch.job.user_input import shorten
from hv_batch.protocol import FieldProblem, UserError

MAX_PROCESSES = 8  # the reading process could feed twenty, but others want a head node too
INLINE_CHUNKS = 2  # a manifest of no more is judged sooner than processes have started
TYPO_LIKENESS = 0.85  # difflib ratio: "num_frame" and "heights" are above it, "steps" and "frames" below


def check_manifest(manifest: Manifest, config: RunConfig, spool: Store) -> Index:
    """Judge every row (P6) and write what the run needs of them as an index into `spool`.

    Raises UserError that lists every bad row with field, value and what is allowed.
    """
    defaults = config.defaults.model_dump()
    writer = IndexWriter(spool)
    check = _Check(manifest)
    for chunk, verdict in _judge(manifest.chunks(), defaults, config.parallel.cfg_degree):
        check.gather(chunk, verdict)
        if verdict.samples:
            writer.add(verdict.part, verdict.rows, verdict.samples)
    if check.rows == 0:
        raise UserError(manifest.without_rows())
    check.report_equal_keys(writer)
    if check.problem_count:
        raise UserError(check.describe())
    samples = len(check.key_hashes)
    summary = ManifestSummary(
        digest=manifest.digest,
        rows=check.rows,
        samples=samples,
        shards=-(-samples // config.output.shard_size),
        shapes=dict(check.shapes),
        extra_kinds=dict(check.extra_kinds),
        warnings=tuple(check.warn_of_typos()),
    )
    return writer.finish(summary, manifest, config)


def _judge(
    chunks: Iterator[Chunk], defaults: Mapping[str, Any], cfg_degree: int
) -> Iterator[tuple[Chunk, ChunkResult]]:
    """Verdicts in the order of the chunks, of which few are held at a time."""
    first = list(islice(chunks, INLINE_CHUNKS + 1))
    processes = min(MAX_PROCESSES, os.cpu_count() or 1)
    if len(first) <= INLINE_CHUNKS or processes == 1:
        for chunk in chain(first, chunks):
            yield chunk, validate_chunk(chunk, defaults, cfg_degree)
        return
    # Not by fork: this process has threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_follow_parent)
    waiting: deque[tuple[Chunk, Future[ChunkResult]]] = deque()
    try:
        for chunk in chain(first, chunks):
            waiting.append((chunk, pool.submit(validate_chunk, chunk, defaults, cfg_degree)))
            if len(waiting) > processes + 1:
                yield _next_verdict(waiting)
        while waiting:
            yield _next_verdict(waiting)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that checked rows of the manifest was killed, most likely for want of memory. Give this machine "
            f"more memory: {processes} such processes take some 300 MB each."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _next_verdict(waiting: deque[tuple[Chunk, Future[ChunkResult]]]) -> tuple[Chunk, ChunkResult]:
    chunk, future = waiting.popleft()
    return chunk, future.result()


def _follow_parent() -> None:
    """A judge ends with its parent even when that is killed, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@dataclass(slots=True)
class _Check:
    """What the pass over a manifest gathers."""

    manifest: Manifest
    rows: int = 0
    problem_count: int = 0
    told: list[str] = field(default_factory=list)  # the first MAX_REPORTED problems, as lines
    key_hashes: array[int] = field(default_factory=lambda: array("q"))
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    first_rows: dict[str, str] = field(default_factory=dict)  # further column -> where it is first seen
    extra_kinds: dict[str, ColumnType] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)  # of the files that have rows
    sources: list[int] = field(default_factory=list)  # their numbers

    def gather(self, chunk: Chunk, verdict: ChunkResult) -> None:
        if not self.sources or self.sources[-1] != chunk.source:
            self.sources.append(chunk.source)
            self.offsets.append(chunk.offset)
        self.rows += verdict.rows
        self.problem_count += verdict.problem_count
        room = MAX_REPORTED - len(self.told)
        self.told += [f"{self._file(chunk.source)}{line}" for line in verdict.told[:room]]
        self.key_hashes.frombytes(verdict.key_hashes)
        self.shapes.update(verdict.shapes)
        for name, kind in verdict.extra_kinds.items():
            self.first_rows.setdefault(name, f"{self._file(chunk.source)}row {verdict.extra_rows[name]}")
            self.extra_kinds[name] = common_type(self.extra_kinds.get(name, ColumnType.NULL), kind)
        if len(self.extra_kinds) > MAX_COLUMNS:
            where = next(islice(self.first_rows.values(), MAX_COLUMNS, None))
            raise UserError(
                f"The manifest {self.manifest.name} has more than {MAX_COLUMNS} columns that hv_batch does not know "
                f"(one more in {where}), and each would be a column of the dataset's metadata. Put them into one "
                "column as an object, or leave them out."
            )

    def _file(self, source: int) -> str:
        """What a row's number begins with in messages: the file, where there are several."""
        return f"{self.manifest.sources[source].name}: " if len(self.manifest.sources) > 1 else ""

    def _where(self, row: int) -> str:
        """Of a row numbered over all files."""
        at = bisect_left(self.offsets, row) - 1
        return f"{self._file(self.sources[at])}row {row - self.offsets[at]}"

    def report_equal_keys(self, writer: IndexWriter) -> None:
        """Equal hashes are confirmed by a second look at the rows; of a flood of them, only as many as will be told."""
        hashes = np.frombuffer(self.key_hashes, dtype=np.int64)
        hashes.sort()  # in place: their order is not needed any more
        repeats = hashes[1:][hashes[1:] == hashes[:-1]]
        suspects = set(np.unique(repeats)[:MAX_REPORTED].tolist())
        untold = len(repeats) - int(np.isin(repeats, list(suspects)).sum())
        first_rows: dict[str, str] = {}
        for row in read_rows(writer, ["row", "key", "id", "videos"]) if suspects else ():
            for key in sample_keys(row["key"].lower(), row["videos"]):
                if int.from_bytes(hash_key(key), "little", signed=True) not in suspects:
                    continue
                where = self._where(row["row"])
                if key in first_rows:
                    self.problem_count += 1
                    if len(self.told) < MAX_REPORTED:
                        self.told.append(f"{where}: {describe(_clash(row['id'], key, first_rows[key]))}")
                first_rows.setdefault(key, where)
        self.problem_count += untold

    def warn_of_typos(self) -> Iterator[str]:
        for name, where in self.first_rows.items():
            near = difflib.get_close_matches(name.lower(), KNOWN_COLUMNS, n=1, cutoff=TYPO_LIKENESS)
            if near:
                yield (
                    f"column {shorten(name)} (first in {where}) is not {near[0]!r} and is only carried into the "
                    f"metadata; rename it if {near[0]!r} is meant"
                )

    def describe(self) -> str:
        lines = [*self.told, *(f"note: {warning}" for warning in self.warn_of_typos())]
        if self.problem_count > len(self.told):
            lines.insert(len(self.told), f"and {self.problem_count - len(self.told)} more")
        listing = "\n".join(f"  - {line}" for line in lines)
        return (
            f"The manifest {self.manifest.name} has {self.problem_count} problem(s) in {self.rows} row(s); mend them:\n"
            f"{listing}"
        )


def _clash(row_id: str | None, key: str, first: str) -> FieldProblem:
    if row_id is None:
        allowed = f"rows that differ; {first} is the same. Give both an id or a seed, or one row num_videos"
        return FieldProblem("id", None, allowed)
    return FieldProblem("id", row_id, f"an id whose key {key!r} is its own; {first} has it, ignoring case")
