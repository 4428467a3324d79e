"""The DiT learns to draw what captions say: flow matching on the VAE's latents, conditioned by the frozen towers.

    latents x0 of a scene, noise e, sigma in 0..1:   x = (1 - sigma) x0 + sigma e,   the model learns  e - x0

which is the velocity that the sampler follows from sigma 1 to 0 (spec section 4). The module is diffusers', with
batches and gradients; what is written are its tensors under their released names. Weights are averaged over steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hv_batch.engine.diffusers_layout import dit_options, released_dit
from hv_batch.engine.tensor_files import stored
from hv_batch.engine.text import TextTowers
from hv_batch.toy.checkpoint import write_dit
from hv_batch.toy.training.coded import Told, code_scenes
from hv_batch.toy.training.lean import lean_attention
from hv_batch.toy.training.vae import Phase

WIDTHS: dict[str, Any] = {
    "num_attention_heads": 8,  # so that a group of eight ranks can share them out
    "attention_head_dim": 24,
    "num_layers": 1,
    "num_single_layers": 5,
    "num_refiner_layers": 1,
    "rope_axes_dim": (8, 8, 8),
}
MUON_RATE = 2e-3  # of the blocks' matrices
ADAM_RATE = 1e-3  # of all else
DECAY = 0.01
GUIDANCE = 6000.0  # the embedded guidance is a constant that the toy learns to ignore
AVERAGING = 0.998

Stage = tuple[Phase, ...]  # whose steps are mixed


@dataclass(frozen=True, slots=True)
class Settings:
    """Stages are passed through in order. Scenes are coded once and met again with other noise and wordings."""

    stages: tuple[Stage, ...] = (
        (Phase(1200, 32, 1, 128, 128), Phase(150, 32, 1, 96, 160), Phase(150, 32, 1, 160, 96)),
        (
            Phase(1600, 8, 33, 128, 128),
            Phase(400, 8, 33, 96, 160),
            Phase(400, 8, 33, 160, 96),
            Phase(200, 32, 1, 128, 128),
            Phase(50, 32, 1, 96, 160),
            Phase(50, 32, 1, 160, 96),
        ),
    )
    met: int = 8  # how often a scene is met on average
    shift: float = 3.0  # of the sigmas: most of what there is to decide is decided early
    seed: int = 0


def train_dit(
    root: Path, vae: Any, towers: TextTowers, settings: Settings, device: torch.device, say: Callable[[str], None]
) -> None:
    """Train and write below `root` as released. `vae` is what `train_vae` returns."""
    training = _Training.begin(towers, settings, device)
    for number, stage in enumerate(settings.stages):
        order = np.random.default_rng((settings.seed, number)).permutation(
            np.repeat(np.arange(len(stage)), [phase.steps for phase in stage])
        )
        batches: list[Iterator[tuple[Tensor, Told]]] = []
        for place, phase in enumerate(stage):
            seed = 100 * settings.seed + 10 * number + place
            count = -(-phase.steps * phase.batch // settings.met)
            say(f"DiT, stage {number + 1}: coding {count} scenes of {_told(phase)}")
            coded = code_scenes(vae, towers, phase, count, seed, device)
            batches.append(coded.batches(phase.batch, np.random.default_rng(seed), device))
        losses: list[float] = []
        for step, chosen in enumerate(order, 1):
            latents, told = next(batches[chosen])
            losses.append(training.step(latents, told, settings.shift))
            if step % 50 == 0:
                say(f"DiT, stage {number + 1}: step {step} of {len(order)}, loss {np.mean(losses[-50:]):.4f}")
            if step % 500 == 0:
                _write(root, training.average.module)
        _write(root, training.average.module)


@dataclass(frozen=True, slots=True)
class _Training:
    """A model, its average, and what moves it."""

    model: Any
    average: AveragedModel
    optimizers: tuple[torch.optim.Optimizer, ...]
    schedules: tuple[torch.optim.lr_scheduler.LRScheduler, ...]

    @classmethod
    def begin(cls, towers: TextTowers, settings: Settings, device: torch.device) -> _Training:
        from diffusers import HunyuanVideoTransformer3DModel

        torch.manual_seed(settings.seed)
        [told] = towers.encode([""], image=False)
        model = HunyuanVideoTransformer3DModel(
            **WIDTHS, text_embed_dim=told.states.shape[-1], pooled_projection_dim=len(told.pooled)
        ).to(device)
        named = dict(model.named_parameters())
        matrices = [one for name, one in named.items() if one.ndim == 2 and "transformer_blocks" in name]
        others = [one for name, one in named.items() if not (one.ndim == 2 and "transformer_blocks" in name)]
        optimizers = (
            torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=ADAM_RATE, weight_decay=DECAY, betas=(0.9, 0.95)),
        )
        total = sum(phase.steps for stage in settings.stages for phase in stage)
        schedules = tuple(
            torch.optim.lr_scheduler.LambdaLR(one, lambda step: _trapezium(step / total)) for one in optimizers
        )
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
        return cls(model, average, optimizers, schedules)

    def step(self, latents: Tensor, told: Told, shift: float) -> float:
        """One step of everything; the loss before it."""
        with lean_attention(latents.device):
            loss = _loss(self.model, latents, told, shift)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.average.update_parameters(self.model)
        return loss.item()


def _trapezium(done: float) -> float:
    """The share of the learning rate: up over the first hundredth of the steps, down over the last half."""
    return min(1.0, 0.01 + 100 * done, 2 * (1.001 - done))


def _loss(model: Any, latents: Tensor, told: Told, shift: float) -> Tensor:
    """The mean squared error of the velocity at random sigmas."""
    uniform = torch.rand(len(latents), device=latents.device)
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    noise = torch.randn_like(latents)
    at = sigma[:, None, None, None, None]
    with torch.autocast(latents.device.type, torch.bfloat16):
        velocity = model(
            hidden_states=(1 - at) * latents + at * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=told.states,
            encoder_attention_mask=told.mask,
            pooled_projections=told.pooled,
            guidance=torch.full_like(sigma, GUIDANCE),
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - latents)).square().mean()


def _told(phase: Phase) -> str:
    return f"{phase.num_frames} x {phase.height} x {phase.width}"


def _write(root: Path, model: Any) -> None:
    tensors = {name: stored(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    released = released_dit(tensors, root)
    state = {name: one.read(torch.device("cpu"), torch.bfloat16) for name, one in released.items()}
    write_dit(root, dit_options(dict(model.config), root), state)
