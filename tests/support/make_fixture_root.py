"""Renders the fixture root of this version: `python -m tests.support.make_fixture_root tests/support/data/roots/NAME`.

A change of the revision, or of the schema of the tables, adds one. All roots come from this config and manifest, with
the fake engine, so their media can be compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.support.runs import render, write_config

ROWS = [
    {"id": "s00", "prompt": "a red kite"},
    {"id": "s01", "prompt": "a green hill", "num_frames": 1},
    {"id": "s02", "prompt": "a blue door", "seed": 7},
]


def make_root(target: Path) -> None:
    """Render the root into `target`, with a local Ray."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "marks").mkdir()
        manifest = folder / "manifest.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        sections = {
            "output": {"shard_size": 2},
            "groups": {"gpus_per_rank": 0, "cpus_per_rank": 0.1},
        }
        code, text = render(write_config(folder, folder / "marks", **sections), manifest, target)
    if code != 0:
        sys.exit(text)
    (target / "lease.json").unlink(missing_ok=True)
    (target / "report" / "index.html").unlink()  # large, and nothing reads it


if __name__ == "__main__":
    make_root(Path(sys.argv[1]))
