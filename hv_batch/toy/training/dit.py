"""Train the DiT by flow matching on the latents of the VAE, conditioned on the frozen text towers.

    latents x0 of a scene, noise e, sigma in 0..1:   x = (1 - sigma) x0 + sigma e,   the model learns  e - x0

This is the velocity that the sampler follows from sigma 1 to 0. The module is that of diffusers, which
has batches and gradients. Its tensors are saved under their released names, averaged over steps.

A stage starts from the weights that the previous stage has saved, with new optimizers, so an interrupted training
resumes at the stage that was in progress. `OUT/training` holds the state for this: the number of finished stages, and
cached latents.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from hv_batch.engine.checkpoint.diffusers_layout import dit_options, released_dit
from hv_batch.engine.checkpoint.tensor_files import stored
from hv_batch.engine.text_encoders import TextTowers
from hv_batch.toy.checkpoint import dit_file, vae_file, write_dit
from hv_batch.toy.trained import finished_stages, training_folder, write_stages
from hv_batch.toy.training.coded import TextBatch, encode_scenes
from hv_batch.toy.training.lean import StackedMuon, lean_autocast, lean_steps
from hv_batch.toy.training.scenes import Phase
from hv_batch.toy.world import SIZES

logger = logging.getLogger(__name__)

WIDTHS: dict[str, Any] = {
    "num_attention_heads": 8,  # so that a group of eight ranks can split them
    "attention_head_dim": 24,
    "num_layers": 1,
    "num_single_layers": 5,
    "num_refiner_layers": 1,
    "rope_axes_dim": (8, 8, 8),
}
CPU = torch.device("cpu")
MUON_RATE = 2e-3  # learning rate of the matrices of the blocks
ADAM_RATE = 1e-3  # learning rate of all other parameters
DECAY = 0.01
GUIDANCE = 6000.0  # embedded guidance; constant, so the toy learns to ignore it
AVERAGING = 0.998

Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """The steps of `phase` over `scenes` scenes.

    Scenes are encoded once and reused with new noise and other captions.
    """

    phase: Phase
    scenes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Training steps that alternate between several training sets in random order."""

    sets: tuple[TrainingSet, ...]
    rate: float  # factor of the learning rates
    decay: float  # fraction of the steps, at the end, over which the learning rates decrease to zero

    @property
    def steps(self) -> int:
        return sum(training_set.phase.steps for training_set in self.sets)

    def rate_factor(self, step: int) -> float:
        """Return the factor of the learning rates at `step`: a short linear warm-up, `rate`, then a linear decay."""
        return self.rate * min(1.0, 0.01 * (step + 1), (self.steps - step) / max(1.0, self.decay * self.steps))


def sets_of_all_sizes(
    num_frames: int, batch: int, steps: Sequence[int], scenes: Sequence[int]
) -> tuple[TrainingSet, ...]:
    """Return a training set for each of the world's sizes."""
    shapes = zip(SIZES, steps, scenes, strict=True)
    return tuple(TrainingSet(Phase(count, batch, num_frames, *size), number) for size, count, number in shapes)


@dataclass(frozen=True, slots=True)
class Settings:
    """The stages, in order, and their common parameters."""

    stages: tuple[Stage, ...] = (
        Stage(sets_of_all_sizes(1, 256, (400, 200, 200), (4000, 2000, 2000)), rate=1.0, decay=0.0),
        Stage(
            sets_of_all_sizes(33, 128, (1611, 805, 805), (4000, 2000, 2000))
            + sets_of_all_sizes(1, 256, (179, 89, 89), (4000, 2000, 2000)),
            rate=1.0,
            decay=0.7,
        ),
    )
    shift: float = 3.0  # shift of the sigmas: most attributes of a picture are determined at large sigmas
    seed: int = 0


def train_dit(root: Path, vae: Any, towers: TextTowers, settings: Settings, device: torch.device) -> None:
    """Train the DiT and write it below `root` in the released layout. `vae` is the result of `train_vae`."""
    for number in range(finished_stages(root), len(settings.stages)):
        _train_stage(number, root, vae, towers, settings, device)
        write_stages(root, number + 1)


def _train_stage(
    number: int, root: Path, vae: Any, towers: TextTowers, settings: Settings, device: torch.device
) -> None:
    stage, name = settings.stages[number], f"DiT, stage {number + 1} of {len(settings.stages)}"
    training = _Training.begin(towers, settings.seed, device)
    if number:
        training.load(load_dit(root, training.model.state_dict()))
    vae_digest = hashlib.sha256(vae_file(root).read_bytes()).hexdigest()[:8]
    series: list[Iterator[tuple[Tensor, TextBatch]]] = []
    for training_set in stage.sets:
        phase = training_set.phase
        seed = settings.seed * 10**6 + phase.num_frames * 10**3 + phase.height
        shape = f"{phase.num_frames} x {phase.height} x {phase.width}"
        logger.info(f"{name}: encoding {training_set.scenes} scenes of {shape}")
        file = training_folder(root) / f"latents-{seed}-{training_set.scenes}-{shape.replace(' ', '')}-{vae_digest}.pt"
        encoded = encode_scenes(vae, towers, phase, training_set.scenes, seed, device, file)
        series.append(encoded.batches(phase.batch, np.random.default_rng((seed, number))))
    order = np.random.default_rng((settings.seed, number)).permutation(
        np.repeat(np.arange(len(stage.sets)), [training_set.phase.steps for training_set in stage.sets])
    )
    losses: list[Tensor] = []
    for step, chosen in enumerate(order):
        latents, texts = next(series[chosen])
        losses.append(training.step(latents, texts, settings.shift, stage.rate_factor(step)))
        if (step + 1) % 50 == 0:
            logger.info(f"{name}: step {step + 1} of {len(order)}, loss {torch.stack(losses[-50:]).mean():.4f}")
    save_dit(root, training.average.module)


@dataclass(frozen=True, slots=True)
class _Training:
    """The model, the average of its weights, and its optimizers."""

    model: Any
    average: AveragedModel
    optimizers: tuple[torch.optim.Optimizer, ...]

    @classmethod
    def begin(cls, towers: TextTowers, seed: int, device: torch.device) -> _Training:
        from diffusers import HunyuanVideoTransformer3DModel

        torch.manual_seed(seed)
        [text] = towers.encode([""], image=False)
        model = HunyuanVideoTransformer3DModel(
            **WIDTHS, text_embed_dim=text.states.shape[-1], pooled_projection_dim=len(text.pooled)
        ).to(device)
        named = dict(model.named_parameters())
        matrices = [one for name, one in named.items() if one.ndim == 2 and "transformer_blocks" in name]
        others = [one for name, one in named.items() if not (one.ndim == 2 and "transformer_blocks" in name)]
        optimizers = (
            StackedMuon(matrices, lr=MUON_RATE, weight_decay=DECAY),
            torch.optim.AdamW(others, lr=ADAM_RATE, weight_decay=DECAY, betas=(0.9, 0.95)),
        )
        return cls(model, AveragedModel(model, multi_avg_fn=_average), optimizers)

    def load(self, state: Mapping[str, Tensor]) -> None:
        for module in (self.model, self.average.module):
            module.load_state_dict(state)

    def step(self, latents: Tensor, texts: TextBatch, shift: float, rate_factor: float) -> Tensor:
        """Do one step of all optimizers and return the loss before it. `rate_factor` scales the learning rates."""
        with lean_steps(latents.device):
            loss = _loss(self.model, latents, texts, shift)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer, rate in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
                optimizer.param_groups[0]["lr"] = rate_factor * rate
                optimizer.step()
                optimizer.zero_grad()
        self.average.update_parameters(self.model)
        return loss.detach()  # not a number: that would synchronize with the device


def _average(averages: Tensors, latest: Tensors, count: Tensor | int) -> None:
    """Update the exponential moving average, whose window is shorter during the first steps."""
    torch._foreach_lerp_(averages, latest, max(1 - AVERAGING, 9 / (9 + int(count))))


def _loss(model: Any, latents: Tensor, texts: TextBatch, shift: float) -> Tensor:
    """Return the mean squared error of the velocity at random sigmas."""
    uniform = torch.rand(len(latents), device=latents.device)
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    noise = torch.randn_like(latents)
    at = sigma[:, None, None, None, None]
    with lean_autocast(latents.device):
        velocity = model(
            hidden_states=(1 - at) * latents + at * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=texts.states,
            encoder_attention_mask=texts.mask,
            pooled_projections=texts.pooled,
            guidance=torch.full_like(sigma, GUIDANCE),
            return_dict=False,
        )[0]
    return (velocity.float() - (noise - latents)).square().mean()


def save_dit(root: Path, model: Any) -> None:
    """Write the tensors of the diffusers module `model` as the DiT of the tree at `root`, in bfloat16."""
    tensors = {name: stored(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    released = released_dit(tensors, root)
    state = {name: one.read(CPU, torch.bfloat16) for name, one in released.items()}
    write_dit(root, dit_options(dict(model.config), root), state)


def load_dit(root: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load the tensors that `save_dit` has written, with the diffusers names and shapes of `like`.

    The conversion to released names is applied to element indices. The result shows where each element of the weights
    is stored, which inverts the conversion.
    """
    ends = list(accumulate(tensor.numel() for tensor in like.values()))
    count = ends[-1]
    numbers = torch.arange(count, dtype=torch.float64).tensor_split(ends[:-1])
    named = {name: stored(part.view(like[name].shape)) for name, part in zip(like, numbers, strict=True)}
    places = {name: one.read(CPU, torch.float64).long() for name, one in released_dit(named, root).items()}
    written = torch.load(dit_file(root), weights_only=True)["module"]
    values = torch.empty(count)
    for name, place in places.items():
        values[place.flatten()] = written[name].float().flatten()
    return {name: part.view(like[name].shape) for name, part in zip(like, values.tensor_split(ends[:-1]), strict=True)}
