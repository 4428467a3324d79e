"""JSON Lines: one JSON object a line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from hv_batch.job.manifest.column_mapping import NO_MAPPING, ColumnMapping
from hv_batch.job.manifest.formats import limits
from hv_batch.job.manifest.formats.limits import NumberedRows, ParsedRow
from hv_batch.job.manifest.formats.lines import BOM, line_blocks, numbered_lines
from hv_batch.job.user_input import shorten
from hv_batch.sampling_params import FieldProblem


@dataclass(frozen=True, slots=True)
class JsonLines:
    """Complete lines. The row number is the line number, from 1; blank lines count."""

    first: int
    data: bytes
    columns: ColumnMapping = NO_MAPPING

    def rows(self) -> NumberedRows:
        for number, line in numbered_lines(self.first, self.data):
            yield number, self.columns.rename_row(parse_json(line, "one JSON object a line"))

    @property
    def last(self) -> int:
        return self.first + self.data.count(b"\n")


def split_json_lines(file: IO[bytes], columns: ColumnMapping = NO_MAPPING) -> Iterator[JsonLines]:
    """Split a file into complete lines. Raises ValueError if it is one JSON document over several lines."""
    is_first = True
    for first, data in line_blocks(file):
        if is_first and data.removeprefix(BOM).strip():
            _refuse_document(data.removeprefix(BOM).lstrip())
            is_first = False
        yield JsonLines(first, data, columns)


def _refuse_document(text: bytes) -> None:
    """Raise ValueError if `text`, the start of a file, is an array or an object that goes on over several lines."""
    line, newline, _ = text.partition(b"\n")
    if line.startswith(b"["):
        raise ValueError("it is one JSON array, not one object a line; rename it to .json")
    if not newline or not line.startswith(b"{") or isinstance(parse_json(line.strip(), ""), dict):
        return
    try:
        json.JSONDecoder().raw_decode(text.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        if line.strip() != b"{":
            return
    raise ValueError(
        "it is pretty-printed JSON, in which an object goes on over several lines; write each object on one line (as "
        "`jq -c . FILE` does), or put the objects into an array in a .json file"
    )


def parse_json(text: bytes, allowed: str) -> ParsedRow:
    """Parse one JSON object; a FieldProblem if `text` is anything else. `allowed` names what is expected.

    NaN, Infinity, repeated keys and lone surrogates are not accepted.
    """
    if len(text) > limits.MAX_LINE_BYTES:
        start = text[:100].decode("utf-8", errors="replace")
        return FieldProblem("line", start, f"{allowed}, of at most {limits.MAX_LINE_BYTES >> 20} MiB")
    try:
        row = _DECODER.decode(text.decode("utf-8"))
        if b"\\u" in text:  # only an escape can give a lone surrogate, which UTF-8 cannot store
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        allowed = "text in UTF-8"
    except RecursionError:
        allowed = "a JSON object that is not nested so deeply"
    except ValueError as error:
        reason = str(error).partition("; use sys.")[0]  # without Python's advice on its own settings
        allowed = f"{allowed} ({reason})"
    else:
        if isinstance(row, dict):
            return row
    return FieldProblem("line", text.decode("utf-8", errors="replace"), allowed)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null, or omit the key")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shorten(name)} is given twice")
    return row


_DECODER = json.JSONDecoder(parse_constant=_reject_constant, object_pairs_hook=_reject_duplicate_keys)
