"""Read a manifest lazily: files of all `formats`, from any fsspec URL, in one fixed order.

A manifest is read once, to validate it (row_validation.py) and to write the index from which the run reads its samples
(index.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import pyarrow as pa

from hv_batch.job.config.field_rules import parse_text
from hv_batch.job.manifest.column_mapping import NO_MAPPING, ColumnMapping
from hv_batch.job.manifest.files import (
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    TSV_SUFFIXES,
    Source,
    changed_message,
    find_sources,
    refuse_own_outputs,
)
from hv_batch.job.manifest.formats.delimited import TAB, CsvRecords, split_csv
from hv_batch.job.manifest.formats.json_array import JsonElements, split_json_array
from hv_batch.job.manifest.formats.json_lines import JsonLines, split_json_lines
from hv_batch.job.manifest.formats.limits import NumberedRows
from hv_batch.job.manifest.formats.parquet_rows import ArrowRows, LongRow, split_parquet
from hv_batch.job.manifest.formats.prompt_list import PromptLines, split_prompt_list
from hv_batch.job.redaction import public_url
from hv_batch.job.user_input import shorten
from hv_batch.protocol import UserError
from hv_batch.sampling_params import FieldProblem

Content = JsonLines | JsonElements | CsvRecords | PromptLines | ArrowRows | LongRow

HASH_BYTES = 1 << 20  # of one read when only hashing: few round trips to an object store, little memory


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one file, not parsed yet; picklable, so that another process can parse them."""

    source: int  # index of the file in `Manifest.sources`
    offset: int  # last row number of the preceding files
    partitions: Mapping[str, str | None]  # with the names under which they are read
    content: Content

    @property
    def left_out(self) -> tuple[str, ...]:
        """Columns of the file that are not read, because they hold media or other binary data."""
        return self.content.left_out if isinstance(self.content, ArrowRows) else ()

    def rows(self) -> NumberedRows:
        """The parsed rows, numbered within their file, with the columns given by its folders."""
        if not self.partitions:
            yield from self.content.rows()
            return
        columns = {name: None if text is None else parse_text(name, text) for name, text in self.partitions.items()}
        for number, row in self.content.rows():
            if not isinstance(row, FieldProblem):
                row = _add_partitions(row, columns, self.partitions)
            yield number, row


class Manifest:
    """The rows of a manifest: of all files that the given paths, URLs, globs and folders refer to.

    `storage_options` are passed to the fsspec filesystem of each URL. Raises UserError if a URL is blank.
    """

    def __init__(self, urls: str | Sequence[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self._urls = (urls,) if isinstance(urls, str) else tuple(urls)
        if not self._urls or not all(url.strip() for url in self._urls):
            raise UserError("The manifest is blank. Give --manifest the path or URL of a file, folder or glob.")
        self._storage_options = storage_options
        self._digests: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The URLs as the user wrote them, for messages."""
        return ", ".join(self._urls)

    @property
    def public_urls(self) -> str | list[str]:
        """The URLs without secrets, for run.json: one URL, or a list."""
        urls = list(map(public_url, self._urls))
        return urls[0] if len(urls) == 1 else urls

    def refuse_own_outputs(self, root: str, keys: Iterable[str]) -> None:
        """Raise UserError if a folder or glob of the manifest would read objects of the output root (see `files`)."""
        refuse_own_outputs(self._urls, root, keys)

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The files, sorted by name, with their versions at the first access. Raises UserError (see `find_sources`)."""
        return find_sources(self._urls, self._storage_options)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the file's bytes; for several files, of their digests in order with their partitions.

        Available after a complete pass over `chunks` or `rows`, or after `read_digest`; else raises RuntimeError.
        """
        if len(self._digests) < len(self.sources):
            raise RuntimeError("the digest of a manifest is available only after a complete pass over its rows")
        files = [[self._digests[source.name], source.partitions] for source in self.sources]
        if len(files) == 1 and not files[0][1]:
            return self._digests[self.sources[0].name]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def read_digest(self) -> str:
        """Compute the digest from the bytes without parsing them, which is much faster."""
        for source in self.sources:
            with source.open() as file:
                self._record_digest(source, _hash_rest(file, hashlib.sha256()))
        return self.digest

    def rows(self) -> NumberedRows:
        """All rows in order, numbered from 1 over all files; a FieldProblem stands for a row that cannot be parsed.

        - JSON Lines: the row number is the line number; blank lines are counted and skipped. BOM and CRLF are accepted;
          NaN, Infinity, duplicate keys and lone surrogates are not.
        - CSV: the row number is the number of the row's first line. An empty cell is a null; cells of number columns
          become numbers, all others stay text.
        - TSV: as CSV, with tabs in place of commas.
        - JSON: the row number is the position in the array.
        - Text: the row number is the line number; a line is a prompt, see `formats.prompt_list`.
        - Parquet: dates, times and timestamps (truncated to microseconds) become ISO 8601 strings, durations seconds,
          decimals ints (scale 0) or floats, enumerations their values. Columns of binary data are not read.

        Raises UserError if a file is missing, damaged, without a `prompt` column (CSV, TSV, Parquet) or changed since
        an earlier pass, or if there is no row at all.
        """
        is_empty = True
        for chunk in self.chunks():
            for number, row in chunk.rows():
                is_empty = False
                yield chunk.offset + number, row
        if is_empty:
            raise UserError(self.no_rows_message())

    def chunks(self, columns: ColumnMapping = NO_MAPPING) -> Iterator[Chunk]:
        """The same rows in chunks of a few MB, not parsed yet, with renamed columns.

        Raises UserError as `rows` does, except for no row.
        """
        offset = 0
        for index, source in enumerate(self.sources):
            last = 0
            with _read_errors_as_user_error(source), source.open() as file:
                folders = source.partitions
                partitions = dict(zip(columns.rename(tuple(folders)), folders.values(), strict=True))
                for content in self._split(source, file, columns):
                    yield Chunk(index, offset, partitions, content)
                    last = content.last
            offset += last

    def no_rows_message(self) -> str:
        return f"The manifest {self.name} has no rows. Give it at least one row with a prompt."

    def _split(self, source: Source, file: IO[bytes], columns: ColumnMapping) -> Iterator[Content]:
        sha256 = hashlib.sha256()
        if source.suffix in PARQUET_SUFFIXES:
            digest = self._digests.get(source.name) or _hash_rest(file, sha256)
            file.seek(0)
            yield from split_parquet(file, columns)
            self._record_digest(source, digest)
            return
        hashing: Any = _HashingFile(file, sha256)
        if source.compression:
            hashing = pa.CompressedInputStream(pa.PythonFile(hashing, mode="r"), source.compression)
        yield from _split_text(source.suffix, hashing, columns)
        self._record_digest(source, _hash_rest(file, sha256))

    def _record_digest(self, source: Source, digest: str) -> None:
        if self._digests.setdefault(source.name, digest) != digest:
            raise UserError(changed_message(source.name))


def _split_text(suffix: str, file: IO[bytes], columns: ColumnMapping) -> Iterator[Content]:
    if suffix in CSV_SUFFIXES:
        return split_csv(file, columns)
    if suffix in TSV_SUFFIXES:
        return split_csv(file, columns, TAB)
    if suffix in JSON_SUFFIXES:
        return split_json_array(file, columns)
    return split_prompt_list(file) if suffix in TEXT_SUFFIXES else split_json_lines(file, columns)


class _HashingFile:
    """A file that hashes the bytes read from it, with the methods that Arrow needs."""

    closed = False

    def __init__(self, file: IO[bytes], sha256: Any) -> None:
        self._file = file
        self._sha256 = sha256

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._sha256.update(data)
        return data

    def close(self) -> None:
        """Leave the file open, because the caller of `Manifest._split` closes it."""


def _hash_rest(file: IO[bytes], sha256: Any) -> str:
    while data := file.read(HASH_BYTES):
        sha256.update(data)
    digest: str = sha256.hexdigest()
    return digest


@contextmanager
def _read_errors_as_user_error(source: Source) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        format_name = source.compression or source.suffix.lstrip(".")
        raise UserError(
            f"The manifest {source.name} cannot be read as {format_name}: {str(error).rstrip('.')}. Fix the file, or "
            "copy it again if it is truncated."
        ) from error


def _add_partitions(
    row: dict[str, Any], columns: Mapping[str, Any], texts: Mapping[str, str | None]
) -> dict[str, Any] | FieldProblem:
    for name, value in columns.items():
        own = row.get(name)
        if own is not None and own != value and str(own) != texts[name]:
            return FieldProblem(name, own, f"{shorten(value)}, the value of the folder {name}=..., or no value")
    return {**row, **columns}
