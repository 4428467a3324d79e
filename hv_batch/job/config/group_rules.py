"""Validation of the config keys that determine the size of a group."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hv_batch.job.config.sections import ENGINE, EncodersConfig, GroupsConfig, ModelConfig, ParallelConfig
from hv_batch.protocol import ParallelPlan

NODE_GPUS = 8  # of the usual server with any of the GPUs in hardware.py
GROUP_SIZES = (1, 2, 4, 8)  # the divisors of NODE_GPUS: groups of these sizes fill a node

DEFAULT_PLAN = ParallelPlan(ulysses_degree=8, ring_degree=1)  # 8 divides the released model's 24 heads


def max_ranks(parallel: ParallelConfig) -> int:
    """Ranks of the largest group that the config allows."""
    if parallel.gpus_per_group == "auto":
        return GROUP_SIZES[-1]
    ulysses, ring = parallel.ulysses_degree or DEFAULT_PLAN.ulysses_degree, parallel.ring_degree or 1
    return parallel.gpus_per_group or ulysses * ring * parallel.cfg_degree


def group_problems(
    parallel: ParallelConfig,
    groups: GroupsConfig,
    encoders: EncodersConfig,
    model: ModelConfig,
    gpu: str | None,
    gpu_memory_gib: float | None,
) -> Iterator[str]:
    """The contradictions between the config's keys about group sizes, one sentence each."""
    nodes = groups.nodes_per_group
    size, ulysses, ring, cfg = (
        parallel.gpus_per_group,
        parallel.ulysses_degree,
        parallel.ring_degree,
        parallel.cfg_degree,
    )
    if size == "auto":
        yield from _problems_of_auto(parallel, groups, encoders, model, gpu, gpu_memory_gib)
        return
    if groups.max_sample_minutes is not None:
        yield (
            f"groups.max_sample_minutes = {groups.max_sample_minutes:g} with parallel.gpus_per_group = {size}; "
            "allowed: together with parallel.gpus_per_group = auto, whose choice it bounds"
        )
    given = (ulysses or 1) * (ring or 1) * cfg
    if size is not None and (size % given or (ulysses and ring and given != size)):
        degrees = {"ulysses_degree": ulysses, "ring_degree": ring, "cfg_degree": cfg}
        given_degrees = ", ".join(f"{name} = {degree}" for name, degree in degrees.items() if degree is not None)
        yield (
            f"parallel.gpus_per_group = {size} with {given_degrees}; allowed: degrees whose product is {size}, or "
            "no degrees, and they are chosen"
        )
        return
    crossing = size // (ulysses or 1) if size and not ring else (ring or 1) * cfg
    if crossing % nodes:
        yield _factorisations_over_nodes(nodes, max_ranks(parallel))


def divisors(number: int) -> list[int]:
    """The divisors of a number, in order. The time grows with its square root."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _factorisations_over_nodes(nodes: int, ranks: int) -> str:
    allowed = [f"{u} x {ranks // u}" for u in divisors(ranks) if ranks // u % nodes == 0]
    return (
        f"groups.nodes_per_group = {nodes} with {ranks} rank(s) a group; only the ring and the guidance branches cross "
        f"nodes, so ring_degree x cfg_degree must be a multiple of {nodes}. With cfg_degree 1, ulysses_degree x "
        f"ring_degree may be {', '.join(allowed) or f'none of these: choose a number of ranks that {nodes} divides'}"
    )


def _problems_of_auto(
    parallel: ParallelConfig,
    groups: GroupsConfig,
    encoders: EncodersConfig,
    model: ModelConfig,
    gpu: str | None,
    gpu_memory_gib: float | None,
) -> Iterator[str]:
    auto = "parallel.gpus_per_group = auto"
    if model.engine != ENGINE:
        yield (
            f"{auto} with model.engine = {model.engine}, which has no cost model; allowed: a number of GPUs, "
            f"or auto with {ENGINE}"
        )
    hardware = {"gpu": gpu, "gpu_memory_gib": gpu_memory_gib}
    if missing := [key for key, value in hardware.items() if value is None]:
        yield (
            f"{auto} without {' and '.join(missing)}; "
            "allowed: auto with both keys, for example gpu: H100 and gpu_memory_gib: 79.6"
        )
    degrees = {"ulysses_degree": parallel.ulysses_degree, "ring_degree": parallel.ring_degree}
    if degrees_given := " and ".join(f"{name} = {degree}" for name, degree in degrees.items() if degree is not None):
        yield f"{auto} with {degrees_given}; allowed: neither of them, because auto chooses them for every shape"
    if groups.nodes_per_group > 1:
        yield (
            f"{auto} with groups.nodes_per_group = {groups.nodes_per_group}; allowed: 1, because auto chooses "
            "among groups that fit on one node"
        )
    if encoders.is_colocated:
        yield (
            f"{auto} with encoders.placement = colocated; allowed: pool, because the number of encoders that fit "
            "on the GPUs of a group depends on its size"
        )
