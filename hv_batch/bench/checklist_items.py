"""The measurements of tests/gpu/checklist.py: step times of the attention kernels, sparse attention, decode.

    python -m hv_batch.bench.checklist_items --device cuda "720p dense cudnn" "720p sparse 0.3" ...

prints a JSON line when a measurement begins, and one when it ends. So the caller can end this process if one takes too
long, and start another one with the rest. A failed measurement ends the process, because the device may be unusable.

The DiT has a tenth of its blocks, so that each measurement takes seconds. `step_s` is its time, multiplied accordingly;
"whole" is a step of the complete DiT, to compare with.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from hv_batch.architecture import DiTConfig
from hv_batch.attention_kernels import candidates
from hv_batch.attention_methods import DENSE, SparseAttention, StepAttention
from hv_batch.bench.measure import time_once
from hv_batch.bench.presets import PRESETS, Preset
from hv_batch.bench.stage_workloads import random_module, vae_stage
from hv_batch.engine.attention.kernels import KERNELS, kernel_problem
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.dit.pointwise import compile_pointwise
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.sampling.sampler import SamplingOptions, trajectory
from hv_batch.engine.text_encoders import TextEmbedding
from hv_batch.sampling_params import SamplingParams
from hv_batch.step_schedule import StepSchedule

DEPTH = 10  # the DiT is cut to this part of its blocks
ROUNDS = 3
DENSITIES = (0.5, 0.3, 0.15)
CACHED_STEPS, COMPUTED_STEPS = 6, 3

Result = Mapping[str, Any]


def list_items(presets: Sequence[str]) -> list[str]:
    """Return the names of all measurements, the most important first."""
    dense = [f"dense {name}" for name in KERNELS if name != "math"]  # which holds all scores in memory
    sparse = [f"sparse {density}" for density in DENSITIES]
    kinds = (dense, sparse, ["decode"], ["fused"], ["cache"], ["whole"])
    return [f"{preset} {item}" for kind in kinds for preset in presets for item in kind]


def measure(item: str, device: torch.device) -> Result:
    """Return the result of one measurement: a dict with `status` "ok" and its values, or "skipped" and the reason."""
    preset, what, *rest = item.split()
    sizes = PRESETS[preset]
    if what == "dense":
        return _dense(sizes, rest[0], device)
    if what == "sparse":
        return _sparse(sizes, float(rest[0]), device)
    return {"decode": _decode, "fused": _fused, "cache": _cache, "whole": _whole}[what](sizes, device)


def _dense(sizes: Preset, kernel: str, device: torch.device) -> Result:
    if problem := kernel_problem(kernel, device, sizes.dit_dtype):
        return {"status": "skipped", "note": problem}
    return _time_step(sizes, kernel, DENSE, device)


def _sparse(sizes: Preset, density: float, device: torch.device) -> Result:
    # Blocks of a GPU have 128 tokens. The toy has too few tokens for several of them.
    small: dict[str, Any] = {} if device.type == "cuda" else {"brick": (1, 2, 4), "backend": "eager"}
    methods = StepAttention(SparseAttention(density=density, **small))
    return _time_step(sizes, _fastest(device, sizes), methods, device)


def _fused(sizes: Preset, device: torch.device) -> Result:
    """A step with the engine option `fuse_pointwise`. On a CPU, where compiling takes minutes, it is only traced."""
    model = _model(sizes.dit, sizes.dit_dtype, device, DEPTH)
    compile_pointwise((*model.double_blocks, *model.single_blocks), "inductor" if device.type == "cuda" else "eager")
    result = _time_step(sizes, _fastest(device, sizes), DENSE, device)
    _free(device)
    return result


def _whole(sizes: Preset, device: torch.device) -> Result:
    _free(device)
    result = _time_step(sizes, _fastest(device, sizes), DENSE, device, depth=1, rounds=1)
    _free(device)
    return result


def _time_step(
    sizes: Preset,
    kernel: str,
    methods: StepAttention,
    device: torch.device,
    *,
    depth: int = DEPTH,
    rounds: int = ROUNDS,
) -> Result:
    model, inputs = _model(sizes.dit, sizes.dit_dtype, device, depth), _inputs(sizes, device)
    model.attention = kernel

    def work() -> None:
        model(*inputs, attention=methods)

    first_s = time_once(work, device)  # with compilation and the choice of algorithms
    seconds = [time_once(work, device) for _ in range(rounds)]
    blocks, scale = _blocks(model.config), _blocks(sizes.dit) / _blocks(model.config)
    note = f"{kernel}; first {first_s:.2f} s; best of {rounds}, {blocks} of {_blocks(sizes.dit)} blocks"
    return {"status": "ok", "step_s": scale * min(seconds), "worst_s": scale * max(seconds), "note": note}


def _blocks(config: DiTConfig) -> int:
    return config.mm_double_blocks_depth + config.mm_single_blocks_depth


def _decode(sizes: Preset, device: torch.device) -> Result:
    _free(device)
    stage = vae_stage(sizes, device)
    first_s = time_once(stage.ours, device)
    return {"status": "ok", "step_s": time_once(stage.ours, device), "note": f"{stage.size}; first {first_s:.2f} s"}


def _cache(sizes: Preset, device: torch.device) -> Result:
    """A denoise in which half of the steps run the DiT, as a share of one in which all do."""
    model = _model(sizes.dit, sizes.dit_dtype, device, DEPTH)
    model.attention = _fastest(device, sizes)
    frames, rows, columns = sizes.dit_latents
    params = SamplingParams(
        prompt="",
        negative_prompt="",
        height=8 * rows,
        width=8 * columns,
        num_frames=4 * frames - 3,
        num_inference_steps=CACHED_STEPS,
        seed=0,
        guidance_scale=6.0,
        cfg_scale=1.0,
        guidance_rescale=0.0,
        flow_shift=7.0,
    )
    config = model.config
    text = TextEmbedding(
        torch.randn(sizes.text_tokens, config.text_states_dim).to(sizes.dit_dtype),
        torch.randn(config.text_states_dim_2).to(sizes.dit_dtype),
        sizes.text_tokens - 1,
        0,
    )

    def denoise(options: SamplingOptions) -> None:
        for _ in trajectory(model, [params], [text], None, mesh=SequenceMesh.single(), device=device, options=options):
            pass

    cached = SamplingOptions(step_cache=StepSchedule(computed=COMPUTED_STEPS, of=CACHED_STEPS))
    plain_s, cached_s = (time_once(partial(denoise, options), device) for options in (SamplingOptions(), cached))
    note = f"{cached_s:.2f} of {plain_s:.2f} s with {COMPUTED_STEPS} of {CACHED_STEPS} steps computed"
    return {"status": "ok", "share": cached_s / plain_s, "note": note}


@cache
def _model(config: DiTConfig, dtype: torch.dtype, device: torch.device, depth: int) -> HYVideoDiT:
    part = replace(
        config,
        mm_double_blocks_depth=-(-config.mm_double_blocks_depth // depth),
        mm_single_blocks_depth=-(-config.mm_single_blocks_depth // depth),
    )
    model: HYVideoDiT = random_module(lambda: HYVideoDiT(part), device, dtype)
    return model


def _inputs(sizes: Preset, device: torch.device) -> tuple[Any, ...]:
    config, dtype = sizes.dit, sizes.dit_dtype
    return (
        torch.randn(1, config.in_channels, *sizes.dit_latents, device=device).to(dtype),
        torch.full((1,), 900.0, device=device),
        torch.randn(1, sizes.text_tokens, config.text_states_dim, device=device).to(dtype),
        [sizes.text_tokens],
        torch.randn(1, config.text_states_dim_2, device=device).to(dtype),
        torch.full((1,), 6000.0, device=device) if config.guidance_embed else None,
    )


def _fastest(device: torch.device, sizes: Preset) -> str:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    names = candidates(major, is_half=sizes.dit_dtype is not torch.float32)
    return next(name for name in names if kernel_problem(name, device, sizes.dit_dtype) is None)


def _free(device: torch.device) -> None:
    """Free the memory of the DiT."""
    _model.cache_clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("items", nargs="+")
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    for item in options.items:
        print(json.dumps({"item": item, "status": "begun"}), flush=True)
        try:
            result = measure(item, device)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other measurements go on
            note = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            print(json.dumps({"item": item, "status": "failed", "note": note}), flush=True)
            return 1
        print(json.dumps({"item": item, **result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
