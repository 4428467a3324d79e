"""The checked manifest of an output root whose run has not read a manifest file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest.extra_columns import merge_types
from hv_batch.job.manifest.index import IndexWriter, index_key
from hv_batch.job.manifest.row_validation import PART_SCHEMA, encode_part
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.store import Store

ROWS = 3  # of one part, so that shards begin inside parts


def publish_plan(
    store: Store, samples: Sequence[Sample], digest: str = "", extra_kinds: Mapping[str, str] | None = None
) -> None:
    """Write `plan/` for `samples`, which must be those of the run in `store`, one a row.

    `extra_kinds` replaces the types of the further columns.
    """
    writer = IndexWriter(store)
    for first in range(0, len(samples), ROWS):
        rows = samples[first : first + ROWS]
        values = [(sample.params.to_dict() | {"fps": sample.fps}, dict(sample.extra)) for sample in rows]
        columns = {
            "row": [sample.row for sample in rows],
            "key": [sample.key for sample in rows],
            "id": [sample.id for sample in rows],
            "videos": [1] * len(rows),
            "content": [json.dumps(pair) for pair in values],
        }
        writer.add(encode_part({name: columns[name] for name in PART_SCHEMA.names}), len(rows), len(rows))
    types: dict = {}
    for sample in samples:
        merge_types(types, sample.extra)
    config = RunConfig.model_validate(read_run(store)["config"])
    document = {
        "schema": "hv_batch/plan/1",
        "key": index_key(config),
        "files": [],
        "summary": {
            "digest": digest,
            "rows": len(samples),
            "samples": len(samples),
            "shards": -(-len(samples) // config.output.shard_size),
            "shapes": [],
            "extra_kinds": dict(types if extra_kinds is None else extra_kinds),
            "warnings": [],
        },
        "parts": [
            {"name": part.name, "sha256": part.sha256, "rows": part.rows, "samples": part.samples}
            for part in writer.parts
        ],
    }
    store.put(layout.INDEX, json.dumps(document).encode())
