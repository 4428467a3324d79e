"""Writes the samples of an output root as a manifest for another run: `export --as-manifest`.

A committed sample is never rendered again in its own root, and an equal config would give equal bytes. So the samples
that look wrong become the rows of another run, with new seeds or another config.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def manifest_lines(records: Iterable[Mapping[str, Any]], *, new_seeds: bool) -> Iterator[str]:
    """One line of JSON for each commit record: a manifest row that renders this one video.

    It holds every parameter, so that the defaults of the other run's config do not matter, and the manifest's further
    columns. With `new_seeds`, each seed is another one. It follows from the old seed and the sample's key, so that the
    same command writes the same file, and a second round gives other seeds than the first.
    """
    for record in records:
        row = {"id": row_id(record), **record["params"], "fps": record["fps"]}
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
