"""Validate the rows of one chunk of a manifest: all checks that need no other row.

This is the costly part of the manifest check. It shares no state, so chunks can be validated in several processes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hv_batch.job.config.field_rules import find_fault
from hv_batch.job.documents.fields import MAX_SAMPLES
from hv_batch.job.manifest.column_report import ColumnUses
from hv_batch.job.manifest.extra_columns import ColumnType, merge_types
from hv_batch.job.manifest.formats.limits import MAX_COLUMNS, MAX_LINE_BYTES, ParsedRow
from hv_batch.job.manifest.reader import Chunk
from hv_batch.job.manifest.rows import Row, read_row
from hv_batch.job.manifest.samples import sample_keys
from hv_batch.job.user_input import shorten
from hv_batch.protocol import UserError
from hv_batch.sampling_params import MAX_SEED, FieldProblem

HASH_BLOCK = 1 << 16  # keys whose hashes are joined at a time
MAX_REPORTED = 1000  # problems reported in full; a manifest with more has a systematic error

# A picture with a side of 16 has blocks of 16 pixels, which level 5 of HEVC forbids. libx265 4.3 uses level 5 from a
# side of 4224, and other versions may use it earlier.
HEVC_THIN_SIDE = 16
HEVC_MAX_LENGTH = 4160

PART_SCHEMA = pa.schema(
    {
        "row": pa.int64(),  # number over all files
        "key": pa.string(),
        "id": pa.string(),
        "videos": pa.int32(),
        "content": pa.string(),  # values and further columns as JSON: exactly what the check has validated
    }
)


@dataclass(slots=True)
class ChunkResult:
    """The result of validating one chunk."""

    rows: int = 0
    samples: int = 0
    problem_count: int = 0
    problem_lines: list[str] = field(default_factory=list)  # the first MAX_REPORTED; row numbers within the file
    key_hashes: bytes = b""  # 8 bytes a sample
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    loras: dict[str, int] = field(default_factory=dict)  # choice of LoRAs -> first row in the file
    extra_types: dict[str, ColumnType] = field(default_factory=dict)  # of the further columns
    columns: ColumnUses = field(default_factory=ColumnUses)
    part: bytes = b""  # a part of the index: a Parquet file of PART_SCHEMA
    part_rows: int = 0  # rows of the part: those that could be parsed

    def add_problem(self, number: int, problem: FieldProblem) -> None:
        self.problem_count += 1
        if len(self.problem_lines) < MAX_REPORTED:
            self.problem_lines.append(f"row {number}: {describe(problem)}")


def describe(problem: FieldProblem) -> str:
    value = "is missing" if problem.value is None else f"= {shorten(problem.value)}"
    return f"{problem.field} {value}; allowed: {problem.allowed}"


def validate_chunk(
    chunk: Chunk, defaults: Mapping[str, Any], cfg_degree: int, codec: str, carried: Collection[str] = ()
) -> ChunkResult:
    """Validate each row of a chunk (P6).

    `defaults`, `cfg_degree` (of `parallel`), `codec` (of `media`) and `carried` (`manifest.carry`) are the config's.
    """
    builder = ChunkBuilder(carried)
    for number, parsed in chunk.rows():
        builder.add_row(number, parsed, defaults, cfg_degree, codec)
    return builder.finish(chunk.offset)


class ChunkBuilder:
    """Collects the result of one chunk row by row."""

    def __init__(self, carried: Collection[str] = ()) -> None:
        self.result = ChunkResult()
        self._carried = frozenset(carried)
        self._samples = 0
        self._columns: dict[str, list[Any]] = {name: [] for name in PART_SCHEMA.names}

    def add_row(self, number: int, parsed: ParsedRow, defaults: Mapping[str, Any], cfg_degree: int, codec: str) -> None:
        result = self.result
        result.rows += 1
        if isinstance(parsed, FieldProblem):
            result.add_problem(number, parsed)
            return
        row = read_row(number, parsed)
        content = _ENCODER.encode((row.values, row.extra))
        problems = row.problems or tuple(_find_row_problems(row, len(content), defaults, cfg_degree, codec))
        has_other_prompt = result.columns.add(number, parsed, row, self._carried)
        for problem in problems:
            if not (has_other_prompt and problem.field == "prompt"):  # reported once for its column
                result.add_problem(number, problem)
        num_videos = _num_videos(row, defaults)
        self._samples += num_videos
        refuse_samples(self._samples)  # before their keys are hashed
        for column, value in zip(self._columns.values(), (number, row.key, row.id, num_videos, content), strict=True):
            column.append(value)
        if not problems:
            given = row.values
            height, width = given.get("height", defaults["height"]), given.get("width", defaults["width"])
            result.shapes[height, width, given.get("num_frames", defaults["num_frames"])] += num_videos
            if given.get("lora"):
                result.loras.setdefault(given["lora"], number)
        if len(result.extra_types) <= MAX_COLUMNS:
            merge_types(result.extra_types, row.extra)

    def finish(self, offset: int) -> ChunkResult:
        """The result, with an index part whose rows are numbered over all files. `offset`: rows of the files before."""
        columns = self._columns
        keys = chain.from_iterable(map(sample_keys, columns["key"], columns["videos"]))
        hashes = bytearray()
        while block := b"".join(map(hash_key, islice(keys, HASH_BLOCK))):
            hashes += block
        self.result.samples = sum(columns["videos"])
        self.result.key_hashes = bytes(hashes)
        columns["row"] = [offset + number for number in columns["row"]]
        self.result.part, self.result.part_rows = encode_part(pa.table(columns, PART_SCHEMA)), len(columns["row"])
        return self.result


def refuse_samples(samples: int) -> None:
    """Raise UserError if a manifest has too many samples. A row of a few bytes may ask for ten thousand."""
    if samples > MAX_SAMPLES:
        raise UserError(
            f"The manifest has more than {MAX_SAMPLES:,} samples, which is the most that one run can have. Reduce "
            "num_videos, or split the manifest, and render each part into an output root of its own."
        )


def hash_key(key: str) -> bytes:
    """An 8-byte hash of the key, ignoring case as some stores do; the same in every process."""
    return hashlib.blake2b(key.lower().encode(), digest_size=8).digest()


def _num_videos(row: Row, defaults: Mapping[str, Any]) -> int:
    """The row's number of videos; 1 if it is invalid, so that the keys of an invalid row are still compared."""
    num_videos: int = row.values.get("num_videos", defaults["num_videos"])
    return 1 if row.problems and find_fault("num_videos", num_videos) else num_videos


def _find_row_problems(
    row: Row, size: int, defaults: Mapping[str, Any], cfg_degree: int, codec: str
) -> Iterator[FieldProblem]:
    """Problems of a row whose single values are valid. `size`: characters of the row as JSON."""
    num_videos = _num_videos(row, defaults)
    seed = row.values.get("seed", 0)  # a derived seed has 31 bits, so it cannot be too large
    if seed + num_videos - 1 > MAX_SEED:
        yield FieldProblem("seed", seed, f"at most 2^63 - {num_videos}, because video i is rendered with seed + i")
    if codec == "h265":
        yield from _find_hevc_problem({**defaults, **row.values})
    cfg_scale = row.values.get("cfg_scale", defaults["cfg_scale"])
    if cfg_degree > 1 and cfg_scale <= 1.0:
        allowed = (
            f"above 1, because with parallel.cfg_degree = {cfg_degree} half of a group would compute nothing; render "
            "such rows in a separate run with cfg_degree 1"
        )
        yield FieldProblem("cfg_scale", cfg_scale, allowed)
    if size > MAX_LINE_BYTES:
        allowed = f"columns of together at most {MAX_LINE_BYTES >> 20} MiB as JSON"
        yield FieldProblem("row", f"{size / 2**20:.1f} MiB", allowed)


_ENCODER = json.JSONEncoder(default=repr)  # repr is used only for rows that have problems anyway


def encode_part(table: pa.Table) -> bytes:
    """A part of the index as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return sink.getvalue()


def _find_hevc_problem(values: Mapping[str, Any]) -> Iterator[FieldProblem]:
    """A size that libx265 refuses. One frame is a PNG, which has any size."""
    (short, narrow), (long, wide) = sorted((values[name], name) for name in ("height", "width"))
    if values["num_frames"] > 1 and short <= HEVC_THIN_SIDE and long > HEVC_MAX_LENGTH:
        allowed = (
            f"at most {HEVC_MAX_LENGTH} with {narrow} {short} and media.codec = h265, because a larger picture needs "
            "blocks of 32 pixels; render such rows in a separate run with another codec"
        )
        yield FieldProblem(wide, long, allowed)
