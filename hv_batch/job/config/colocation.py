"""Encoders that share the GPUs of denoise groups, and the part of a GPU that is left to a rank.

All ranks of a group leave the same share of their GPU, because Ray chooses the GPU that an encoder gets.
"""

from __future__ import annotations

from hv_batch.job.config.run_config import RunConfig


def rank_gpus(config: RunConfig) -> float:
    """The share of a GPU that is left to a rank."""
    taken = config.encoders.gpus if config.encoders.is_colocated else 0.0
    return round(config.groups.gpus_per_rank - taken, 4)  # the resolution of Ray's resource amounts
