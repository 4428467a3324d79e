"""Manifests of every format, checked as `hv-batch run` checks them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFileSystem

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from tests.fuzz.mutations import gzipped, mutate, mutate_json

ROWS = [
    {
        "prompt": "a heron at dawn",
        "id": "h-1",
        "seed": 7,
        "height": 128,
        "width": 96,
        "num_frames": 17,
        "tag": ["x", 1],
    },
    {"prompt": "“éé” 中 \U0001f600", "num_videos": 2, "guidance_scale": 6.5, "negative_prompt": "blurred", "tag": None},
    {"prompt": 'quoted "text", and a comma', "num_inference_steps": 8, "note": {"a": {"b": [1.5, True]}}},
]
NAMES = sorted({name for row in ROWS for name in row} - {"note", "tag"})
CONFIG = RunConfig.model_validate({})


def check(suffix: str, data: bytes, folder: Path) -> None:
    """Check a manifest with these bytes, and read all samples of its index."""
    path = folder / f"m{suffix}"
    path.write_bytes(data)
    try:
        for _ in check_manifest(Manifest(str(path)), CONFIG, Store(f"memory://{uuid.uuid4().hex}")):
            pass
    finally:
        MemoryFileSystem.store.clear()


def damage_rows(data: bytes, rng: Random) -> bytes:
    """JSON Lines: one line is damaged as a document, or the whole as bytes."""
    if rng.random() < 0.4:
        return mutate(data, rng)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines * rng.choice((1, 1, 3)))


def new_table(rng: Random) -> bytes:
    """A Parquet file of other types, encodings and row groups."""
    rows = rng.choice((1, 3, 50))
    columns = {"prompt": pa.array([rng.choice(("a", "b" * 300, "é", None)) for _ in range(rows)])}
    for number in range(rng.randrange(6)):
        kind, value = rng.choice(_KINDS)
        columns[rng.choice(("seed", "id", "height", "num_videos", f"c{number}"))] = pa.array(
            [rng.choice((value, value, None)) for _ in range(rows)], kind
        )
    sink, compression = io.BytesIO(), rng.choice(("none", "snappy", "zstd", "gzip"))
    options = {"use_dictionary": rng.random() < 0.5, "data_page_version": rng.choice(("1.0", "2.0"))}
    pq.write_table(pa.table(columns), sink, compression=compression, row_group_size=rng.choice((1, 7, 100)), **options)
    return sink.getvalue()


_KINDS = [
    *((pa.int64(), 5), (pa.uint64(), 2**64 - 1), (pa.int8(), -3), (pa.float64(), float("nan")), (pa.float32(), 1e30)),
    *((pa.bool_(), True), (pa.string(), "x"), (pa.large_string(), "y"), (pa.binary(), b"\xff"), (pa.null(), None)),
    *(
        (pa.timestamp("ns"), 2**62),
        (pa.timestamp("s", "Nowhere/City"), 2**40),
        (pa.date32(), 2**30),
        (pa.time64("ns"), 1),
    ),
    *((pa.duration("s"), 2**60), (pa.decimal128(38, 2), None), (pa.list_(pa.list_(pa.int64())), [[1], None])),
    *(
        (pa.struct({"a": pa.struct({"b": pa.string()})}), {"a": {"b": "z"}}),
        (pa.map_(pa.string(), pa.int64()), [("k", 1)]),
    ),
    *((pa.dictionary(pa.int32(), pa.string()), "d"), (pa.month_day_nano_interval(), None), (pa.binary(3), b"abc")),
]


def damage_table(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.4:
        try:
            data = new_table(rng)
        except (pa.ArrowException, ValueError, OverflowError):
            return data
    return data if rng.random() < 0.2 else mutate(data, rng)


def _csv(separator: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, NAMES, delimiter=separator, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in NAMES} for row in ROWS] * 20), sink)
    return sink.getvalue()


LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
TEXT = b"# prompts\na heron --w 96 --h 128 --f 17 --d 5\n\na fox --n blurred --fs 7.0 --g 6\nplain\n"

Damage = Callable[[bytes, Random], bytes]
SEEDS: Mapping[str, tuple[bytes, Damage]] = {
    ".csv": (_csv(","), mutate),
    ".json": (json.dumps({"data": ROWS}).encode(), mutate_json),
    ".jsonl": (LINES, damage_rows),
    ".jsonl.gz": (LINES, lambda data, rng: gzipped(damage_rows(data, rng), rng)),
    ".jsonl.zst": (pa.compress(LINES, "zstd", asbytes=True), mutate),
    ".parquet": (_parquet(), damage_table),
    ".tsv": (_csv("\t"), mutate),
    ".txt": (TEXT, mutate),
    ".txt.gz": (gzip.compress(TEXT), mutate),
}

TARGETS = {f"manifest{suffix}": (seed, damage, partial(check, suffix)) for suffix, (seed, damage) in SEEDS.items()}
