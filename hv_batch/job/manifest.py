"""Lazy reading of a manifest: JSON Lines or Parquet, from any fsspec URL.

Rows come as plain dicts, a bounded number at a time, and nothing is judged here but whether a row can be read at all:
what its values may be is `hv_batch.job.samples`. A line that cannot be read does not end the pass, so that all bad rows
are reported together (P6).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from decimal import Decimal
from pathlib import PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hv_batch.job.inputs import open_input, shorten
from hv_batch.protocol import FieldProblem, UserError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")

CHUNK_BYTES = 1 << 20  # of one read: few enough round trips to an object store, little enough to hold
MAX_LINE_BYTES = 16 << 20  # a prompt is a few kB; a longer line means that the file is not JSON Lines
BATCH_ROWS = 256  # Parquet rows decoded at a time: a few MB even of long prompts


class Manifest:
    """The rows of one manifest file, as often as asked for.

    `storage_options` go to the fsspec filesystem of `url`.
    Raises UserError when the suffix is unknown; reading raises it when the file is missing, empty or damaged.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url
        self._storage_options = storage_options
        self._digest: str | None = None
        suffix = _suffix(url)
        if suffix not in JSONL_SUFFIXES + PARQUET_SUFFIXES:
            raise UserError(
                f"The manifest {url} has the suffix {suffix or '(none)'!r}; allowed: {', '.join(JSONL_SUFFIXES)} (one "
                f"JSON object a line) and {', '.join(PARQUET_SUFFIXES)}. Convert or rename it."
            )
        self._is_parquet = suffix in PARQUET_SUFFIXES

    @property
    def digest(self) -> str:
        """sha256 of the file's bytes, in hex. Known after the first complete pass over `rows`."""
        if self._digest is None:
            raise RuntimeError("the digest of a manifest is known only after a complete pass over its rows")
        return self._digest

    def rows(self) -> Iterator[tuple[int, dict[str, Any] | FieldProblem]]:
        """Numbered rows in file order, from 1; a FieldProblem stands for a row that cannot be read.

        JSON Lines: the number is the line's, blank lines are counted and skipped; BOM and CRLF are tolerated; NaN,
        Infinity, duplicate keys and lone surrogates are refused. Parquet: dates, times and timestamps (cut to
        microseconds) become ISO 8601 strings, durations seconds, binary values base64 text, decimals ints without a
        scale and floats with one, enumerations their values.

        Raises UserError when the file is missing, damaged, without rows, without a `prompt` column (Parquet), or not
        the bytes that an earlier pass read.
        """
        number = 0
        for number, row in self._read_parquet() if self._is_parquet else self._read_jsonl():
            yield number, row
        if number == 0:
            raise UserError(f"The manifest {self.url} has no rows. Give it at least one row with a prompt.")

    def _settle_digest(self, digest: str) -> None:
        if self._digest not in (None, digest):
            raise UserError(
                f"The manifest {self.url} changed while it was read. Leave a manifest as it is until its run has "
                "finished, and write new rows to a new file."
            )
        self._digest = digest

    def _read_jsonl(self) -> Iterator[tuple[int, dict[str, Any] | FieldProblem]]:
        sha256 = hashlib.sha256()
        with open_input("manifest", self.url, self._storage_options) as file:
            for number, line in enumerate(_lines(self.url, file, sha256), start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
                line = line.strip()
                if line:
                    yield number, _parse_line(line)
        self._settle_digest(sha256.hexdigest())

    def _read_parquet(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with open_input("manifest", self.url, self._storage_options) as file:
            try:
                # buffer_size streams the pages of a column chunk; without it a whole row group would be held
                parquet = pq.ParquetFile(file, buffer_size=CHUNK_BYTES, pre_buffer=False)
                self._check_columns(parquet.schema_arrow.names)
                number = 0
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                    for row in _cut_to_microseconds(batch).to_pylist():
                        number += 1
                        yield number, {name: _to_json(value) for name, value in row.items()}
            except (pa.ArrowException, OSError, ValueError) as error:
                raise UserError(
                    f"The manifest {self.url} cannot be read as Parquet: {error}. Write it again, or copy it again if "
                    "it was cut short."
                ) from error
            if self._digest is None:
                file.seek(0)
                sha256 = hashlib.sha256()
                while chunk := file.read(CHUNK_BYTES):
                    sha256.update(chunk)
                self._settle_digest(sha256.hexdigest())

    def _check_columns(self, names: list[str]) -> None:
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"The manifest {self.url} has two columns named {', '.join(twice)}. Rename or drop one.")
        if "prompt" not in names:
            raise UserError(
                f"The manifest {self.url} has no column `prompt`; it has {', '.join(names)}. Name the column with the "
                "prompts `prompt`."
            )


def _suffix(url: str) -> str:
    """Of the first link that has one in "simplecache::zip://rows.jsonl::s3://...", without "?version=2" of a URL."""
    links = [link.split("?")[0] if "://" in link else link for link in url.split("::")]
    return next(filter(None, (PurePosixPath(link).suffix.lower() for link in links)), "")


def _lines(url: str, file: IO[bytes], sha256: Any) -> Iterator[bytes]:
    """Lines without their ends, hashing the bytes on the way."""
    rest = b""
    while chunk := file.read(CHUNK_BYTES):
        sha256.update(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        if len(rest) > MAX_LINE_BYTES:
            raise UserError(
                f"The manifest {url} has a line of more than {MAX_LINE_BYTES >> 20} MiB; allowed: one JSON object a "
                "line. Write it as JSON Lines."
            )
    if rest:
        yield rest


def _parse_line(line: bytes) -> dict[str, Any] | FieldProblem:
    text = line.decode("utf-8", errors="replace")
    try:
        row = _DECODER.decode(line.decode("utf-8"))
        if b"\\u" in line:  # the only way to a lone surrogate, which no UTF-8 file can store
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        return FieldProblem("line", text, "text in UTF-8")
    except RecursionError:
        return FieldProblem("line", text, "a JSON object that is not nested so deeply")
    except ValueError as error:
        return FieldProblem("line", text, f"one JSON object a line ({error})")
    return row if isinstance(row, dict) else FieldProblem("line", text, "one JSON object a line")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null, or leave the key out")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shorten(next(name for name in names if names.count(name) > 1))} is given twice")
    return row


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _cut_to_microseconds(batch: pa.RecordBatch) -> pa.Table:
    """Python's datetime ends at microseconds, and a nanosecond column would need pandas to become Python values."""
    fields = [
        field.with_type(pa.timestamp("us", field.type.tz)) if pa.types.is_timestamp(field.type) else field
        for field in batch.schema
    ]
    return pa.Table.from_batches([batch]).cast(pa.schema(fields), safe=False)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(below) for below in value]
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value.isoformat() if hasattr(value, "isoformat") else value
