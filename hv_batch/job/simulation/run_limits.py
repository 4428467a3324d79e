"""What the simulator needs of a resolved run: the scheduler's limits, and the GPUs of its workers."""

from __future__ import annotations

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.scheduling.capacity import retry_limits
from hv_batch.job.simulation.fleet import Demand
from hv_batch.job.simulation.simulator import Limits
from hv_batch.job.stages import Stage


def run_limits(run: ResolvedRun, samples: int) -> Limits:
    """The limits of a run of `samples` samples, without bounds on the object stores."""
    config = run.config
    groups = config.groups
    demands = {
        (Stage.DENOISE, size_class): Demand(round(run.ranks_per_node(plan) * run.rank_gpus, 4), groups.nodes_per_group)
        for size_class, plan in enumerate(run.groups.plans)
    }
    demands[Stage.ENCODE, 0] = Demand(config.encoders.gpus)
    demands[Stage.DECODE, 0] = Demand(config.decoders.gpus)
    return Limits(
        stages=run.stage_limits({}),
        retries=retry_limits(config, samples),
        drain_s=config.timeouts.drain_s,
        demands=demands,
        checkpoint_every=groups.checkpoint_every,
    )
