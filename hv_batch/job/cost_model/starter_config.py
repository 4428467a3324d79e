"""`hv-batch init`: a first config for the GPUs that a user has, small enough to read and sure to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import product
from typing import Any

import yaml

from hv_batch.job.config.hardware import find_gpu
from hv_batch.job.config.run_config import RunConfig, read_values
from hv_batch.job.cost_model.memory_check import memory_problems
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.protocol import UserError

# From the release's own size to what fits into 24 GB. Offload renders the same pixels more slowly.
SIZES = ({"height": 720, "width": 1280}, {"height": 544, "width": 960})
OFFLOADS: Sequence[Mapping[str, Any]] = ({}, {"offload": "blocks"})
FRAMES = 129
GROUP_SIZES = (8, 4, 2, 1)  # they divide the 24 heads, and the GPUs of usual nodes


class Goal(StrEnum):
    """What a config is best at."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"
    MIXED = "mixed"


def starter_config(gpus: int, gpu: str, goal: Goal, model_base: str) -> str:
    """The YAML of a config for `gpus` GPUs of the model `gpu`; 0 is the toy on a CPU.

    Chooses the largest size of a video that fits. Raises UserError if the GPU is unknown or nothing fits.
    """
    if gpus == 0:
        values = read_values("demo_cpu")
        values["model"]["options"]["model_base"] = model_base
        return _dump(values)
    memory = find_gpu(gpu).memory_gib
    for size, offload, placement in product(SIZES, OFFLOADS, _placements(gpus, goal)):
        values = {
            "model": {"options": {"model_base": model_base, **offload}},
            "defaults": {**size, "num_frames": FRAMES, "num_inference_steps": 50},
            **placement,
            "media": {"threads": 4},
            "gpu": gpu.upper(),
            "gpu_memory_gib": memory,
        }
        if _fits(values, gpus):
            return _dump(values)
    raise UserError(
        f"The released model does not fit on {gpus} x {gpu} with {memory:g} GiB each, also not "
        "in smaller videos and with its blocks in host memory. Use more or larger GPUs, or --gpus 0 for the toy model."
    )


def _placements(gpus: int, goal: Goal) -> list[Mapping[str, Any]]:
    """Divisions of the GPUs among groups, encoders and decoders, the best for the goal first."""
    shared = {"encoders": {"placement": "colocated", "count": 1, "gpus": 0.3}, "decoders": {"placement": "group"}}
    own_gpu = {"encoders": {"count": 1, "gpus": 0.5}, "decoders": {"count": 1, "gpus": 0.5, "cpus": 4}}
    two_gpus = {"encoders": {"count": 1, "gpus": 1}, "decoders": {"count": 1, "gpus": 1, "cpus": 4}}  # of 48 GB

    def groups(ranks: int, count: int, pools: Mapping[str, Any]) -> Mapping[str, Any]:
        parallel = {"device": "cuda", "gpus_per_group": ranks}
        return {"parallel": parallel, "groups": {"count": count, "cpus_per_rank": 2}, **pools}

    choices: list[Mapping[str, Any]] = []
    if goal is Goal.MIXED and gpus > 1:
        auto = {"device": "cuda", "gpus_per_group": "auto"}
        for ranks in sorted(GROUP_SIZES):  # of the largest group, which depends on the shape
            counts = {"count": max(1, (gpus - 1) // ranks), "max_sample_minutes": 12}
            choices.append({"parallel": auto, "groups": counts, **own_gpu})
    if goal is not Goal.LATENCY and gpus > 1:
        choices.append(groups(1, gpus - 1, own_gpu))
    choices += [groups(size, gpus // size, shared) for size in GROUP_SIZES if size <= gpus]
    choices += [groups(size, (gpus - 2) // size, two_gpus) for size in GROUP_SIZES if size <= gpus - 2]
    return [*choices, groups(1, gpus - 1, own_gpu)] if gpus > 1 else choices


def _fits(values: Mapping[str, Any], gpus: int) -> bool:
    config = RunConfig.model_validate(values)
    video = config.defaults
    try:
        run = resolve_run(config, [(video.height, video.width, video.num_frames)])
    except UserError:  # no group size has the memory
        return False
    needed = config.groups.count * run.groups.largest.world_size + sum(pool.gpus for pool in run.pools.values())
    return needed <= gpus and not memory_problems(run)


def _dump(values: Mapping[str, Any]) -> str:
    head = (
        "# Written by `hv-batch init`. `hv-batch config explain KEY` describes each key, `hv-batch plan` the costs.\n"
    )
    return head + yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=100)
