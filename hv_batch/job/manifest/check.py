"""Check a whole manifest before the run starts, and write the index of its samples.

One streaming pass, whose chunks are validated in several processes. Memory is bounded (P7): the check holds 8 bytes for
each sample, to detect duplicate keys, and the text of at most MAX_REPORTED problems. All problems are reported together
(P6).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.documents.fields import MAX_SHARD_SAMPLES
from hv_batch.job.manifest.column_mapping import ColumnMapping
from hv_batch.job.manifest.column_report import ColumnReport, ColumnUses
from hv_batch.job.manifest.duplicates import Repeats, resolve_repeats
from hv_batch.job.manifest.extra_columns import ColumnType, common_type
from hv_batch.job.manifest.formats.limits import MAX_COLUMNS
from hv_batch.job.manifest.index import Index, IndexWriter, read_rows
from hv_batch.job.manifest.reader import Chunk, Manifest
from hv_batch.job.manifest.row_validation import (
    MAX_REPORTED,
    ChunkResult,
    describe,
    hash_key,
    refuse_samples,
    validate_chunk,
)
from hv_batch.job.manifest.samples import ManifestSummary, sample_keys
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.sampling_params import NO_LORA, FieldProblem, parse_lora

MAX_PROCESSES = 8  # the reading process could feed twenty, but a head node has other users
INLINE_CHUNKS = 2  # a manifest with no more chunks is validated faster than processes start
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def check_manifest(manifest: Manifest, config: RunConfig, scratch: Store) -> Index:
    """Validate each row (P6) and write the index of all samples into `scratch`, a temporary store.

    Raises UserError with every invalid row: its field, its value and the allowed values.
    """
    writer = IndexWriter(scratch)
    check = _ManifestCheck(manifest)
    for chunk, result in _validate_chunks(manifest.chunks(ColumnMapping.of(config.manifest.columns)), config):
        check.add(chunk, result)
        if result.samples:
            writer.add(result.part, result.part_rows, result.samples)
    if check.rows == 0:
        raise UserError(manifest.no_rows_message())
    check.find_unknown_loras(config)
    check.find_duplicate_keys(writer, config)
    report = check.column_report(config)
    problems = [*report.problems(), *check.problem_lines]
    if problems:
        raise UserError(check.describe(problems, report))
    samples = sum(part.samples for part in writer.parts)
    if (of_shard := min(samples, config.output.shard_size)) > MAX_SHARD_SAMPLES:
        raise UserError(
            f"output.shard_size: a shard would have {of_shard:,} samples; allowed: at most {MAX_SHARD_SAMPLES:,}, "
            "because the records of a shard are held in memory. Set a smaller output.shard_size, such as 256."
        )
    summary = ManifestSummary(
        digest=manifest.digest,
        rows=check.rows,
        samples=samples,
        shards=-(-samples // config.output.shard_size),
        shapes=dict(check.shapes),
        extra_kinds=dict(check.extra_types),
        warnings=check.notes(report),
    )
    return writer.finish(summary, manifest, config)


def _validate_chunks(chunks: Iterator[Chunk], config: RunConfig) -> Iterator[tuple[Chunk, ChunkResult]]:
    """The results in the order of the chunks. Only a few chunks are held at a time."""
    rules = (
        config.defaults.model_dump(),
        config.parallel.cfg_degree,
        config.media.codec,
        frozenset(config.manifest.carry),
    )
    first = list(islice(chunks, INLINE_CHUNKS + 1))
    processes = min(MAX_PROCESSES, os.cpu_count() or 1)
    if len(first) <= INLINE_CHUNKS or processes == 1:
        for chunk in chain(first, chunks):
            yield chunk, validate_chunk(chunk, *rules)
        return
    # "spawn", because this process has threads and must not fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_exit_with_parent)
    pending: deque[tuple[Chunk, Future[ChunkResult]]] = deque()
    try:
        for chunk in chain(first, chunks):
            with _signals_held_back():
                future = pool.submit(validate_chunk, chunk, *rules)
            pending.append((chunk, future))
            if len(pending) > processes + 1:
                yield _next_result(pending)
        while pending:
            yield _next_result(pending)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that validated rows of the manifest was killed, probably because the machine ran out of memory. "
            f"Run the command on a machine with more memory: {processes} such processes take about 300 MB each."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _next_result(pending: deque[tuple[Chunk, Future[ChunkResult]]]) -> tuple[Chunk, ChunkResult]:
    chunk, future = pending.popleft()
    return chunk, future.result()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Block the stop signals in the processes that are started within the block, until `_exit_with_parent` runs there.

    In this process they are delivered at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent() -> None:
    """Make a validating process exit with its parent, even if that is killed, and leave signals to the parent.

    A signal to the process group must not end this process: the parent would take that for a lack of memory.
    """
    os.setpgid(0, 0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # discards one that came before the process had a group of its own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this function runs in a child process

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


@dataclass(slots=True)
class _ManifestCheck:
    """The merged results of all chunks."""

    manifest: Manifest
    rows: int = 0
    samples: int = 0
    problem_count: int = 0
    problem_lines: list[str] = field(default_factory=list)  # the first MAX_REPORTED problems
    key_hashes: array[int] = field(default_factory=lambda: array("q"))
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    loras: dict[str, str] = field(default_factory=dict)  # choice of LoRAs -> its first row
    columns: ColumnUses = field(default_factory=ColumnUses)
    left_out: dict[str, None] = field(default_factory=dict)  # columns of binary data, in order
    repeats: Repeats = field(default_factory=Repeats)
    extra_types: dict[str, ColumnType] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)  # of the files that have rows
    sources: list[int] = field(default_factory=list)  # indices of these files in `manifest.sources`

    def add(self, chunk: Chunk, result: ChunkResult) -> None:
        """Merge the result of the next chunk. Raises UserError if there are too many samples or further columns."""
        if not self.sources or self.sources[-1] != chunk.source:
            self.sources.append(chunk.source)
            self.offsets.append(chunk.offset)
        self.rows += result.rows
        self.samples += result.samples
        refuse_samples(self.samples)
        self.problem_count += result.problem_count
        room = MAX_REPORTED - len(self.problem_lines)
        self.problem_lines += [f"{self._file_prefix(chunk.source)}{line}" for line in result.problem_lines[:room]]
        self.key_hashes.frombytes(result.key_hashes)
        self.shapes.update(result.shapes)
        self.columns.merge(result.columns, self._file_prefix(chunk.source))
        self.left_out.update(dict.fromkeys(chunk.left_out))
        for lora, row in result.loras.items():
            self.loras.setdefault(lora, f"{self._file_prefix(chunk.source)}row {row}")
        for name, type_ in result.extra_types.items():
            self.extra_types[name] = common_type(self.extra_types.get(name, ColumnType.NULL), type_)
        if len(self.extra_types) > MAX_COLUMNS:
            where = next(islice(self.columns.first_rows.values(), MAX_COLUMNS, None))
            raise UserError(
                f"The manifest {self.manifest.name} has more than {MAX_COLUMNS} columns that are not columns of "
                f"hv_batch (the first beyond the limit is in {where}). Each would become a column of the dataset's "
                "metadata. Combine them into one column that holds an object, or remove them."
            )

    def _file_prefix(self, source: int) -> str:
        """What precedes a row number in messages: the file's name, if the manifest has several files."""
        return f"{self.manifest.sources[source].name}: " if len(self.manifest.sources) > 1 else ""

    def _location(self, row: int) -> str:
        """File and row number of a row that is numbered over all files."""
        at = bisect_left(self.offsets, row) - 1
        return f"{self._file_prefix(self.sources[at])}row {row - self.offsets[at]}"

    def find_unknown_loras(self, config: RunConfig) -> None:
        """Report each choice of LoRAs that is not in the config, once, with its first row."""
        known = config.model.loras
        for lora, where in self.loras.items():
            if not parse_lora(lora).keys() <= known.keys():
                allowed = f"{NO_LORA}, or names of the config's model.loras, which has {', '.join(known) or 'none'}"
                remedy = "Add the file there, or carry the column as data with --column lora="
                problem = FieldProblem("lora", lora, f"{allowed}. {remedy}")
                self.problem_count += 1
                self.problem_lines.append(f"{where}, the first with this value: {describe(problem)}")

    def find_duplicate_keys(self, writer: IndexWriter, config: RunConfig) -> None:
        """Number or drop repeated rows, and report samples with equal keys.

        Keys with equal hashes are read again from the index and compared. If there are more than MAX_REPORTED such
        hashes, the others are only counted.
        """
        hashes = np.frombuffer(self.key_hashes, dtype=np.int64)
        hashes.sort()  # in place, which is possible because the order is no longer needed
        repeated = hashes[1:][hashes[1:] == hashes[:-1]]
        if len(repeated) and config.manifest.duplicates != "refuse":
            self.repeats = resolve_repeats(writer, hashes, config)
            repeated = self.repeats.unresolved
            self.shapes.subtract(self.repeats.dropped_shapes)
        candidates = set(np.unique(repeated)[:MAX_REPORTED].tolist())
        uncompared = len(repeated) - int(np.isin(repeated, list(candidates)).sum())
        first_rows: dict[str, tuple[str, str | None]] = {}  # key -> place and id
        for row in read_rows(writer, ["row", "key", "id", "videos"]) if candidates else ():
            for key in sample_keys(row["key"].lower(), row["videos"]):
                if int.from_bytes(hash_key(key), "little", signed=True) not in candidates:
                    continue
                where = self._location(row["row"])
                if key in first_rows:
                    self.problem_count += 1
                    if len(self.problem_lines) < MAX_REPORTED:
                        problem = _duplicate_key(row["id"], key, *first_rows[key])
                        self.problem_lines.append(f"{where}: {describe(problem)}")
                first_rows.setdefault(key, (where, row["id"]))
        self.problem_count += uncompared

    def column_report(self, config: RunConfig) -> ColumnReport:
        folders = (source.unused_partitions.items() for source in self.manifest.sources)
        unused = {f"{name}={value}": None for name, value in chain.from_iterable(folders)}
        return ColumnReport(self.columns, config.manifest, config.defaults.model_dump(), self.left_out, unused)

    def notes(self, report: ColumnReport) -> tuple[str, ...]:
        first = self.repeats.first_row
        return (*report.notes(), *([self.repeats.note(self._location(first))] if first else []))

    def describe(self, problems: list[str], report: ColumnReport) -> str:
        count = self.problem_count + len(problems) - len(self.problem_lines)
        lines = [*problems, *(f"note: {note}" for note in self.notes(report))]
        if count > len(problems):
            lines.insert(len(problems), f"and {count - len(problems)} more")
        listing = "\n".join(f"  - {line}" for line in lines)
        return (
            f"The manifest {self.manifest.name} has {count} problem(s) in {self.rows} row(s). Fix them and run the "
            f"command again:\n{listing}"
        )


def _duplicate_key(row_id: str | None, key: str, first: str, first_id: str | None) -> FieldProblem:
    if row_id is None:
        allowed = (
            f"rows that differ; {first} is the same. Give both an id or another seed, use one row with num_videos, or "
            "render only the first with --duplicates drop"
        )
        return FieldProblem("id", None, allowed)
    if row_id == first_id:
        return FieldProblem("id", row_id, f"an id that no other row has; {first} has it too")
    if first_id is not None and row_id.lower() == first_id.lower():
        allowed = f"an id that differs not only by case; {first} has {first_id!r}, and some stores ignore case in names"
        return FieldProblem("id", row_id, allowed)
    allowed = f"an id whose files have other names; the files of {first} (id {first_id!r}) are named {key!r} too"
    return FieldProblem("id", row_id, allowed)
