"""What a chaos run renders and with which options; a number determines them."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hv_batch.architecture import DiTConfig
from hv_batch.toy.checkpoint import dit_file
from hv_batch.toy.trained import write_trained_checkpoint
from tests.support.lora_files import official, random_adapter, write
from tests.support.repository import CONFIGS
from tests.support.runs import FAKE_CONFIG

VARIANTS = 8
STEP_S = 0.4  # of a step of the fake engine: faults should meet samples in work

# Failures of every attempt. A failure after a step would not do: a resumed attempt may begin behind it.
POISON = ("!raise-encode", "!raise-begin", "!oom-begin")
DULL = "dull"  # prompts that the prompt hook drops
COLUMNS = {"id": "name", "prompt": "caption", "num_frames": "length", "num_videos": "n", "category": "category"}

PROMPT_HOOK = f"""
import json, sys
for line in sys.stdin:
    prompt = json.loads(line)["prompt"]
    print(json.dumps({{"drop": "too dull"}} if "{DULL}" in prompt else {{"prompt": "at dawn: " + prompt}}))
"""
# It signs each video with another number, in a box that players skip, as a signer with a time stamp does.
SAMPLE_HOOK = """
import json, os, sys
sample = json.load(sys.stdin)
path = sys.argv[1]
if path.endswith(".mp4"):
    with open(path, "ab") as file:
        file.write((24).to_bytes(4, "big") + b"free" + os.urandom(16))
print(json.dumps({"words": len(sample["params"]["prompt"].split())}))
"""

# Options of the real engine, at toy size.
BLOCKS = {"density": 0.5, "brick": [3, 2, 2], "neighbours": "faces", "backend": "eager"}
TOY_OPTIONS: tuple[dict[str, Any], ...] = (
    {"step_cache": {"kind": "schedule", "computed": 4, "of": 6}},
    {"sparse_attention": BLOCKS},
    {"step_cache": {"kind": "schedule", "computed": 4, "of": 6}, "sparse_attention": BLOCKS},
    {},
)


@dataclass(frozen=True)
class Variant:
    name: str
    config: dict[str, Any]  # without the folder of the marks
    flags: tuple[str, ...]  # of the command
    manifest: Path
    expected: Path  # the manifest as JSON Lines, as the prompt hook leaves it: what the checker reads
    signed: bool  # a sample hook makes the bytes of each video unique
    exit_code: int  # of a run that has nothing left to do

    @property
    def hooks(self) -> list[str]:
        return [value for value in self.config.get("hooks", {}).values() if isinstance(value, str)]

    def config_with(self, marks: Path, step_seconds: float) -> dict[str, Any]:
        config = json.loads(json.dumps(self.config))
        config["model"]["options"] |= {"marks": str(marks), "step_seconds": step_seconds}
        return config


def make_variant(engine: str, number: int, samples: int, folder: Path) -> Variant:
    """`engine` is "fake" or "toy". Files are written into `folder` unless they exist."""
    hooks, foreign = number % 4 in (2, 3), number % 2 == 1
    name = f"{engine}-{number}-{samples}"
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(number)
    config |= _fake_engine() if engine == "fake" else _toy_engine(number, folder)
    rows = list(_rows(samples, hooks, poison=engine == "fake", loras=engine == "toy"))
    flags: tuple[str, ...] = ()
    if hooks:
        config["hooks"] = _write_hooks(folder)
    if foreign:
        manifest = folder / "manifest.csv"
        _write_once(manifest, _as_csv(rows))
        flags = tuple(
            f"--column={ours}={theirs}" for ours, theirs in COLUMNS.items() if ours != theirs and ours != "category"
        )
    else:
        manifest = folder / "manifest.jsonl"
        _write_once(manifest, _as_lines(rows))
    expected = folder / "expected.jsonl"
    heading = [None] if foreign else []  # the rows of a CSV file are numbered as its lines
    _write_once(expected, _as_lines([*heading, *(map(_after_hook, rows) if hooks else rows)]))
    return Variant(name, config, flags, manifest, expected, hooks, exit_code=3 if engine == "fake" else 0)


def _config(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    config: dict[str, Any] = json.loads(json.dumps(FAKE_CONFIG))
    for section, values in {
        "decoders": {"placement": draw.choice(["pool", "pool", "group"]), "gpus": 0.5, "count": draw.choice([1, 2])},
        "encoders": {"gpus": 0.5, "batch_size": draw.choice([1, 3])},
        "groups": {"count": 2, "checkpoint_every": draw.choice([0, 1, 2])},
        "output": {"shard_size": draw.choice([5, 9]), "webdataset": draw.random() < 0.5},
        "media": {"poster": draw.random() < 0.5},
        "timeouts": {"start_s": 300, "stall_s": 25, "drain_s": 15},
        "retries": {"infra": 6, "worker": 12},  # a schedule is denser than any real night
    }.items():
        config[section] = {**config.get(section, {}), **values}
    return config


def _fake_engine() -> dict[str, Any]:
    return {"model": {"engine": "tests.chaos.engine:ChaosEngine", "options": {}}}


def _toy_engine(number: int, folder: Path) -> dict[str, Any]:
    """The real engine with the trained toy, groups of two ranks over gloo, and two LoRAs."""
    options = yaml.safe_load((CONFIGS / "demo_cpu.yaml").read_text())["model"]["options"]
    base = write_trained_checkpoint(folder.parent)
    written = json.loads((dit_file(base).parent / "config.json").read_text())
    model = DiTConfig(**{name: value for name, value in written.items() if not name.startswith("_")})
    options |= TOY_OPTIONS[number % len(TOY_OPTIONS)] | {"model_base": str(base)}
    loras = {}
    for seed, name in enumerate(("film", "grain")):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            write(path, official(random_adapter(model, seed)))
        loras[name] = {"path": str(path), "strength": 0.3}
    defaults = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 6, "cfg_scale": 3.0}
    section = {"engine": "tests.chaos.toy_engine:ToyEngine", "options": {"video": options}, "loras": loras}
    return {"model": section, "defaults": defaults}


def _rows(samples: int, hooks: bool, poison: bool, loras: bool) -> Iterable[dict[str, Any]]:
    """Ids of all kinds, rows of several videos, pictures, rows without id (if no hook rewrites their prompts)."""
    failing = {3 + 5 * number: fault for number, fault in enumerate(POISON if poison else ())}
    for number in range(samples):
        if fault := failing.get(number):
            yield {"id": f"bad-{number}", "prompt": f"bad {number} {fault}"}
        row: dict[str, Any] = {"id": f"s{number:03d}", "prompt": f"take {number}", "category": "ab"[number % 2]}
        if number % 7 == 3 and not hooks:
            del row["id"]
        if number % 9 == 5:
            row |= {"id": f"cut {number} / b", "num_videos": 2}
        if number % 11 == 6:
            row |= {"num_frames": 1}
        if number % 8 == 4 and poison:  # latents too large for the memory of the driver
            row |= {"height": 256, "width": 256}
        if hooks and number % 10 == 2:
            row["prompt"] += f", {DULL}"
        if loras and number % 3:
            row["lora"] = ("film:0.5", "film,grain")[number % 3 - 1]
        yield row


def _after_hook(row: dict[str, Any]) -> dict[str, Any] | None:
    if DULL in row["prompt"]:
        return None
    return row | {"prompt": f"at dawn: {row['prompt']}", "prompt_original": row["prompt"]}


def _as_lines(rows: Iterable[dict[str, Any] | None]) -> str:
    return "".join(json.dumps(row) + "\n" if row else "\n" for row in rows)


def _as_csv(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, [COLUMNS.get(name, name) for name in names])
    writer.writeheader()
    writer.writerows({COLUMNS.get(name, name): value for name, value in row.items()} for row in rows)
    return text.getvalue()


def _write_hooks(folder: Path) -> dict[str, Any]:
    commands = {}
    for name, script in (("prompt", PROMPT_HOOK), ("sample", SAMPLE_HOOK)):
        path = folder / f"{name}_hook.py"
        _write_once(path, script)
        commands[name] = f"{sys.executable} -S -E {path}"
    return {**commands, "sample_timeout_s": 20.0}


def _write_once(path: Path, text: str) -> None:
    if not path.exists():
        path.write_text(text)
