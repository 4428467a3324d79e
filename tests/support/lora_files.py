"""LoRA files in the key styles of the programs that write them, made from one adapter in the released names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint.loading import dit_shapes
from tests.support.dit_reference import to_diffusers

Adapter = Mapping[str, tuple[Tensor, Tensor]]  # released module -> down [rank, in], up [out, rank]

RANK, ALPHA = 4, 1.0  # the defaults of musubi-tuner


def random_adapter(
    config: DiTConfig, seed: int = 0, rank: int = RANK, only: str = ""
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a LoRA of every Linear of the blocks, the refiner and the final layer, or of those that contain `only`."""
    draw = torch.Generator().manual_seed(seed)
    parts = ("double_blocks.", "single_blocks.", "txt_in.individual_token_refiner.", "final_layer.")
    return {
        name.removesuffix(".weight"): (
            torch.randn(rank, shape[1], generator=draw) * shape[1] ** -0.5,
            torch.randn(shape[0], rank, generator=draw) * 0.3,
        )
        for name, shape in dit_shapes(config).items()
        if name.endswith(".weight") and len(shape) == 2 and name.startswith(parts) and only in name
    }


def merged(state: Mapping[str, Tensor], adapter: Adapter, strength: float) -> dict[str, Tensor]:
    """Return the merged float32 weights; `strength` includes alpha / rank."""
    return {
        name: tensor.float() + strength * (adapter[m][1] @ adapter[m][0])
        if (m := name.removesuffix(".weight")) in adapter and name.endswith(".weight")
        else tensor.float()
        for name, tensor in state.items()
    }


def official(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for module, (down, up) in adapter.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    return tensors


def diffusion_pipe(adapter: Adapter) -> dict[str, Tensor]:
    return {
        f"transformer.{module}.lora_{letter}.weight": tensor
        for module, pair in adapter.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


COMFY = [  # released -> ComfyUI, as written down from its files
    ("img_attn_qkv", "img_attn.qkv"),
    ("txt_attn_qkv", "txt_attn.qkv"),
    ("self_attn_qkv", "self_attn.qkv"),
    ("attn_proj", "attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("mod.linear", "mod.lin"),
    ("modulation.linear", "modulation.lin"),
]


def comfy_name(module: str) -> str:
    for ours, theirs in COMFY:
        module = module.replace(ours, theirs)
    return f"diffusion_model.{module}"


def comfy(adapter: Adapter) -> dict[str, Tensor]:
    """Down and up with alpha, in ComfyUI's names."""
    tensors = {}
    for module, (down, up) in adapter.items():
        name = comfy_name(module)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    return tensors


def comfy_differences(adapter: Adapter) -> dict[str, Tensor]:
    """Whole differences, as an extraction from two checkpoints writes for small layers."""
    return {f"{comfy_name(m)}.diff": ALPHA / RANK * (up @ down) for m, (down, up) in adapter.items()}


def diffusers(adapter: Adapter, hidden_size: int) -> dict[str, Tensor]:
    """Separate q, k and v: each has a copy of the fused A, and its own rows of B."""
    tensors = {}
    for module, (down, up) in adapter.items():
        for name, rows in to_diffusers({f"{module}.weight": up}, hidden_size).items():
            key = f"transformer.{name.removesuffix('.weight')}"
            tensors |= {f"{key}.lora_A.weight": down.clone(), f"{key}.lora_B.weight": rows.clone()}
    return tensors


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, header)
    return path
