"""Encoders and decoders that stand on the GPUs of denoise groups, and what they leave to the ranks.

The ranks of a group give up the same share of each of their GPUs, enough for one lodger of each kind: which GPU a
lodger gets is chosen by Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hv_batch.job.events import Stage

if TYPE_CHECKING:
    from hv_batch.job.config import DecodersConfig, EncodersConfig, RunConfig


def lodging_pools(config: RunConfig) -> Mapping[Stage, EncodersConfig | DecodersConfig]:
    """The pools without GPUs of their own."""
    pools: dict[Stage, EncodersConfig | DecodersConfig] = {
        Stage.ENCODE: config.encoders,
        Stage.DECODE: config.decoders,
    }
    return {stage: pool for stage, pool in pools.items() if pool.placement == "colocated"}


def rank_gpus(config: RunConfig) -> float:
    """The share of a GPU that is left to a rank."""
    left = config.groups.gpus_per_rank - sum(pool.gpus for pool in lodging_pools(config).values())
    return round(left, 4)  # the grain of Ray's own sums
