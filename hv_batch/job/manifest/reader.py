"""Lazy reading of a manifest: JSON Lines, CSV or Parquet files, from any fsspec URL, in one fixed order.

A manifest is read once, to check it and to write the index that the run reads from (`hv_batch.job.manifest.index`). What its
values may be is `hv_batch.job.manifest.rows`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import pyarrow as pa

from hv_batch.job.config.field_rules import parse_text
from hv_batch.job.manifest.files import CSV_SUFFIXES, PARQUET_SUFFIXES, Source, changed, find_sources
from hv_batch.job.manifest.formats import Content, NumberedRows, cut_csv, cut_json_lines, cut_parquet
from hv_batch.job.redaction import public_url
from hv_batch.job.user_input import shorten
from hv_batch.protocol import FieldProblem, UserError

HASH_BYTES = 1 << 20  # of one read when only hashing: few round trips to an object store, little to hold


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive rows of one file; picklable, so that another process may parse them."""

    source: int  # index of the file in `Manifest.sources`
    offset: int  # last row number of all files before
    partitions: Mapping[str, str | None]
    content: Content

    def rows(self) -> NumberedRows:
        """Rows numbered within their file, with the columns that its folders stand for."""
        if not self.partitions:
            yield from self.content.rows()
            return
        columns = {name: None if text is None else parse_text(name, text) for name, text in self.partitions.items()}
        for number, row in self.content.rows():
            if not isinstance(row, FieldProblem):
                row = _join_partitions(row, columns, self.partitions)
            yield number, row


class Manifest:
    """The rows of one manifest: of a file, or of all files that some paths, URLs, globs and folders mean.

    `storage_options` go to the fsspec filesystem of every URL.
    """

    def __init__(self, urls: str | Sequence[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self._urls = (urls,) if isinstance(urls, str) else tuple(urls)
        self._storage_options = storage_options
        self._digests: dict[str, str] = {}

    @property
    def name(self) -> str:
        """What the user wrote."""
        return ", ".join(self._urls)

    @property
    def public_urls(self) -> str | list[str]:
        """What may be written down to find it again: one URL, or several."""
        urls = list(map(public_url, self._urls))
        return urls[0] if len(urls) == 1 else urls

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The files, sorted by name, as they were when first asked for. Raises UserError as `find_sources`."""
        return find_sources(self._urls, self._storage_options)

    @property
    def digest(self) -> str:
        """Hex sha256 of the file's bytes; of several files, of their digests in order with their partitions.

        Known after a complete pass over `chunks` or `rows`, or after `read_digest`.
        """
        if len(self._digests) < len(self.sources):
            raise RuntimeError("the digest of a manifest is known only after a complete pass over its rows")
        files = [[self._digests[source.name], source.partitions] for source in self.sources]
        if len(files) == 1 and not files[0][1]:
            return self._digests[self.sources[0].name]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def read_digest(self) -> str:
        """The digest from the bytes alone, which is much faster than to parse them."""
        for source in self.sources:
            with source.open() as file:
                self._settle_digest(source, _hash_rest(file, hashlib.sha256()))
        return self.digest

    def rows(self) -> NumberedRows:
        """All rows in order, numbered from 1 over all files; a FieldProblem stands for a row that cannot be read.

        JSON Lines: the number is the line's, blank lines are counted and skipped; BOM and CRLF are tolerated; NaN,
        Infinity, duplicate keys and lone surrogates are refused. CSV: the number is that of the line a row begins on;
        an empty cell is a null, cells of the number columns become numbers, all others stay text. Parquet: dates, times
        and timestamps (cut to microseconds) become ISO 8601 strings, durations seconds, binary values base64 text,
        decimals ints without a scale and floats with one, enumerations their values.

        Raises UserError when a file is missing, damaged, without a `prompt` column (CSV, Parquet), or not the bytes
        that were there before; also when there is no row at all.
        """
        is_empty = True
        for chunk in self.chunks():
            for number, row in chunk.rows():
                is_empty = False
                yield chunk.offset + number, row
        if is_empty:
            raise UserError(self.without_rows())

    def chunks(self) -> Iterator[Chunk]:
        """The same rows in pieces of a few MB, not parsed yet. Raises UserError as `rows`, but none for no row."""
        offset = 0
        for index, source in enumerate(self.sources):
            last = 0
            with _damage_explained(source), source.open() as file:
                for content in self._cut(source, file):
                    yield Chunk(index, offset, source.partitions, content)
                    last = content.last
            offset += last

    def without_rows(self) -> str:
        return f"The manifest {self.name} has no rows. Give it at least one row with a prompt."

    def _cut(self, source: Source, file: IO[bytes]) -> Iterator[Content]:
        sha256 = hashlib.sha256()
        if source.suffix in PARQUET_SUFFIXES:
            digest = self._digests.get(source.name) or _hash_rest(file, sha256)
            file.seek(0)
            yield from cut_parquet(file)
            self._settle_digest(source, digest)
            return
        hashing: Any = _Hashing(file, sha256)
        cut = cut_csv if source.suffix in CSV_SUFFIXES else cut_json_lines
        if source.compression:
            yield from cut(pa.CompressedInputStream(pa.PythonFile(hashing, mode="r"), source.compression))
        else:
            yield from cut(hashing)
        self._settle_digest(source, _hash_rest(file, sha256))

    def _settle_digest(self, source: Source, digest: str) -> None:
        if self._digests.setdefault(source.name, digest) != digest:
            raise UserError(changed(source.name))


class _Hashing:
    """A file that hashes what is read of it; all that Arrow asks of one."""

    closed = False

    def __init__(self, file: IO[bytes], sha256: Any) -> None:
        self._file = file
        self._sha256 = sha256

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._sha256.update(data)
        return data

    def close(self) -> None:
        """The file belongs to whoever opened it."""


def _hash_rest(file: IO[bytes], sha256: Any) -> str:
    while data := file.read(HASH_BYTES):
        sha256.update(data)
    digest: str = sha256.hexdigest()
    return digest


@contextmanager
def _damage_explained(source: Source) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        kind = source.compression or source.suffix.lstrip(".")
        raise UserError(
            f"The manifest {source.name} cannot be read as {kind}: {str(error).rstrip('.')}. Mend it there, or copy "
            "it again if it was cut short."
        ) from error


def _join_partitions(
    row: dict[str, Any], columns: Mapping[str, Any], texts: Mapping[str, str | None]
) -> dict[str, Any] | FieldProblem:
    for name, value in columns.items():
        own = row.get(name)
        if own is not None and own != value and str(own) != texts[name]:
            return FieldProblem(name, own, f"{shorten(value)}, as the folder of its file says, or no value")
    return {**row, **columns}
