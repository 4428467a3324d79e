"""JSON with one byte representation for equal values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


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
    record: dict[str, Any] = json.loads(data)
    return record
