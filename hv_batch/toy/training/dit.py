"""The DiT learns to draw what captions say: flow matching on the VAE's latents, conditioned by the frozen towers.

    latents x0 of a scene, noise e, sigma in 0..1:   x = (1 - sigma) x0 + sigma e,   the model learns  e - x0

which is the velocity that the sampler follows from sigma 1 to 0 (spec section 4). The module is diffusers', with
batches and gradients; what is written are its tensors under their released names. Weights are averaged over steps.

A stage begins with what the stage before has written, and optimizers of its own, so a training that was broken off goes
on with the stage it was at. `OUT/training` holds what only that needs: the number of finished stages, and latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from hv_batch.toy.training.coded import Told, code_scenes
from hv_batch.toy.training.lean import StackedMuon, lean_autocast, lean_steps
from hv_batch.toy.training.scenes import Phase
from hv_batch.toy.world import SIZES

WIDTHS: dict[str, Any] = {
    "num_attention_heads": 8,  # so that a group of eight ranks can share them out
    "attention_head_dim": 24,
    "num_layers": 1,
    "num_single_layers": 5,
    "num_refiner_layers": 1,
    "rope_axes_dim": (8, 8, 8),
}
CPU = torch.device("cpu")
MUON_RATE = 2e-3  # of the blocks' matrices
ADAM_RATE = 1e-3  # of all else
DECAY = 0.01
GUIDANCE = 6000.0  # the embedded guidance is a constant that the toy learns to ignore
AVERAGING = 0.998

Tensors = tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True, slots=True)
class Lesson:
    """Steps over `scenes` scenes, which are coded once and met again with other noise and wordings."""

    phase: Phase
    scenes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """`lessons`, whose steps are mixed, at `rate` times the full learning rates. Over the last `falling` of the steps
    these fall to nothing.
    """

    lessons: tuple[Lesson, ...]
    rate: float
    falling: float

    @property
    def steps(self) -> int:
        return sum(lesson.phase.steps for lesson in self.lessons)

    def pace(self, step: int) -> float:
        """The share of the full learning rates, after a short rise."""
        return self.rate * min(1.0, 0.01 * (step + 1), (self.steps - step) / max(1.0, self.falling * self.steps))


def lessons(num_frames: int, batch: int, steps: Sequence[int], scenes: Sequence[int]) -> tuple[Lesson, ...]:
    """One for each of the world's sizes."""
    shapes = zip(SIZES, steps, scenes, strict=True)
    return tuple(Lesson(Phase(count, batch, num_frames, *size), known) for size, count, known in shapes)


@dataclass(frozen=True, slots=True)
class Settings:
    """Stages are passed through in order."""

    stages: tuple[Stage, ...] = (
        Stage(lessons(1, 256, (400, 200, 200), (4000, 2000, 2000)), rate=1.0, falling=0.0),
        Stage(
            lessons(33, 128, (1611, 805, 805), (4000, 2000, 2000)) + lessons(1, 256, (179, 89, 89), (4000, 2000, 2000)),
            rate=1.0,
            falling=0.7,
        ),
    )
    shift: float = 3.0  # of the sigmas: most of what there is to decide is decided early
    seed: int = 0


def train_dit(
    root: Path, vae: Any, towers: TextTowers, settings: Settings, device: torch.device, say: Callable[[str], None]
) -> None:
    """Train and write below `root` as released. `vae` is what `train_vae` returns."""
    for number in range(finished_stages(root), len(settings.stages)):
        _train_stage(number, root, vae, towers, settings, device, say)
        write_stages(root, number + 1)


def _train_stage(
    number: int,
    root: Path,
    vae: Any,
    towers: TextTowers,
    settings: Settings,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    stage, name = settings.stages[number], f"DiT, stage {number + 1} of {len(settings.stages)}"
    training = _Training.begin(towers, settings.seed, device)
    if number:
        training.go_on_from(read(root, training.model.state_dict()))
    made_by = hashlib.sha256(vae_file(root).read_bytes()).hexdigest()[:8]
    series: list[Iterator[tuple[Tensor, Told]]] = []
    for lesson in stage.lessons:
        phase = lesson.phase
        seed = settings.seed * 10**6 + phase.num_frames * 10**3 + phase.height
        shape = f"{phase.num_frames} x {phase.height} x {phase.width}"
        say(f"{name}: coding {lesson.scenes} scenes of {shape}")
        file = training_folder(root) / f"latents-{seed}-{lesson.scenes}-{shape.replace(' ', '')}-{made_by}.pt"
        coded = code_scenes(vae, towers, phase, lesson.scenes, seed, device, file)
        series.append(coded.batches(phase.batch, np.random.default_rng((seed, number))))
    order = np.random.default_rng((settings.seed, number)).permutation(
        np.repeat(np.arange(len(stage.lessons)), [lesson.phase.steps for lesson in stage.lessons])
    )
    losses: list[Tensor] = []
    for step, chosen in enumerate(order):
        latents, told = next(series[chosen])
        losses.append(training.step(latents, told, settings.shift, stage.pace(step)))
        if (step + 1) % 50 == 0:
            say(f"{name}: step {step + 1} of {len(order)}, loss {torch.stack(losses[-50:]).mean():.4f}")
    write(root, training.average.module)


@dataclass(frozen=True, slots=True)
class _Training:
    """A model, its average, and what moves it."""

    model: Any
    average: AveragedModel
    optimizers: tuple[torch.optim.Optimizer, ...]

    @classmethod
    def begin(cls, towers: TextTowers, seed: int, device: torch.device) -> _Training:
        from diffusers import HunyuanVideoTransformer3DModel

        torch.manual_seed(seed)
        [told] = towers.encode([""], image=False)
        model = HunyuanVideoTransformer3DModel(
            **WIDTHS, text_embed_dim=told.states.shape[-1], pooled_projection_dim=len(told.pooled)
        ).to(device)
        named = dict(model.named_parameters())
        matrices = [one for name, one in named.items() if one.ndim == 2 and "transformer_blocks" in name]
        others = [one for name, one in named.items() if not (one.ndim == 2 and "transformer_blocks" in name)]
        optimizers = (
            StackedMuon(matrices, lr=MUON_RATE, weight_decay=DECAY),
            torch.optim.AdamW(others, lr=ADAM_RATE, weight_decay=DECAY, betas=(0.9, 0.95)),
        )
        return cls(model, AveragedModel(model, multi_avg_fn=_average), optimizers)

    def go_on_from(self, state: Mapping[str, Tensor]) -> None:
        for one in (self.model, self.average.module):
            one.load_state_dict(state)

    def step(self, latents: Tensor, told: Told, shift: float, pace: float) -> Tensor:
        """One step of everything, at `pace` times the full learning rates; the loss before it."""
        with lean_steps(latents.device):
            loss = _loss(self.model, latents, told, shift)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer, rate in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
                optimizer.param_groups[0]["lr"] = pace * rate
                optimizer.step()
                optimizer.zero_grad()
        self.average.update_parameters(self.model)
        return loss.detach()  # a number would have to be waited for


def _average(averages: Tensors, latest: Tensors, count: Tensor | int) -> None:
    """An exponential average, over fewer steps where there have not been as many yet."""
    torch._foreach_lerp_(averages, latest, max(1 - AVERAGING, 9 / (9 + int(count))))


def _loss(model: Any, latents: Tensor, told: Told, shift: float) -> Tensor:
    """The mean squared error of the velocity at random sigmas."""
    uniform = torch.rand(len(latents), device=latents.device)
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    noise = torch.randn_like(latents)
    at = sigma[:, None, None, None, None]
    with lean_autocast(latents.device):
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


def write(root: Path, model: Any) -> None:
    """The tensors of diffusers' `model` as the DiT of the tree at `root`, in bfloat16."""
    tensors = {name: stored(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    released = released_dit(tensors, root)
    state = {name: one.read(CPU, torch.bfloat16) for name, one in released.items()}
    write_dit(root, dit_options(dict(model.config), root), state)


def read(root: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `write` has written, under diffusers' names, which with the shapes are those of `like`.

    Numbers are put through the way of the weights, to see where each comes out.
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
