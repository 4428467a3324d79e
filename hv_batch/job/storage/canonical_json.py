"""JSON with one byte representation for equal values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def encode(record: Mapping[str, Any]) -> bytes:
    """Canonical JSON: equal records are equal bytes. Raises ValueError for NaN and infinities, which are not JSON.

    Text stays readable; a lone surrogate, which UTF-8 cannot hold, becomes the JSON escape it came from.
    """
    return _bytes(json.dumps(record, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False))


def encode_line(record: Mapping[str, Any]) -> bytes:
    """As `encode`, in one line: what is written for every sample, and read by machines. Python's fast encoder does no
    other.
    """
    return _bytes(json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def decode(data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(data)
    return record
