"""Judging one chunk of a manifest: everything that can be said of its rows without knowing the others.

The costly part of a check, and free of anything shared, so that it can be done in several processes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hv_batch.job.config.field_rules import find_fault
from hv_batch.job.manifest.extra_columns import ColumnType, merge_types
from hv_batch.job.manifest.formats import MAX_LINE_BYTES, ParsedRow
from hv_batch.job.manifest.reader import Chunk
from hv_batch.job.manifest.rows import Row, read_row
from hv_batch.job.manifest.samples import sample_keys
from hv_batch.job.user_input import shorten
from hv_batch.protocol import MAX_SEED, FieldProblem

MAX_REPORTED = 1000  # problems told in full; a manifest with more is broken as a whole
MAX_COLUMNS = 1000  # further columns of a manifest: each is one of the metadata, and held while the run goes on

PART_SCHEMA = pa.schema(
    {
        "row": pa.int64(),  # number over all files
        "key": pa.string(),
        "id": pa.string(),
        "videos": pa.int32(),
        "content": pa.string(),  # values and further columns, as JSON: read back, they are what the check has seen
    }
)


@dataclass(slots=True)
class ChunkResult:
    """What one chunk has told."""

    rows: int = 0
    samples: int = 0
    problem_count: int = 0
    told: list[str] = field(default_factory=list)  # the first MAX_REPORTED problems, with the row's number in its file
    key_hashes: bytes = b""  # 8 bytes a sample
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    extra_kinds: dict[str, ColumnType] = field(default_factory=dict)
    extra_rows: dict[str, int] = field(default_factory=dict)  # further column -> first row in the file
    part: bytes = b""  # of the index, a Parquet file of PART_SCHEMA

    def report(self, number: int, problem: FieldProblem) -> None:
        self.problem_count += 1
        if len(self.told) < MAX_REPORTED:
            self.told.append(f"row {number}: {describe(problem)}")


def describe(problem: FieldProblem) -> str:
    value = "is missing" if problem.value is None else f"= {shorten(problem.value)}"
    return f"{problem.field} {value}; allowed: {problem.allowed}"


def validate_chunk(chunk: Chunk, defaults: Mapping[str, Any], cfg_degree: int) -> ChunkResult:
    """Judge every row of a chunk (P6). `defaults` and `cfg_degree` (of `parallel`) are the config's."""
    found = ChunkBuilder()
    for number, written in chunk.rows():
        found.add_row(number, written, defaults, cfg_degree)
    return found.close(chunk.offset)


class ChunkBuilder:
    """What is gathered of a chunk."""

    def __init__(self) -> None:
        self.verdict = ChunkResult()
        self._columns: dict[str, list[Any]] = {name: [] for name in PART_SCHEMA.names}

    def add_row(self, number: int, written: ParsedRow, defaults: Mapping[str, Any], cfg_degree: int) -> None:
        verdict = self.verdict
        verdict.rows += 1
        if isinstance(written, FieldProblem):
            verdict.report(number, written)
            return
        row = read_row(number, written)
        content = _ENCODER.encode((row.values, row.extra))
        problems = row.problems or tuple(_find_more(row, len(content), defaults, cfg_degree))
        for problem in problems:
            verdict.report(number, problem)
        num_videos = _num_videos(row, defaults)
        for column, value in zip(self._columns.values(), (number, row.key, row.id, num_videos, content), strict=True):
            column.append(value)
        if not problems:
            given = row.values
            height, width = given.get("height", defaults["height"]), given.get("width", defaults["width"])
            verdict.shapes[height, width, given.get("num_frames", defaults["num_frames"])] += num_videos
        if len(verdict.extra_kinds) <= MAX_COLUMNS:
            merge_types(verdict.extra_kinds, row.extra)
            for name in row.extra:
                verdict.extra_rows.setdefault(name, number)

    def close(self, offset: int) -> ChunkResult:
        """The verdict, with rows numbered over all files, of which those before have `offset`."""
        columns = self._columns
        keys = chain.from_iterable(map(sample_keys, columns["key"], columns["videos"]))
        hashes = list(map(hash_key, keys))
        self.verdict.samples = len(hashes)
        self.verdict.key_hashes = b"".join(hashes)
        columns["row"] = [offset + number for number in columns["row"]]
        self.verdict.part = _part(columns)
        return self.verdict


def hash_key(key: str) -> bytes:
    """8 bytes of a key as a store without upper and lower case sees it; the same in every process."""
    return hashlib.blake2b(key.lower().encode(), digest_size=8).digest()


def _num_videos(row: Row, defaults: Mapping[str, Any]) -> int:
    """Also of a bad row, whose clash with another is worth telling too."""
    num_videos: int = row.values.get("num_videos", defaults["num_videos"])
    return 1 if row.problems and find_fault("num_videos", num_videos) else num_videos


def _find_more(row: Row, size: int, defaults: Mapping[str, Any], cfg_degree: int) -> Iterator[FieldProblem]:
    """What is wrong with a row whose every value is right."""
    num_videos = _num_videos(row, defaults)
    seed = row.values.get("seed", 0)  # a derived one has 31 bits
    if seed + num_videos - 1 > MAX_SEED:
        yield FieldProblem("seed", seed, f"at most 2^63 - {num_videos}, because video i is rendered with seed + i")
    cfg_scale = row.values.get("cfg_scale", defaults["cfg_scale"])
    if cfg_degree > 1 and cfg_scale <= 1.0:
        allowed = (
            f"above 1, because with parallel.cfg_degree = {cfg_degree} half of a group would compute nothing; render "
            "such rows with cfg_degree 1, in a run of their own"
        )
        yield FieldProblem("cfg_scale", cfg_scale, allowed)
    if size > MAX_LINE_BYTES:
        allowed = f"columns of together at most {MAX_LINE_BYTES >> 20} MiB as JSON"
        yield FieldProblem("row", f"{size / 2**20:.1f} MiB", allowed)


_ENCODER = json.JSONEncoder(default=repr)  # repr serves rows that are refused anyway


def _part(columns: Mapping[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    table = pa.table(columns, PART_SCHEMA)
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return sink.getvalue()
