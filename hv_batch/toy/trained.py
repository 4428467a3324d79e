"""The trained toy checkpoint: shipped in the package as safetensors, unpacked into the released layout on demand.

    weights/
      dit.safetensors, vae.safetensors    released tensor names; the metadata holds the config of the model
      text_encoder/, text_encoder_2/      in the released layout
      stages.txt                          number of training stages that the DiT has finished

`python -m hv_batch.toy.training` creates it.
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

from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.toy.checkpoint import LICENCE, declare_licence, dit_file, vae_file, write_dit, write_once, write_vae
from hv_batch.toy.random_weights import State

SHIPPED = Path(__file__).with_name("weights")
TOWERS = ("text_encoder", "text_encoder_2")
STAGES = "stages.txt"


def write_trained_checkpoint(root: Path) -> Path:
    """Return the model base of the trained toy checkpoint under `root`, and write it first if it does not exist.

    The name of its folder has a digest of the weights.
    """
    digest = hashlib.sha256(f"{LICENCE}\n".encode())
    for file in sorted(SHIPPED.rglob("*.*")):
        digest.update(f"{file.relative_to(SHIPPED)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return write_once(root / f"toy-trained-{digest.hexdigest()[:8]}", _write_tree)


def _write_tree(model_base: Path) -> None:
    unpack(model_base)
    declare_licence(model_base)


def unpack(model_base: Path) -> None:
    """Write the shipped weights as a tree in the released layout."""
    write_dit(model_base, *_load(SHIPPED / "dit.safetensors"))
    write_vae(model_base, *_load(SHIPPED / "vae.safetensors"))
    for tower in TOWERS:
        shutil.copytree(SHIPPED / tower, model_base / tower, dirs_exist_ok=True)
    write_stages(model_base, int((SHIPPED / STAGES).read_text()))


def pack(model_base: Path, folder: Path = SHIPPED) -> None:
    """Write the trained tree at `model_base` into `folder` of the package; the reverse of `unpack`."""
    folder.mkdir(parents=True, exist_ok=True)
    dit, vae = dit_file(model_base), vae_file(model_base)
    _save(folder / "dit.safetensors", dit.with_name("config.json"), torch.load(dit, weights_only=True)["module"])
    _save(folder / "vae.safetensors", vae.with_name("config.json"), torch.load(vae, weights_only=True))
    for tower in TOWERS:
        shutil.copytree(model_base / tower, folder / tower, dirs_exist_ok=True)
    (folder / STAGES).write_text(f"{finished_stages(model_base)}\n")


def training_folder(model_base: Path) -> Path:
    """Return the folder of files that only the training needs."""
    return model_base / "training"


def finished_stages(model_base: Path) -> int:
    """Return the number of training stages that the DiT has finished."""
    file = training_folder(model_base) / STAGES
    return int(file.read_text()) if file.is_file() else 0


def write_stages(model_base: Path, count: int) -> None:
    training_folder(model_base).mkdir(exist_ok=True)
    (training_folder(model_base) / STAGES).write_text(f"{count}\n")


def _save(file: Path, config: Path, state: State) -> None:
    fields = {
        name: value for name, value in read_json(config).items() if name not in ("_class_name", "latent_channels")
    }
    file.write_bytes(save(state, metadata={"config": json.dumps(fields, sort_keys=True)}))


def _load(file: Path) -> tuple[dict[str, Any], State]:
    with safe_open(file, "pt") as tensors:
        config = json.loads(tensors.metadata()["config"])
    return config, load_file(file)
