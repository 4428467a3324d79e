"""Writes the samples of an output root as a manifest for another run: `export --as-manifest`.

A committed sample is never rendered again in its own root, and an equal config would give equal bytes. So the samples
that look wrong become the rows of another run, with new seeds or another config.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import fsspec

from hv_batch.job.redaction import refuse_credentials
from hv_batch.job.user_input import explain_failure
from hv_batch.protocol import UserError
from hv_batch.sampling_params import NO_LORA


def write_manifest(target: str, records: Iterable[Mapping[str, Any]], *, new_seeds: bool) -> int:
    """Write the manifest (`manifest_lines`) to `target`, a path or URL that must not exist. Returns its rows.

    Raises UserError if there is no record, if `target` exists, or if it cannot be written.
    """
    lines = manifest_lines(records, new_seeds=new_seeds)
    first = next(lines, None)  # before the file is created
    if first is None:
        raise UserError("No committed sample matches, so no manifest is written. Check --where and --shards.")
    refuse_credentials("manifest", target)
    rows = 0
    try:
        filesystem, path = fsspec.core.url_to_fs(target)
        if filesystem.exists(path):
            raise UserError(f"The file {target} exists and is not overwritten. Give another name, or remove it.")
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        with filesystem.open(path, "wb") as file:
            for line in chain([first], lines):
                file.write(line.encode("ascii"))
                rows += 1
    except (OSError, ImportError) as error:
        raise UserError(f"The manifest {target} {explain_failure(error)}") from error
    return rows


def manifest_lines(records: Iterable[Mapping[str, Any]], *, new_seeds: bool) -> Iterator[str]:
    """One line of JSON for each commit record: a manifest row that renders this one video.

    It holds every parameter, so that the defaults of the other run's config do not matter, and the manifest's further
    columns. With `new_seeds`, each seed is another one. It follows from the old seed and the sample's key, so that the
    same command writes the same file, and a second round gives other seeds than the first.
    """
    for record in records:
        row = {"id": row_id(record), "lora": NO_LORA, **record["params"], "fps": record["fps"]}
        if new_seeds:
            row["seed"] = new_seed(record["params"]["seed"], record["key"])
        further = {name: value for name, value in record["extra"].items() if name not in row}
        yield json.dumps(row | further) + "\n"  # ASCII: a prompt may contain lone surrogates


def row_id(record: Mapping[str, Any]) -> str:
    """The id of the row for one video: that of its row, or its key if the row has several videos."""
    key: str = record["key"]
    has_siblings = record["video_index"] > 0 or key.endswith("-v0")
    return key if has_siblings else record["id"]


def new_seed(seed: int, key: str) -> int:
    """A seed of 31 bits that differs from `seed`."""
    drawn = int.from_bytes(hashlib.sha256(f"new:{seed}:{key}".encode()).digest()[:4], "big") >> 1
    return drawn if drawn != seed else drawn ^ 1
