"""A small DiT config and text embeddings for tests of whole trajectories."""

from __future__ import annotations

import torch

from hv_batch.architecture import DiTConfig
from hv_batch.engine.text_encoders import TextEmbedding

CONFIG = DiTConfig(
    hidden_size=48,
    heads_num=8,
    mm_double_blocks_depth=1,
    mm_single_blocks_depth=1,
    rope_dim_list=(2, 2, 2),
    text_states_dim=16,
    text_states_dim_2=8,
    refiner_depth=1,
)


CPU = torch.device("cpu")


def random_text(length: int) -> TextEmbedding:
    """Return a random embedding of `length` tokens, a function of the length only."""
    draw = torch.Generator().manual_seed(length)
    states = torch.randn(length, CONFIG.text_states_dim, generator=draw)
    return TextEmbedding(states, torch.randn(CONFIG.text_states_dim_2, generator=draw), length, 0)
