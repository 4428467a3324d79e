"""Training data of the DiT: latents of scenes from the frozen VAE, and caption embeddings from the frozen towers."""

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
from hv_batch.sampling_params import DEFAULT_NEGATIVE_PROMPT
from hv_batch.toy.captions import caption
from hv_batch.toy.training.lean import lean_autocast
from hv_batch.toy.training.scenes import Phase, Scenes, batches, to_pixels
from hv_batch.toy.training.vae import SCALING
from hv_batch.toy.world import Scene, draw

UNCONDITIONAL = 0.1  # fraction of samples with the default negative prompt as caption, for classifier-free guidance
WORDINGS = 2  # captions per scene
VAE_BATCH = 8  # scenes
TEXT_BATCH = 128  # scenes


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Embeddings of a batch of texts: states [B, S, D], mask [B, S], pooled [B, D2]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


@dataclass(frozen=True, slots=True)
class EncodedScenes:
    """Latents [N, 16, T, h, w] in half precision and the texts of the scenes, all on the training device.

    `texts` has WORDINGS texts of each scene, in the order of the scenes, and the unconditional text as the last row.
    """

    latents: Tensor
    texts: TextBatch

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, TextBatch]]:
        """Yield an endless series of random batches: float32 latents, and one text of each scene at random."""
        device = self.latents.device
        while True:
            chosen = rng.integers(len(self.latents), size=size)
            text_rows = chosen * WORDINGS + rng.integers(WORDINGS, size=size)
            text_rows[rng.random(size) < UNCONDITIONAL] = len(self.texts.mask) - 1
            rows = torch.from_numpy(text_rows).to(device)
            texts = TextBatch(self.texts.states[rows], self.texts.mask[rows], self.texts.pooled[rows])
            yield self.latents[torch.from_numpy(chosen).to(device)].float(), texts


def encode_scenes(
    vae: Any, towers: TextTowers, phase: Phase, count: int, seed: int, device: torch.device, file: Path
) -> EncodedScenes:
    """Encode `count` training scenes in the shape of the phase. The latents are cached in `file`.

    `towers` must be on the CPU, because several processes encode with them.
    """
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        draft = file.with_suffix(".draft")
        torch.save(_encode_latents(vae, phase, count, seed, device).cpu(), draft)
        draft.replace(file)
    latents = torch.load(file, weights_only=True).to(device)
    is_image = phase.num_frames == 1

    def embed(scene: Scene, rng: np.random.Generator) -> Sequence[TextEmbedding]:
        return towers.encode([caption(scene, rng, phase.num_frames) for _ in range(WORDINGS)], image=is_image)

    parts = [*batches(Scenes(seed, count, phase.num_frames, embed), TEXT_BATCH, device, _collate)]
    parts.append(_collate([towers.encode([DEFAULT_NEGATIVE_PROMPT], image=is_image)]))
    longest = max(part.mask.shape[1] for part in parts)
    states = torch.cat([F.pad(part.states, (0, 0, 0, longest - part.mask.shape[1])) for part in parts])
    mask = torch.cat([F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts])
    texts = TextBatch(states.to(device), mask.to(device), torch.cat([part.pooled for part in parts]).to(device))
    return EncodedScenes(latents, texts)


@torch.no_grad()
def _encode_latents(vae: Any, phase: Phase, count: int, seed: int, device: torch.device) -> Tensor:
    def drawn(scene: Scene, rng: np.random.Generator) -> np.ndarray:
        return draw(scene, phase.num_frames, phase.height, phase.width, rng)

    parts = []
    for frames in batches(Scenes(seed, count, phase.num_frames, drawn), VAE_BATCH, device):
        with lean_autocast(device):
            latents = vae.encode(to_pixels(frames, device)).latent_dist.mode()
        parts.append((SCALING * latents.float()).half())
    return torch.cat(parts)


def _collate(embeddings: Sequence[Sequence[TextEmbedding]]) -> TextBatch:
    """Return the texts of several scenes, padded to the longest one."""
    texts = [text for of_scene in embeddings for text in of_scene]
    states = pad_sequence([text.states for text in texts], batch_first=True)
    lengths = torch.tensor([len(text.states) for text in texts])
    mask = (torch.arange(states.shape[1]) < lengths[:, None]).float()
    return TextBatch(states, mask, torch.stack([text.pooled for text in texts]))
