"""Scenes as the DiT learns from them: latents coded once by the frozen VAE, captions read once by the frozen towers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hv_batch.engine.text_encoders import TextEmbedding, TextTowers
from hv_batch.protocol import DEFAULT_NEGATIVE_PROMPT
from hv_batch.toy.captions import caption
from hv_batch.toy.training.lean import lean_autocast
from hv_batch.toy.training.scenes import Phase, Scenes, batches, to_pixels
from hv_batch.toy.training.vae import SCALING
from hv_batch.toy.world import Scene, draw

UNCONDITIONAL = 0.1  # share of samples whose caption is the default negative prompt, for classifier-free guidance
WORDINGS = 2  # of each scene
CODED_AT_ONCE = 8  # scenes
READ_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Told:
    """A batch of text: states [B, S, D], mask [B, S], pooled [B, D2]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


@dataclass(frozen=True, slots=True)
class CodedScenes:
    """`latents` [N, 16, T, h, w] in half precision, and what is told of them, all on the device of the training.

    `told` holds WORDINGS texts of each scene, one scene after the other, and at last the unconditional text.
    """

    latents: Tensor
    told: Told

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Told]]:
        """Endless batches, each sample with a wording of its own."""
        device = self.latents.device
        while True:
            chosen = rng.integers(len(self.latents), size=size)
            said = chosen * WORDINGS + rng.integers(WORDINGS, size=size)
            said[rng.random(size) < UNCONDITIONAL] = len(self.told.mask) - 1
            rows = torch.from_numpy(said).to(device)
            told = Told(self.told.states[rows], self.told.mask[rows], self.told.pooled[rows])
            yield self.latents[torch.from_numpy(chosen).to(device)].float(), told


def code_scenes(
    vae: Any, towers: TextTowers, phase: Phase, count: int, seed: int, device: torch.device, file: Path
) -> CodedScenes:
    """`count` scenes that are not held out, in the shape of the phase. Their latents are kept as `file`.

    `towers` compute on the CPU, where several processes read with them.
    """
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        draft = file.with_suffix(".draft")
        torch.save(_code(vae, phase, count, seed, device).cpu(), draft)
        draft.replace(file)
    latents = torch.load(file, weights_only=True).to(device)
    is_image = phase.num_frames == 1

    def read(scene: Scene, rng: np.random.Generator) -> Sequence[TextEmbedding]:
        return towers.encode([caption(scene, rng, phase.num_frames) for _ in range(WORDINGS)], image=is_image)

    parts = [*batches(Scenes(seed, count, phase.num_frames, read), READ_AT_ONCE, device, _tell)]
    parts.append(_tell([towers.encode([DEFAULT_NEGATIVE_PROMPT], image=is_image)]))
    longest = max(part.mask.shape[1] for part in parts)
    states = torch.cat([F.pad(part.states, (0, 0, 0, longest - part.mask.shape[1])) for part in parts])
    mask = torch.cat([F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts])
    told = Told(states.to(device), mask.to(device), torch.cat([part.pooled for part in parts]).to(device))
    return CodedScenes(latents, told)


@torch.no_grad()
def _code(vae: Any, phase: Phase, count: int, seed: int, device: torch.device) -> Tensor:
    def drawn(scene: Scene, rng: np.random.Generator) -> np.ndarray:
        return draw(scene, phase.num_frames, phase.height, phase.width, rng)

    coded = []
    for frames in batches(Scenes(seed, count, phase.num_frames, drawn), CODED_AT_ONCE, device):
        with lean_autocast(device):
            latents = vae.encode(to_pixels(frames, device)).latent_dist.mode()
        coded.append((SCALING * latents.float()).half())
    return torch.cat(coded)


def _tell(embeddings: Sequence[Sequence[TextEmbedding]]) -> Told:
    """The texts of several scenes, padded to the longest of them."""
    texts = [text for of_scene in embeddings for text in of_scene]
    states = pad_sequence([text.states for text in texts], batch_first=True)
    lengths = torch.tensor([len(text.states) for text in texts])
    mask = (torch.arange(states.shape[1]) < lengths[:, None]).float()
    return Told(states, mask, torch.stack([text.pooled for text in texts]))
