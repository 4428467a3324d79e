"""Synthetic manifests and partly committed output roots of any size."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.dataset.seal import seal_shard
from hv_batch.job.manifest.index import load_index
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.commits import commit_record
from hv_batch.job.records.run_document import dataset_schema, read_run
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store

FORMATS = ("jsonl", "jsonl.gz", "parquet")

COLUMNS = ("id", "prompt", "category", "seed")
CATEGORIES = ("animals", "landscape", "people", "city")
ROWS_AT_ONCE = 100_000  # rows of a Parquet row group


def write_manifest(path: Path, rows: int) -> None:
    """Write a manifest in the format (of FORMATS) that the suffix of `path` names.

    A row has an id, a prompt, a seed and a user-defined column.
    """
    if path.suffix == ".parquet":
        _write_parquet(path, rows)
        return
    with gzip.open(path, "wt", compresslevel=3) if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in _rows(rows))


def _write_parquet(path: Path, rows: int) -> None:
    schema = pa.schema([(name, pa.int64() if name == "seed" else pa.string()) for name in COLUMNS])
    left = _rows(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while block := list(islice(left, ROWS_AT_ONCE)):
            writer.write_table(pa.table(list(zip(*block, strict=True)), schema))


def _rows(rows: int) -> Iterator[tuple[str, str, str, int]]:
    for number in range(rows):
        category = CATEGORIES[number % len(CATEGORIES)]
        yield f"sample-{number:08d}", f"sample {number}: a slow pan over {category}, realistic style", category, number


@dataclass(frozen=True, slots=True)
class _NoMedia:
    """The media fields of a commit record whose file does not exist."""

    sha256: str
    num_frames: int
    height: int
    width: int
    bytes: int = 10_000

    @property
    def frames_sha256(self) -> str:
        return self.sha256


GROUPS = 8  # that have rendered the samples in turn, and as many decoders
DENOISE_S, DECODE_S = 60.0, 5.0


def commit_first(output: Path, manifest: Path, config: RunConfig, samples: int) -> None:
    """Commit the first `samples` samples of an output root that a run has started, and seal the complete shards.

    Their records are those of a run on GROUPS groups that ends now.
    """
    ended = time.time()
    store = Store(str(output))
    run, index, left = read_run(store), load_index(store, Manifest(str(manifest)), config), samples
    assert index, "the run that started the output root must have written an index"
    for shard in range(index.shards):
        inside = index.samples(shard)
        records = output / layout.commit_dir(shard)
        records.mkdir(parents=True, exist_ok=True)
        for sample in inside[:left]:
            # Not through the store, which flushes each record to disk: this step is not measured.
            record = _record(sample, run["fingerprint"], ended - (samples - sample.row) // GROUPS * DENOISE_S)
            (records / f"{sample.key}.json").write_bytes(encode(record))
        if left < len(inside):
            return
        seal_shard(
            store,
            shard,
            [sample.key for sample in inside],
            index.summary.extra_kinds,
            identity=run["identity"],
            schema=dataset_schema(run),
        )
        left -= len(inside)


def _record(sample: Sample, fingerprint: str, committed_at: float) -> dict[str, object]:
    params = sample.params
    media = _NoMedia(hashlib.sha256(sample.key.encode()).hexdigest(), params.num_frames, params.height, params.width)
    slot = sample.row % GROUPS
    seconds = {"encode": 0.1, "denoise": DENOISE_S - slot / 10, "decode": DECODE_S}
    record = commit_record(
        sample,
        file=layout.media_dir(sample.shard) + layout.media_name(sample.key, media.sha256, params.num_frames),
        media=media,
        stages={
            stage: {"seconds": taken, "node": f"10.0.0.{slot}", "worker": f"{stage}-{slot}.0", "ranks": 1}
            for stage, taken in seconds.items()
        },
        failures=[],
        fingerprint=fingerprint,
        versions={},
    )
    return record | {"created_at": datetime.fromtimestamp(committed_at, UTC).isoformat(timespec="milliseconds")}
