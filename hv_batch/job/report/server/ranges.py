"""HTTP range requests (RFC 9110, section 14): which bytes of an object an answer has."""

from __future__ import annotations

import re

_RANGE = re.compile(r"bytes=(?P<first>\d{0,18})-(?P<last>\d{0,18})")


class RangeNotSatisfiableError(ValueError):
    """The range begins after the end of the object."""


def find_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The (start, end) of the bytes that a `Range` header asks for, with `end` exclusive; None for the whole object.

    Several ranges, other units and a malformed header are ignored, which the standard allows. Raises
    RangeNotSatisfiableError.
    """
    match = _RANGE.fullmatch(header.replace(" ", "")) if header and len(header) < 100 else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match["first"], match["last"]
    if not first:  # the last bytes
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    if start >= size or start >= end:
        raise RangeNotSatisfiableError(f"the object has {size} bytes")
    return start, end
