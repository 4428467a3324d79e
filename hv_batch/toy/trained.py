"""The trained toy checkpoint: shipped in the package as safetensors, written as a released tree where it is wanted.

    weights/
      dit.safetensors, vae.safetensors    released names; their metadata hold the model's config
      text_encoder/, text_encoder_2/      as released
      stages.txt                          how many stages of its training the DiT has behind it

`python -m hv_batch.toy.training` makes it; see there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from hv_batch.engine.checkpoint.tree import read_json
from hv_batch.toy.checkpoint import dit_file, vae_file, write_dit, write_vae, written_once
from hv_batch.toy.random_weights import State

SHIPPED = Path(__file__).with_name("weights")
TOWERS = ("text_encoder", "text_encoder_2")
STAGES = "stages.txt"


def write_trained_checkpoint(root: Path) -> Path:
    """The model base of the trained toy checkpoint under `root`, written first if it is not there yet.

    Its directory is named by a digest of the weights.
    """
    digest = hashlib.sha256()
    for file in sorted(SHIPPED.rglob("*.*")):
        digest.update(f"{file.relative_to(SHIPPED)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return written_once(root / f"toy-trained-{digest.hexdigest()[:8]}", unpack)


def unpack(model_base: Path) -> None:
    """Write what the package has as a tree in the released layout."""
    write_dit(model_base, *_load(SHIPPED / "dit.safetensors"))
    write_vae(model_base, *_load(SHIPPED / "vae.safetensors"))
    for tower in TOWERS:
        shutil.copytree(SHIPPED / tower, model_base / tower, dirs_exist_ok=True)
    write_stages(model_base, int((SHIPPED / STAGES).read_text()))


def pack(model_base: Path, folder: Path = SHIPPED) -> None:
    """The reverse: what training has written at `model_base`, as `folder` of the package."""
    folder.mkdir(parents=True, exist_ok=True)
    dit, vae = dit_file(model_base), vae_file(model_base)
    _save(folder / "dit.safetensors", dit.with_name("config.json"), torch.load(dit, weights_only=True)["module"])
    _save(folder / "vae.safetensors", vae.with_name("config.json"), torch.load(vae, weights_only=True))
    for tower in TOWERS:
        shutil.copytree(model_base / tower, folder / tower, dirs_exist_ok=True)
    (folder / STAGES).write_text(f"{finished_stages(model_base)}\n")


def training_folder(model_base: Path) -> Path:
    """What only a training needs."""
    return model_base / "training"


def finished_stages(model_base: Path) -> int:
    """How many stages of its training the DiT has behind it."""
    file = training_folder(model_base) / STAGES
    return int(file.read_text()) if file.is_file() else 0


def write_stages(model_base: Path, count: int) -> None:
    training_folder(model_base).mkdir(exist_ok=True)
    (training_folder(model_base) / STAGES).write_text(f"{count}\n")


def _save(file: Path, config: Path, state: State) -> None:
    told = {name: value for name, value in read_json(config).items() if name not in ("_class_name", "latent_channels")}
    file.write_bytes(save(state, metadata={"config": json.dumps(told, sort_keys=True)}))


def _load(file: Path) -> tuple[dict[str, Any], State]:
    with safe_open(file, "pt") as tensors:
        config = json.loads(tensors.metadata()["config"])
    return config, load_file(file)
