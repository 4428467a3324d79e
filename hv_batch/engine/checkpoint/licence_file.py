"""The licence that a checkpoint tree declares for its weights.

    <model_base>/licence.json    {"licence": "apache-2.0", "weights": {"dit": "<sha256>", "vae": ..., ...}}

The file names the digests of the weights (`hv_batch.engine.checkpoint.digests.revision`), so it declares nothing about
other weights that are copied into the tree or named by `dit_weight`. The released tree has no such file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hv_batch.engine.checkpoint.json_files import read_json

FILE = "licence.json"


def write_licence(model_base: Path, licence: str, weights: Mapping[str, str]) -> None:
    """Declare `licence` for the weights with these digests."""
    text = json.dumps({"licence": licence, "weights": dict(weights)}, indent=1, sort_keys=True)
    (model_base / FILE).write_text(text + "\n", encoding="utf-8")


def declared_licence(model_base: Path, weights: Mapping[str, str]) -> str | None:
    """The licence that the tree declares for the weights with these digests; None if it declares none.

    Raises UserError if the file is damaged.
    """
    path = model_base / FILE
    if not path.is_file():
        return None
    values = read_json(path)
    licence = values.get("licence")
    return licence if isinstance(licence, str) and values.get("weights") == weights else None
