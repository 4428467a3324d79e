"""The JSON of a report's files: small, and in the order in which a page shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def encode_json(value: Mapping[str, Any]) -> bytes:
    """UTF-8; lone surrogates become escapes. Raises ValueError for NaN and infinities, which are not JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")
