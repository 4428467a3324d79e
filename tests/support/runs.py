"""Small runs for the cluster tests: manifests, configs, commands, and reading the output roots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from tests.support.repository import ROOT

DEADLINE_S = 120  # limit of a wait; a busy machine needs long to start a worker
PROMPTS = [f"prompt {i}" for i in range(10)]

FAKE_CONFIG = {
    "defaults": {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "negative_prompt": "ugly"},
    "parallel": {"device": "cpu", "ulysses_degree": 2, "ring_degree": 1},
    "groups": {"count": 1, "gpus_per_rank": 1, "cpus_per_rank": 0},
    "encoders": {"gpus": 0, "cpus": 0.1, "batch_size": 3},
    "decoders": {"gpus": 0, "cpus": 0.1},
    "output": {"shard_size": 4},
    "media": {"preset": "ultrafast", "threads": 1},
    "timeouts": {"start_s": 60, "stall_s": 60, "drain_s": 30},
}


def write_config(folder: Path, marks: Path, engine_options=None, **sections) -> Path:
    """A config with the fake engine; keyword arguments replace values inside sections."""
    config = json.loads(json.dumps(FAKE_CONFIG))
    config["model"] = {
        "engine": "tests.support.doubles:FakeEngine",
        "options": {"marks": str(marks), **(engine_options or {})},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_manifest(folder: Path, prompts, **columns) -> Path:
    path = folder / "manifest.jsonl"
    rows = [{"id": f"s{i:02d}", "prompt": prompt, **columns} for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(config: Path, manifest: Path, output: Path, address: str | None = None, *overrides: str) -> list[str]:
    arguments = ["run", "--config", str(config), "--manifest", str(manifest), "--output", str(output), *overrides]
    return [sys.executable, "-m", "hv_batch", *arguments, *(["--address", address] if address else [])]


def start(arguments: list[str], **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(os.environ), **kwargs
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def render(*arguments, **kwargs) -> tuple[int, str]:
    return finish(start(command(*arguments), **kwargs))


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never saw {what}"
        time.sleep(0.02)


def count(marks: Path, what: str) -> Counter:
    path = marks / what
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def records(output: Path, kind: str = "commits") -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((output / kind).rglob("*.json"))}


def dataset(output: Path) -> dict[str, bytes]:
    """The bytes that must not depend on failures (P2, P3): media and sealed tables."""
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted((output / "data").rglob("[!.]*")) if p.is_file()}


def videos(output: Path) -> dict[str, bytes]:
    """Media by the name of the file, whichever shard it is in: what P3 promises to be equal in runs whose manifests, or
    what they say of themselves, differ.
    """
    return {key.rpartition("/")[2]: data for key, data in dataset(output).items() if key.endswith((".mp4", ".png"))}


def table(output: Path, shard: int = 0):
    return pq.read_table(output / "data" / f"shard-{shard:05d}" / "metadata.parquet").to_pylist()
