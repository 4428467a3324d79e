"""Damage for inputs: bytes and JSON values, drawn from a seeded generator."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from random import Random
from typing import Any

MAX_BYTES = 1 << 20  # of a mutated input
TOKENS = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\\ud800",
        b'"',
        b"'",
        b"\n",
        b"\r\n",
        b"\r",
        b"\t",
        b",",
        b";",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"- ",
        b"#",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"9" * 5000,
        b"0x" + b"f" * 3900,
    ),
    *(
        b"&a ",
        b"*a",
        b"!!int ''",
        b"!!python/object/apply:os.system [id]",
        b"<<: ",
        b"? ",
        b"|\n",
        b"%YAML 9\n",
        b"1:2:3.5",
    ),
    *(b"true", b"null", b"--w ", b"../../x", b"/etc/passwd", b"file:///etc/passwd", b"PAR1", b"__metadata__"),
)
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**31, 2**53 + 1, 2**63, 2**64, 10**400, 1e300, -1e-300, 0.5, float("nan")),
    *("", " ", "x" * 2000, "\ud800", "\0", "é" * 40, "../../x", "/etc/passwd", "2026-11-29", "{}", "1" * 5000),
    *([], [[]], [None], {}, {"": ""}, {"a": {"b": 1}}, ["x"] * 300),
)


def deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutate(data: bytes, rng: Random) -> bytes:
    """`data` with one to four kinds of damage."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTES)(data, rng)[:MAX_BYTES]
    return data


def mutate_json(data: bytes, rng: Random) -> bytes:
    """A JSON document with hostile values, lost or repeated keys; sometimes damaged as bytes as well."""
    if rng.random() < 0.4:
        return mutate(data, rng)
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = _change(document, rng)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    return mutate(text, rng) if rng.random() < 0.1 else text


def gzipped(data: bytes, rng: Random) -> bytes:
    """`data` compressed by gzip, sometimes damaged after that."""
    packed = gzip.compress(data, 1)
    return mutate(packed, rng) if rng.random() < 0.3 else packed


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*path, name)
        yield from places(inner, (*path, name))


def _change(document: Any, rng: Random) -> Any:
    paths = list(places(document))
    if not paths:
        return copy.deepcopy(rng.choice(HOSTILE))
    *parents, last = rng.choice(paths)
    place = document
    for name in parents:
        place = place[name]
    match rng.randrange(6):
        case 0:
            del place[last]
        case 1 if isinstance(place, dict):
            place[rng.choice(("", "\ud800", "x" * 3000, "../x", "schema"))] = place.pop(last)
        case 2 if isinstance(place[last], list) and len(place[last]) < 100:
            place[last] = place[last] * rng.choice((2, 50))
        case 3:
            place[last] = deep(rng.choice((50, 120, 250)))  # three of them are below the recursion limit
        case _:
            place[last] = copy.deepcopy(rng.choice(HOSTILE))
    return document


def _flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_near_end(data: bytes, rng: Random) -> bytes:
    at = max(0, len(data) - rng.choice((8, 64, 1000)))  # where Parquet and zip have their directory
    return data[:at] + _flip(data[at:], rng)


def _truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _span(data: bytes, rng: Random) -> tuple[int, int]:
    at = rng.randrange(len(data) + 1)
    return at, min(len(data), at + rng.choice((1, 4, 30, 500)))


def _remove(data: bytes, rng: Random) -> bytes:
    begin, end = _span(data, rng)
    return data[:begin] + data[end:]


def _repeat(data: bytes, rng: Random) -> bytes:
    begin, end = _span(data, rng)
    return data[:end] + data[begin:end] * rng.choice((1, 2, 100, 2000)) + data[end:]


def _insert(data: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TOKENS) * rng.choice((1, 1, 1, 50, 2000)) + data[at:]


def _move(data: bytes, rng: Random) -> bytes:
    (begin, end), at = _span(data, rng), rng.randrange(len(data) + 1)
    return data[:at] + data[begin:end] + data[at:]


def _set_number(data: bytes, rng: Random) -> bytes:
    at, width = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8))
    return data[:at] + rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * width + data[at + width :]


_BYTES = (_flip, _flip_near_end, _truncate, _remove, _repeat, _insert, _insert, _move, _set_number)
