"""The trained parts of the toy checkpoint: shipped in the package as safetensors, a released tree where it is wanted.

    weights/
      dit.safetensors, vae.safetensors    released names; their metadata hold the model's config
      text_encoder/, text_encoder_2/      as released

`python -m hv_batch.toy.training` makes them; see there. The DiT is still to come, so nothing renders with them yet.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from hv_batch.engine.checkpoint import read_json
from hv_batch.toy.checkpoint import dit_file, vae_file, write_dit, write_vae
from hv_batch.toy.random_weights import State

SHIPPED = Path(__file__).with_name("weights")
TOWERS = ("text_encoder", "text_encoder_2")


def unpack(model_base: Path) -> None:
    """Write the parts that the package has as a tree in the released layout."""
    for file, write in ((SHIPPED / "dit.safetensors", write_dit), (SHIPPED / "vae.safetensors", write_vae)):
        if file.is_file():
            write(model_base, *_load(file))
    for tower in TOWERS:
        shutil.copytree(SHIPPED / tower, model_base / tower, dirs_exist_ok=True)


def pack(model_base: Path, folder: Path = SHIPPED) -> None:
    """The reverse: the parts that training has written at `model_base`, as `folder` of the package."""
    folder.mkdir(parents=True, exist_ok=True)
    dit, vae = dit_file(model_base), vae_file(model_base)
    if dit.is_file():
        _save(folder / "dit.safetensors", dit.with_name("config.json"), torch.load(dit, weights_only=True)["module"])
    if vae.is_file():
        _save(folder / "vae.safetensors", vae.with_name("config.json"), torch.load(vae, weights_only=True))
    for tower in TOWERS:
        shutil.copytree(model_base / tower, folder / tower, dirs_exist_ok=True)


def _save(file: Path, config: Path, state: State) -> None:
    told = {name: value for name, value in read_json(config).items() if name not in ("_class_name", "latent_channels")}
    file.write_bytes(save(state, metadata={"config": json.dumps(told, sort_keys=True)}))


def _load(file: Path) -> tuple[dict[str, Any], State]:
    with safe_open(file, "pt") as tensors:
        config = json.loads(tensors.metadata()["config"])
    return config, load_file(file)
