"""JSON with one byte representation for equal values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 64 << 20  # a row has at most 16 MiB, and an index of ten million rows 500 parts
MAX_DEPTH = 128  # columns of the user have at most 100 levels, and a record adds two

# A string is closed or reaches to the end, so that the scan is linear also for a text that is no JSON.
_BRACKET_OR_STRING = re.compile(r'[\[\]{}]|"(?:[^"\\]|\\.)*(?:"|\\?\Z)', re.S)


def encode(record: Mapping[str, Any]) -> bytes:
    """Canonical JSON, indented: equal records give equal bytes.

    Non-ASCII text is kept as it is; a lone surrogate, which UTF-8 cannot hold, becomes a JSON escape. Raises ValueError
    for NaN and infinities, which are not JSON.
    """
    return _bytes(json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False))


def encode_line(record: Mapping[str, Any]) -> bytes:
    """As `encode`, on one line. It is used for per-sample records: Python's fast JSON encoder cannot indent."""
    return _bytes(json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def decode(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, which may have been written by anyone. Raises ValueError as `decode_value`."""
    record = decode_value(data)
    if not isinstance(record, dict):
        raise ValueError(f"it is a JSON {type(record).__name__}, not an object")
    return record


def decode_value(data: bytes) -> Any:
    """The JSON value in `data`.

    Raises ValueError if it is not UTF-8 or not JSON, is larger than MAX_BYTES or nested deeper than MAX_DEPTH, or holds
    a number that is not finite. The bounds are checked before the text is parsed.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data):,} bytes; allowed: at most {MAX_BYTES:,}")
    text = data.decode("utf-8")
    if _depth(text) > MAX_DEPTH:
        raise ValueError(f"its lists and objects are nested deeper than {MAX_DEPTH}")
    return _DECODER.decode(text)


def _depth(text: str) -> int:
    """The nesting depth of a JSON text. Brackets inside strings do not count."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:  # nearly every object; saves the scan
        return 0
    depth = deepest = 0
    for token in _BRACKET_OR_STRING.findall(text):
        if token in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in "]}":
            depth -= 1
    return deepest


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"the number {literal[:20]} is not finite")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
