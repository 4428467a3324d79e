"""JSON documents (.json): an array of rows, or an object whose only key `data` holds such an array.

The array is cut into the texts of its rows one by one, so that a document of many GB is read in bounded memory. A row
is an object, or a text, which is a prompt.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from hv_batch.job.manifest.column_mapping import NO_MAPPING, ColumnMapping
from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.formats.json_lines import parse_json
from hv_batch.job.manifest.formats.limits import NumberedRows
from hv_batch.job.user_input import shorten

ROWS_KEY = "data"
ALLOWED = f'an array of rows, [{{"prompt": "..."}}, ...], or an object with such an array as its only key, "{ROWS_KEY}"'
_BLANKS = " \t\r\n"
_NO_ROW = "an object with a prompt, or a prompt as text"


@dataclass(frozen=True, slots=True)
class JsonElements:
    """The texts of consecutive rows. The row number is the position in the array, from 1."""

    first: int
    texts: tuple[str, ...]
    columns: ColumnMapping

    def rows(self) -> NumberedRows:
        for number, text in enumerate(self.texts, start=self.first):
            if text.startswith('"'):
                text = f'{{"prompt": {text}}}'
            yield number, self.columns.rename_row(parse_json(text.encode(), _NO_ROW))

    @property
    def last(self) -> int:
        return self.first + len(self.texts) - 1


def split_json_array(file: IO[bytes], columns: ColumnMapping = NO_MAPPING) -> Iterator[JsonElements]:
    """Split a document into the texts of its rows. Raises ValueError if it is not such a document."""
    document = _Document(file)
    is_wrapped = document.next_char() == "{"
    if is_wrapped:
        document.skip("{")
        if document.next_char() != '"':
            raise ValueError(f"it is an object without keys; allowed: {ALLOWED}")
        if (key := json.loads(document.take_value())) != ROWS_KEY:
            raise ValueError(f"it is an object with the key {shorten(key)}; allowed: {ALLOWED}")
        document.skip(":")
    first, texts, size = 1, [], 0
    for text in _elements(document):
        texts.append(text)
        size += len(text)
        if size > limits.CHUNK_BYTES or len(texts) == limits.CHUNK_ROWS:
            yield JsonElements(first, tuple(texts), columns)
            first, texts, size = first + len(texts), [], 0
    if texts:
        yield JsonElements(first, tuple(texts), columns)
    if is_wrapped:
        if document.next_char() == ",":
            raise ValueError(f"it has keys beside `{ROWS_KEY}`, which would be lost; allowed: {ALLOWED}")
        document.skip("}")
    if document.next_char():
        raise ValueError(f"it goes on after the array, at character {document.position}; allowed: {ALLOWED}")


def _elements(document: _Document) -> Iterator[str]:
    """The texts of the elements of the array that comes next."""
    document.skip("[")
    if document.next_char() == "]":
        document.skip("]")
        return
    while True:
        yield document.take_value()
        if document.next_char() == "]":
            document.skip("]")
            return
        document.skip(",")


class _Document:
    """The text of a JSON document, of which a few MB are held at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._at = 0
        self._before = 0  # characters that were dropped
        self._is_complete = False

    @property
    def position(self) -> int:
        """Characters before the next one."""
        return self._before + self._at

    def next_char(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANKS:
                self._at += 1
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def skip(self, expected: str) -> None:
        """Pass the next character. Raises ValueError if it is another one."""
        if (char := self.next_char()) != expected:
            found = f"{shorten(char)} at character {self.position}" if char else "the file ends"
            raise ValueError(f"{found} where {expected!r} is expected; allowed: {ALLOWED}")
        self._at += 1

    def take_value(self) -> str:
        """Pass the next value and return its text. Raises ValueError if there is none, or if it is too long."""
        self.next_char()
        while True:
            try:
                _, end = _SCANNER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_complete:  # a number may go on
                    text, self._at = self._text[self._at : end], end
                    return text
            except RecursionError as error:
                raise ValueError(f"a row at character {self.position} is nested too deeply") from error
            except ValueError as error:
                # An error holds the text, so nothing here may hold the error.
                if self._is_complete or len(self._text) - self._at > limits.MAX_LINE_BYTES:
                    where = f"at character {self.position}"
                    raise ValueError(f"a row {where} is not JSON, or is too long ({error})") from error
            self._read()

    def _read(self) -> bool:
        """Read on, at least as much as is held, so that a long value takes linear time. False at the end."""
        if self._is_complete:
            return False
        self._before += self._at
        self._text, self._at = self._text[self._at :], 0
        data = self._file.read(max(limits.CHUNK_BYTES, len(self._text)))
        self._text += self._decode(data, final=not data)
        self._is_complete = not data
        return True


_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)  # only the end of a value matters; long numbers cost time
