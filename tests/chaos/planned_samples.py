"""The samples that a manifest defines, from the documents of hv_batch; nothing of it is imported."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# Columns that belong to the run, not to the user: they do not count towards the hash of a row's content as data.
REAL_COLUMNS = {"guidance_scale", "cfg_scale", "guidance_rescale", "flow_shift"}
PARAMS = {"prompt", "negative_prompt", "seed", "height", "width", "num_frames", "num_inference_steps", *REAL_COLUMNS}
OWN_COLUMNS = {"id", "fps", "num_videos", "lora", *PARAMS}


@dataclass(frozen=True)
class Planned:
    """A sample, as the manifest defines it."""

    key: str
    row: int
    video: int
    shard: int
    values: Mapping[str, Any]  # what the manifest says of its parameters, with the derived seed
    extra: Mapping[str, Any]


def read_plan(manifest: Path, run: Mapping[str, Any]) -> dict[str, Planned]:
    """The samples by key. The key of a row is its id, if that is safe in a path, else a slug of it with a hash; without
    an id, it is a hash of the row's content, and equal rows are numbered from the second on.
    """
    config, seen, plan = run["config"], Counter[str](), {}
    for number, line in enumerate(manifest.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        row = {name: value for name, value in json.loads(line).items() if value is not None}
        if row.get("seed") == -1:
            del row["seed"]
        row_key = key_of(row)
        if "id" not in row:
            seen[row_key] += 1
            row_key += f"-{seen[row_key]}" if seen[row_key] > 1 else ""
        videos = int(row.get("num_videos", config["defaults"]["num_videos"]))
        digest = hashlib.sha256(f"{config['seed']}:{row_key}".encode()).digest()
        first_seed = row.get("seed", int.from_bytes(digest[:4], "big") >> 1)
        for video in range(videos):
            key = row_key if videos == 1 else f"{row_key}-v{video}"
            values = {name: value for name, value in row.items() if name in PARAMS} | {"seed": first_seed + video}
            values["prompt"] = row["prompt"].strip()
            extra = {name: value for name, value in row.items() if name not in OWN_COLUMNS}
            shard = len(plan) // config["output"]["shard_size"]
            plan[key] = Planned(key, number, video, shard, values, extra)
    return plan


def key_of(row: Mapping[str, Any]) -> str:
    if "id" not in row:
        content = {name: _normal(name, value) for name, value in row.items()}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    name = str(row["id"])
    if SAFE_KEY.fullmatch(name) and ".." not in name and not name.endswith("."):
        return name
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name[:192])[:48].strip("-") or "id"
    return f"{slug}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def _normal(name: str, value: Any) -> Any:
    if name == "prompt":
        return value.strip()
    return float(value) if name in REAL_COLUMNS else value
