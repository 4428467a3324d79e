"""Checks that every worker of a run has enough GPU memory for the manifest's shapes."""

from __future__ import annotations

from collections.abc import Iterator

from hv_batch.job.config.sections import ENGINE
from hv_batch.job.cost_model.memory import GIB, decoder_footprint, encoder_footprint, rank_footprint
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.workload import shape_name
from hv_batch.protocol import UserError


def check_memory(run: ResolvedRun) -> None:
    """Raises UserError if `gpu_memory_gib` is given and a worker needs more than its share of it (P6)."""
    if problems := memory_problems(run):
        raise UserError("This run does not fit into GPU memory:\n" + "\n".join(f"  - {line}" for line in problems))


def memory_problems(run: ResolvedRun) -> list[str]:
    """One sentence for each worker that has too little memory; none if `gpu_memory_gib` is not given."""
    config = run.config
    if config.gpu_memory_gib is None or config.parallel.device != "cuda" or config.model.engine != ENGINE:
        return []
    return list(_shortages(run, config.gpu_memory_gib))


def _shortages(run: ResolvedRun, gib: float) -> Iterator[str]:
    config, model = run.config, run.model
    for shape, plan in sorted(run.groups.by_shape.items(), key=lambda item: item[0]):
        need = rank_footprint(model, shape, plan.ulysses_degree, plan.ring_degree, decodes=run.groups_decode).total
        if need > gib * run.rank_gpus * GIB:
            yield (
                f"{shape_name(shape)} needs about {need / GIB:.1f} GiB on each rank of a group, and gpu_memory_gib = "
                f"{gib:g} with {run.rank_gpus:g} of a GPU for a rank; raise parallel.gpus_per_group, set "
                "model.options.offload to blocks, or render it smaller"
            )
        need = 0 if run.groups_decode else decoder_footprint(model, shape).total
        if need > gib * config.decoders.gpus * GIB:
            yield (
                f"{shape_name(shape)} needs about {need / GIB:.1f} GiB to decode, and gpu_memory_gib = {gib:g} with "
                f"decoders.gpus = {config.decoders.gpus:g}; raise decoders.gpus, or set smaller tiles in "
                "model.options.vae_tile (which changes the pixels)"
            )
    need = encoder_footprint(model).total
    if need > gib * config.encoders.gpus * GIB:
        yield (
            f"the text encoders need about {need / GIB:.1f} GiB, and gpu_memory_gib = {gib:g} with encoders.gpus = "
            f"{config.encoders.gpus:g}; raise encoders.gpus"
        )
