"""`hv-batch demo`: render the shipped manifest with the toy model through the complete system on this machine."""

from __future__ import annotations

import logging
from pathlib import Path

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig, load_config
from hv_batch.job.config.shipped import shipped_folder
from hv_batch.job.storage.store import Store
from hv_batch.runtime.render import render
from hv_batch.runtime.run_end import ExitCode
from hv_batch.toy.checkpoint import cache_dir
from hv_batch.toy.trained import write_trained_checkpoint

logger = logging.getLogger(__name__)

CONFIG = "demo_cpu.yaml"
MANIFEST = "demo_prompts.jsonl"


def run_demo(output: str, as_json: bool = False) -> ExitCode:
    """Render the demo manifest into `output`, or resume it, and print the output root and the report."""
    model_base = write_trained_checkpoint(cache_dir())
    logger.info(f"toy checkpoint in the released layout: {model_base}")
    config = with_model_base(load_config(str(shipped(CONFIG))), model_base)
    code = render(config, [str(shipped(MANIFEST))], output, address="local")
    if as_json:
        return code
    root = Store(output).url
    print(f"output root: {root}")
    report = f"{root}/{layout.REPORT}"
    print(f"report:      {report if '://' in root else Path(report).as_uri()}")
    return code


def with_model_base(config: RunConfig, model_base: Path) -> RunConfig:
    options = {**config.model.options, "model_base": str(model_base)}
    return config.model_copy(update={"model": config.model.model_copy(update={"options": options})})


def shipped(name: str) -> Path:
    """A file of the folder configs/."""
    return shipped_folder() / name
