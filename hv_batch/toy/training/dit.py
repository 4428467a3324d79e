"""The DiT learns to draw what captions say: flow matching on the VAE's latents, conditioned by the frozen towers.

    latents x0 of a scene, noise e, sigma in 0..1:   x = (1 - sigma) x0 + sigma e,   the model learns  e - x0

which is the velocity that the sampler follows from sigma 1 to 0 (spec section 4). The module is diffusers', with
batches and gradients; what is written are its tensors under their released names. Weights are averaged over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hv_batch.engine.diffusers_layout import dit_options, released_dit
from hv_batch.engine.tensor_files import stored
from hv_batch.engine.text import TextEmbedding, TextTowers
from hv_batch.protocol import DEFAULT_NEGATIVE_PROMPT
from hv_batch.toy.captions import caption, told_scenes
from hv_batch.toy.checkpoint import write_dit
from hv_batch.toy.training.vae import SCALING, Phase, to_pixels
from hv_batch.toy.world import Scene, draw

WIDTHS: dict[str, Any] = {
    "num_attention_heads": 8,  # so that a group of eight ranks can share them out
    "attention_head_dim": 24,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_refiner_layers": 1,
    "rope_axes_dim": (8, 8, 8),
}
LEARNING_RATE = 1e-3
UNCONDITIONAL = 0.1  # share of samples whose caption is the default negative prompt, for classifier-free guidance
GUIDANCE = 6000.0  # the embedded guidance is a constant that the toy learns to ignore
AVERAGING = 0.998
WORDINGS = 2  # of each scene


@dataclass(frozen=True, slots=True)
class Settings:
    """Phases are passed through in order; `scenes` a phase are coded once, and met again with other noise."""

    phases: tuple[Phase, ...] = (
        Phase(6000, 64, 1, 128, 128),
        Phase(1500, 16, 9, 128, 128),
        Phase(3000, 8, 33, 128, 128),
        Phase(500, 8, 33, 96, 160),
        Phase(500, 8, 33, 160, 96),
        Phase(500, 16, 1, 128, 128),
        Phase(1000, 8, 33, 128, 128),
    )
    scenes: int = 4000
    shift: float = 3.0  # of the sigmas: most of what there is to decide is decided early
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Told:
    """A batch of text: states [B, S, D], mask [B, S], pooled [B, D2]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor


def train_dit(
    root: Path, vae: Any, towers: TextTowers, settings: Settings, device: torch.device, say: Callable[[str], None]
) -> None:
    """Train and write below `root` as released. `vae` is what `train_vae` returns."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(settings.seed)
    [told] = towers.encode([""], image=False)
    model = HunyuanVideoTransformer3DModel(
        **WIDTHS, text_embed_dim=told.states.shape[-1], pooled_projection_dim=len(told.pooled)
    ).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.95))
    total = sum(phase.steps for phase in settings.phases)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total, pct_start=0.05)
    for number, phase in enumerate(settings.phases):
        batches = _batches(vae, towers, phase, settings, settings.seed + number, device)
        for step in range(1, phase.steps + 1):
            loss = _loss(model, *next(batches), settings.shift)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            if step % 50 == 0:
                say(f"DiT, {phase.num_frames} x {phase.height} x {phase.width}: step {step}, loss {loss.item():.4f}")
        _write(root, average.module)


def _loss(model: Any, latents: Tensor, told: Told, shift: float) -> Tensor:
    """The mean squared error of the velocity at random sigmas."""
    uniform = torch.rand(len(latents), device=latents.device)
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    noise = torch.randn_like(latents)
    at = sigma[:, None, None, None, None]
    velocity = model(
        hidden_states=(1 - at) * latents + at * noise,
        timestep=sigma * 1000,
        encoder_hidden_states=told.states,
        encoder_attention_mask=told.mask,
        pooled_projections=told.pooled,
        guidance=torch.full_like(sigma, GUIDANCE),
        return_dict=False,
    )[0]
    return (velocity - (noise - latents)).square().mean()


def _batches(
    vae: Any, towers: TextTowers, phase: Phase, settings: Settings, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Told]]:
    """Endless batches of latents [B, 16, T, h, w], as the DiT sees them, each with a wording of its own."""
    count = min(settings.scenes, phase.steps * phase.batch)
    scenes = [scene for scene, _ in islice(told_scenes(seed, phase.num_frames, held_out=False), count)]
    latents = _code(vae, scenes, phase, seed, device)
    is_image = phase.num_frames == 1
    rng = np.random.default_rng(seed)
    # Towers read one prompt at a time, so that its bits depend on no other: what they say is kept.
    wordings = [
        towers.encode([caption(scene, rng, phase.num_frames) for _ in range(WORDINGS)], image=is_image)
        for scene in scenes
    ]
    unconditional = towers.encode([DEFAULT_NEGATIVE_PROMPT], image=is_image)
    while True:
        chosen = rng.integers(count, size=phase.batch)
        said = [unconditional if rng.random() < UNCONDITIONAL else wordings[one] for one in chosen]
        yield latents[chosen].to(device).float(), _tell([one[rng.integers(len(one))] for one in said], device)


@torch.no_grad()
def _code(vae: Any, scenes: Sequence[Scene], phase: Phase, seed: int, device: torch.device) -> Tensor:
    """Latents of all scenes in half precision, on the CPU."""
    rng = np.random.default_rng(seed)
    coded = []
    for scene in scenes:
        frames = draw(scene, phase.num_frames, phase.height, phase.width, rng)
        coded.append(SCALING * vae.encode(to_pixels(frames[None]).to(device)).latent_dist.mode())
    return torch.cat(coded).half().cpu()


def _tell(embeddings: Sequence[TextEmbedding], device: torch.device) -> Told:
    """Padded to the longest."""
    states = pad_sequence([one.states for one in embeddings], batch_first=True)
    lengths = torch.tensor([len(one.states) for one in embeddings])
    mask = (torch.arange(states.shape[1]) < lengths[:, None]).float()
    return Told(states.to(device), mask.to(device), torch.stack([one.pooled for one in embeddings]).to(device))


def _write(root: Path, model: Any) -> None:
    tensors = {name: stored(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    released = released_dit(tensors, root)
    state = {name: one.read(torch.device("cpu"), torch.bfloat16) for name, one in released.items()}
    write_dit(root, dit_options(dict(model.config), root), state)
