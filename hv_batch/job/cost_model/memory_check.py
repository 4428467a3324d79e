"""Refuses a run whose largest shape does not fit into GPU memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hv_batch.job.config.colocation import rank_gpus
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import ENGINE
from hv_batch.job.cost_model.memory import GIB, decoder_footprint, encoder_footprint, rank_footprint
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.protocol import ParallelPlan, Shape, UserError


def check_memory(config: RunConfig, plans: Mapping[Shape, ParallelPlan]) -> None:
    """Raises UserError when `gpu_memory_gib` is given and a worker needs more than its share of it (P6).

    `plans` are those of every shape of the manifest. The engine must have accepted the config's options.
    """
    if short := memory_problems(config, plans):
        raise UserError("This run does not fit into GPU memory:\n" + "\n".join(f"  - {line}" for line in short))


def memory_problems(config: RunConfig, plans: Mapping[Shape, ParallelPlan]) -> list[str]:
    """Which workers cannot hold what they must, one sentence each; empty where `gpu_memory_gib` is not given."""
    if config.gpu_memory_gib is None or config.parallel.device != "cuda" or config.model.engine != ENGINE:
        return []
    model = ModelShape.from_options(config.model.options)
    return list(_shortages(config, config.gpu_memory_gib, model, plans))


def _shortages(config: RunConfig, gib: float, model: ModelShape, plans: Mapping[Shape, ParallelPlan]) -> Iterator[str]:
    decodes = config.decoders.placement == "group"
    for shape, plan in sorted(plans.items(), key=lambda item: item[0]):
        need = rank_footprint(model, shape, plan.ulysses_degree, plan.ring_degree, decodes=decodes).total
        if need > gib * rank_gpus(config) * GIB:
            yield (
                f"{_named(shape)} needs about {need / GIB:.1f} GiB on each rank of a group, and gpu_memory_gib = "
                f"{gib:g} with {rank_gpus(config):g} of a GPU for a rank; raise parallel.gpus_per_group, set "
                "model.options.offload to blocks, or render it smaller"
            )
        need = 0 if decodes else decoder_footprint(model, shape).total
        if need > gib * config.decoders.gpus * GIB:
            yield (
                f"{_named(shape)} needs about {need / GIB:.1f} GiB to decode, and gpu_memory_gib = {gib:g} with "
                f"decoders.gpus = {config.decoders.gpus:g}; raise decoders.gpus, or set smaller tiles in "
                "model.options.vae_tile (which changes the pixels)"
            )
    need = encoder_footprint(model).total
    if need > gib * config.encoders.gpus * GIB:
        yield (
            f"the text encoders need about {need / GIB:.1f} GiB, and gpu_memory_gib = {gib:g} with encoders.gpus = "
            f"{config.encoders.gpus:g}; raise encoders.gpus"
        )


def _named(shape: Shape) -> str:
    height, width, frames = shape
    return f"{height}x{width}x{frames}"
