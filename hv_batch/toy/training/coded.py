"""Scenes as the DiT learns from them: latents coded once by the frozen VAE, captions read once by the frozen towers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hv_batch.engine.text import TextEmbedding, TextTowers
from hv_batch.protocol import DEFAULT_NEGATIVE_PROMPT
from hv_batch.toy.captions import caption, told_scenes
from hv_batch.toy.training.lean import lean_autocast
from hv_batch.toy.training.vae import SCALING, Phase, to_pixels
from hv_batch.toy.world import Scene, draw

UNCONDITIONAL = 0.1  # share of samples whose caption is the default negative prompt, for classifier-free guidance
WORDINGS = 2  # of each scene


@dataclass(frozen=True, slots=True)
class Told:
    """A batch of text: states [B, S, D], mask [B, S], pooled [B, D2]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


@dataclass(frozen=True, slots=True)
class CodedScenes:
    """`latents` [N, 16, T, h, w] in half precision, and some `wordings` of each, both as the DiT gets them."""

    latents: Tensor
    wordings: Sequence[Sequence[TextEmbedding]]
    unconditional: Sequence[TextEmbedding]

    def batches(self, size: int, rng: np.random.Generator, device: torch.device) -> Iterator[tuple[Tensor, Told]]:
        """Endless batches, each sample with a wording of its own."""
        while True:
            chosen = rng.integers(len(self.latents), size=size)
            said = [self.unconditional if rng.random() < UNCONDITIONAL else self.wordings[one] for one in chosen]
            told = tell([one[int(rng.integers(len(one)))] for one in said], device)
            yield self.latents[chosen].to(device).float(), told


def code_scenes(
    vae: Any, towers: TextTowers, phase: Phase, count: int, seed: int, device: torch.device, file: Path
) -> CodedScenes:
    """`count` scenes that are not held out, in the shape of the phase. Their latents are kept as `file`."""
    scenes = [scene for scene, _ in islice(told_scenes(seed, phase.num_frames, held_out=False), count)]
    rng = np.random.default_rng(seed)
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        draft = file.with_suffix(".draft")
        torch.save(_code(vae, scenes, phase, rng, device), draft)
        draft.replace(file)
    latents = torch.load(file, weights_only=True)
    is_image = phase.num_frames == 1
    # Towers read one prompt at a time, so that its bits depend on no other: what they say is kept.
    wordings = [
        towers.encode([caption(scene, rng, phase.num_frames) for _ in range(WORDINGS)], image=is_image)
        for scene in scenes
    ]
    return CodedScenes(latents, wordings, towers.encode([DEFAULT_NEGATIVE_PROMPT], image=is_image))


@torch.no_grad()
def _code(vae: Any, scenes: Sequence[Scene], phase: Phase, rng: np.random.Generator, device: torch.device) -> Tensor:
    coded = []
    for scene in scenes:
        pixels = to_pixels(draw(scene, phase.num_frames, phase.height, phase.width, rng)[None]).to(device)
        with lean_autocast(device):
            coded.append(SCALING * vae.encode(pixels).latent_dist.mode().float())
    return torch.cat(coded).half().cpu()


def tell(embeddings: Sequence[TextEmbedding], device: torch.device) -> Told:
    """Padded to the longest."""
    states = pad_sequence([one.states for one in embeddings], batch_first=True)
    lengths = torch.tensor([len(one.states) for one in embeddings])
    mask = (torch.arange(states.shape[1]) < lengths[:, None]).float()
    return Told(states.to(device), mask.to(device), torch.stack([one.pooled for one in embeddings]).to(device))
