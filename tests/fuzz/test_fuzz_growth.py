"""Time and memory of the readers are linear in the size of a damaged input (P6, P7).

Each input is read at two sizes, the second four times the first. A quadratic step takes sixteen times as long.
"""

from __future__ import annotations

import gc
import gzip
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hv_batch.job.config.yaml_overrides import YamlError, parse_yaml
from hv_batch.job.documents import schema
from hv_batch.job.documents.reading import parse
from hv_batch.job.event_log.reader import parse_part
from hv_batch.protocol import UserError
from tests.fuzz.manifest_targets import SEEDS, check

FIRST, SLOW_FIRST = 6_000, 60_000  # bytes
GROWTH = 4
MAX_TIMES = 9.0  # as long; 4 is linear, 16 quadratic
ENOUGH_S = 0.3  # CPU time; of a shorter one, the ratio is that of the clock, and a quadratic step takes longer
MAX_BYTES = 400  # of memory for each byte of the input: Python holds a list in 56 bytes, a problem of a row in more

SHAPES: dict[str, Callable[[int], bytes]] = {
    "brackets": lambda size: b"[" * size,
    "braces": lambda size: b'{"a":' * (size // 5),
    "quotation marks": lambda size: b'"' * size,
    "backslashes": lambda size: b'{"prompt": "' + b"\\" * size,
    "commas": lambda size: b"," * size,
    "lines": lambda size: b"\n" * size,
    "carriage returns": lambda size: b"\r" * size,
    "zeros": lambda size: b"\0" * size,
    "digits": lambda size: b'{"seed": ' + b"9" * size + b"}",
    "keys": lambda size: b"{" + b",".join(b'"k%d":1' % number for number in range(size // 9)) + b"}",
    "one key": lambda size: b"{" + b",".join([b'"prompt":"a"'] * (size // 13)) + b"}",
    "rows": lambda size: b'{"prompt":"a"}\n' * (size // 15),
    "objects": lambda size: b'{"data":[' + b",".join([b'{"prompt":"a"}'] * (size // 15)) + b"]}",
    "not UTF-8": lambda size: b"\xff" * size,
    "blanks": lambda size: b" " * size + b"x",
    "cells": lambda size: b"prompt,a\n" + b'"x\n' * (size // 3),
    "options": lambda size: b"a " + b"--w 5 " * (size // 6),
    "dashes": lambda size: b"- " * (size // 2),
    "indents": lambda size: b"\n".join(b" " * depth + b"a:" for depth in range(int((2 * size) ** 0.5))),
}
FEW = ("braces", "cells", "indents", "keys", "objects", "options", "rows")  # in the default suite
MORE = [
    (shape, first) for first in (FIRST, SLOW_FIRST) for shape in sorted(SHAPES) if first > FIRST or shape not in FEW
]
TEXTS = [suffix for suffix in sorted(SEEDS) if suffix.count(".") == 1 and suffix != ".parquet"]


def _parsers(folder: Path) -> dict[str, Callable[[bytes], object]]:
    def yaml(data: bytes) -> None:
        with suppress(YamlError):
            parse_yaml(data)

    manifests = {suffix: (lambda data, suffix=suffix: check(suffix, data, folder)) for suffix in TEXTS}
    return {
        **manifests,
        "config": yaml,
        "record": lambda data: parse(schema.RetriedRecord, data),
        "events": parse_part,
    }


def _read(read: Callable[[bytes], object], data: bytes) -> float:
    """The CPU time of one read, in seconds."""
    started = time.process_time()
    with suppress(UserError, ValueError):
        read(data)
    return time.process_time() - started


@pytest.mark.parametrize(
    ("shape", "first"),
    [*((shape, FIRST) for shape in FEW), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_a_damaged_input_is_read_in_linear_time(tmp_path, shape, first):
    """P6, P7: every format of a manifest, a config, a record and events, with each kind of repetition."""
    small, large = SHAPES[shape](first), SHAPES[shape](GROWTH * first)
    gc.collect()
    for name, read in _parsers(tmp_path).items():
        ratio, tries = _read(read, large) / (ENOUGH_S / MAX_TIMES), 0
        while ratio >= MAX_TIMES and tries < 3:
            tries, ratio = tries + 1, _read(read, large) / _read(read, small)
        assert ratio < MAX_TIMES, f"{name}: {ratio:.1f} times as long for {GROWTH} times the bytes"


def test_the_harness_finds_a_quadratic_step():
    """A reader that copies what it has read for every 16 bytes takes sixteen times as long for four times the bytes."""

    def quadratic(data: bytes) -> None:
        for end in range(0, len(data), 16):
            data[:end].count(b"x")

    assert _read(quadratic, b" " * 200_000) / _read(quadratic, b" " * 50_000) > MAX_TIMES


@pytest.mark.slow
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_damaged_input_is_read_in_linear_memory(tmp_path, shape):
    """P7: as above; memory of Python objects."""
    data = SHAPES[shape](GROWTH * FIRST)
    for name, read in _parsers(tmp_path).items():
        tracemalloc.start()
        try:
            _read(read, data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 16 * 2**20 + MAX_BYTES * len(data), f"{name}: {peak >> 20} MB for {len(data)} bytes"


BOMB = """
import resource, sys
from hv_batch.job.manifest.reader import Manifest
from hv_batch.protocol import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for _ in Manifest(sys.argv[1]).rows():
        pass
except UserError:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".csv.gz", ".txt.gz"])
@pytest.mark.parametrize("unit", [b"\n", b"a", b"["])
def test_a_decompression_bomb_is_read_in_bounded_memory(tmp_path, suffix, unit):
    """P7: 512 MB of one byte, in a file of some kB."""
    path = tmp_path / f"bomb{suffix}"
    with gzip.open(path, "wb", 1) as file:
        for _ in range(512):
            file.write(unit * (1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], env={**os.environ}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, "MB above what the process had before"
