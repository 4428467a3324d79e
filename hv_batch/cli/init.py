"""`hv-batch init`: asks five questions, or takes flags, and writes a config and a manifest that run."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.run_config import load_config
from hv_batch.job.config.shipped import shipped_folder
from hv_batch.job.cost_model.starter_config import Goal, starter_config
from hv_batch.protocol import UserError

T = TypeVar("T")

CONFIG, MANIFEST = "config.yaml", "prompts.jsonl"
TOY_ROWS = 4
PROMPTS = {
    "cat": "A cat walks on the grass, realistic style.",
    "harbour": "A fishing boat leaves a small harbour at sunrise, seen from the pier, calm sea, light fog.",
    "street": "A rainy street at night, neon signs are reflected by the wet asphalt, slow camera movement forward.",
}


def init(
    folder: Annotated[Path, typer.Argument(help="folder to write to")] = Path(),
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs in total; 0: the toy model on this CPU")] = None,
    gpu: Annotated[str | None, typer.Option(help=f"model: {', '.join(one.name for one in GPUS.values())}")] = None,
    model_base: Annotated[str | None, typer.Option(help="folder of the checkpoint, the same on every node")] = None,
    goal: Annotated[
        Goal | None, typer.Option(case_sensitive=False, help="most videos, soonest first video, or many shapes")
    ] = None,
    output: Annotated[str | None, typer.Option(help="output root: folder or URL")] = None,
    as_json: Json = False,
) -> None:
    """Write a config and a manifest that run. Asks for what the flags do not give, if stdin is a terminal."""
    asks = sys.stdin is not None and sys.stdin.isatty() and not as_json
    for name in (CONFIG, MANIFEST):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists already. Remove it, or choose another folder.")
    gpus = _answer(gpus, "How many GPUs in total (0: toy model on this CPU)?", 0, asks)
    if gpus == 0:
        model_base = _toy()
    else:
        gpu = _answer(gpu, f"Which model ({', '.join(one.name for one in GPUS.values())})?", "H100", asks)
        goal = Goal(_answer(goal, f"Optimize for what ({', '.join(Goal)})?", Goal.THROUGHPUT, asks))
        model_base = _answer(model_base, "Where is the checkpoint (hv-batch weights fetch DIR)?", "ckpts", asks)
    output = _answer(output, "Where do the videos go (folder or URL)?", str(folder / "videos"), asks)
    text = starter_config(gpus, gpu or "", goal or Goal.THROUGHPUT, model_base)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / MANIFEST).write_text(_manifest(toy=gpus == 0), encoding="utf-8")
    load_config(str(folder / CONFIG))
    files = ["--config", str(folder / CONFIG), "--manifest", str(folder / MANIFEST)]
    commands = {
        "check": ["hv-batch", "run", *files, "--output", output, "--dry-run"],
        "costs": ["hv-batch", "plan", *files],
        "run": ["hv-batch", "run", *files, "--output", output],
    }
    lines = {name: shlex.join(command) for name, command in commands.items() if gpus or name != "costs"}
    if as_json:
        written = {"config": str(folder / CONFIG), "manifest": str(folder / MANIFEST)}
        show_json("hv_batch/init/1", {**written, "output": output, "commands": lines})
    else:
        show(f"written: {folder / CONFIG} and {folder / MANIFEST}")
        show("\n".join(f"{name + ':':<8}{line}" for name, line in lines.items()))


def _answer(flag: T | None, question: str, default: T, asks: bool) -> T:
    """The value of a flag, else the answer on a terminal, else the default."""
    if flag is not None:
        return flag
    return typer.prompt(question, default=default, err=True) if asks else default


def _toy() -> str:
    from hv_batch.toy.checkpoint import cache_dir  # torch takes seconds to import
    from hv_batch.toy.trained import write_trained_checkpoint

    return str(write_trained_checkpoint(cache_dir()))


def _manifest(*, toy: bool) -> str:
    if toy:
        rows = (shipped_folder() / "demo_prompts.jsonl").read_text("utf-8").splitlines()[:TOY_ROWS]
    else:
        rows = [json.dumps({"id": name, "prompt": prompt}) for name, prompt in PROMPTS.items()]
    return "".join(f"{row}\n" for row in rows)
