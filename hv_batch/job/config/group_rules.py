"""What a config may say about the sizes of its groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hv_batch.job.config.sections import ENGINE
from hv_batch.protocol import ParallelPlan

if TYPE_CHECKING:
    from hv_batch.job.config.run_config import RunConfig

NODE_GPUS = 8  # of the usual server with any of the GPUs that the cost model knows
GROUP_SIZES = (1, 2, 4, 8)  # its divisors: groups of these sizes share a node without a rest

DEFAULT_PLAN = ParallelPlan(ulysses_degree=8, ring_degree=1)  # 8 divides the released model's 24 heads


def most_ranks(config: RunConfig) -> int:
    """Of the largest group that the config could ask for."""
    parallel = config.parallel
    if parallel.gpus_per_group == "auto":
        return GROUP_SIZES[-1]
    ulysses, ring = parallel.ulysses_degree or DEFAULT_PLAN.ulysses_degree, parallel.ring_degree or 1
    return parallel.gpus_per_group or ulysses * ring * parallel.cfg_degree


def find_faults(config: RunConfig) -> Iterator[str]:
    """What the config's keys about group sizes have against each other, one sentence each."""
    parallel, nodes = config.parallel, config.groups.nodes_per_group
    size, ulysses, ring, cfg = (
        parallel.gpus_per_group,
        parallel.ulysses_degree,
        parallel.ring_degree,
        parallel.cfg_degree,
    )
    if size == "auto":
        yield from _faults_of_auto(config)
        return
    if config.groups.max_sample_minutes is not None:
        yield (
            f"groups.max_sample_minutes = {config.groups.max_sample_minutes:g} with parallel.gpus_per_group = {size}; "
            "allowed: together with parallel.gpus_per_group = auto, whose choice it bounds"
        )
    given = (ulysses or 1) * (ring or 1) * cfg
    if size is not None and (size % given or (ulysses and ring and given != size)):
        degrees = {"ulysses_degree": ulysses, "ring_degree": ring, "cfg_degree": cfg}
        told = ", ".join(f"{name} = {degree}" for name, degree in degrees.items() if degree is not None)
        yield (
            f"parallel.gpus_per_group = {size} with {told}; allowed: degrees whose product is {size}, or none, and "
            "they are chosen"
        )
        return
    crossing = size // (ulysses or 1) if size and not ring else (ring or 1) * cfg
    if crossing % nodes:
        yield _factorisations_over_nodes(nodes, most_ranks(config))


def _factorisations_over_nodes(nodes: int, ranks: int) -> str:
    allowed = [f"{u} x {ranks // u}" for u in range(1, ranks + 1) if ranks % u == 0 and ranks // u % nodes == 0]
    return (
        f"groups.nodes_per_group = {nodes} with {ranks} rank(s) a group; only the ring and the guidance branches cross "
        f"nodes, so ring_degree x cfg_degree must be a multiple of {nodes}. With cfg_degree 1, ulysses_degree x "
        f"ring_degree may be {', '.join(allowed) or f'nothing: choose a number of ranks that {nodes} divides'}"
    )


def _faults_of_auto(config: RunConfig) -> Iterator[str]:
    auto = "parallel.gpus_per_group = auto"
    if config.model.engine != ENGINE:
        yield (
            f"{auto} with model.engine = {config.model.engine}, whose costs are not known; allowed: a number of GPUs, "
            f"or auto with {ENGINE}"
        )
    if config.gpu is None or config.gpu_memory_gib is None:
        yield (
            f"{auto} without {' and '.join(key for key in ('gpu', 'gpu_memory_gib') if getattr(config, key) is None)}; "
            "allowed: auto where the config tells what the GPUs are, as gpu: H100 and gpu_memory_gib: 79.6"
        )
    degrees = {"ulysses_degree": config.parallel.ulysses_degree, "ring_degree": config.parallel.ring_degree}
    if told := " and ".join(f"{name} = {degree}" for name, degree in degrees.items() if degree is not None):
        yield f"{auto} with {told}; allowed: none of both, because auto chooses them for every shape"
    if config.groups.nodes_per_group > 1:
        yield (
            f"{auto} with groups.nodes_per_group = {config.groups.nodes_per_group}; allowed: 1, because auto chooses "
            "among groups that fit on one node"
        )
    if config.encoders.is_colocated:
        yield (
            f"{auto} with encoders.placement = colocated; allowed: pool, because the number of encoders that a group "
            "has GPUs for depends on its size"
        )
