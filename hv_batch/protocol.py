"""The vocabulary that engine, job and runtime share, and what an engine must be able to do.

Plain data and structural types: this module imports neither torch nor Ray nor storage, so every layer may import it.

An engine is named in the config by import path (``model.engine``) and built from ``model.options``. Whatever satisfies
`Engine` can render: the HunyuanVideo engine of this package, another engine, or a test double.

    text_encoder().encode(prompts)            -> one embedding a prompt      (opaque to the job)
    join(place).denoise(params, embeddings)   -> latents, float32 numpy      (every rank of a group takes part)
    decoder().decode(latents)                 -> chunks of frames, uint8     (in order, streamed)
    join(place).decode(latents)               -> the same chunks on rank 0   (every rank of a group takes part)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

Device = Literal["cpu", "cuda"]
Shape = tuple[int, int, int]  # height, width (pixels), frames

LATENT_CHANNELS = 16
SPATIAL_COMPRESSION = 8  # VAE; the DiT's patch halves height and width once more
TEMPORAL_COMPRESSION = 4
SIZE_MULTIPLE = 16  # VAE stride 8 x patch 2
MAX_SIDE = 8192
MAX_FRAMES = 1025
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1  # torch.Generator takes a signed 64-bit seed


DEFAULT_NEGATIVE_PROMPT = (  # spec section 3.3
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, "
    "bad hands, bad teeth, bad eyes, bad limbs, distortion"
)


class UserError(Exception):
    """Something the user can mend. Its text is one paragraph: what, where, what is allowed, and the remedy.

    Shown without a traceback; the command ends with exit code 1.
    """


def latent_shape(height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
    """(channels, latent frames, latent height, latent width)."""
    return (
        LATENT_CHANNELS,
        (num_frames - 1) // TEMPORAL_COMPRESSION + 1,
        height // SPATIAL_COMPRESSION,
        width // SPATIAL_COMPRESSION,
    )


class NonFiniteError(ValueError):
    """Latents or frames that are not finite: an overflow of the precision, or broken weights."""


class DeviceError(RuntimeError):
    """A device, a link between two, or one rank's copy of the weights is damaged: no sample is to blame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Everything a user chooses that changes the pixels of one video (spec section 1).

    Build one from untrusted values only after `problems` has found nothing.
    """

    prompt: str
    negative_prompt: str
    height: int  # pixels
    width: int  # pixels
    num_frames: int
    num_inference_steps: int
    seed: int
    guidance_scale: float  # embedded guidance, fed to the model as scale * 1000
    cfg_scale: float  # classifier-free guidance; > 1 renders the negative prompt too
    guidance_rescale: float
    flow_shift: float

    def to_dict(self) -> dict[str, Any]:
        """As `dataclasses.asdict`, which takes ten times as long to find that no value is a container."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def uses_cfg(self) -> bool:
        return self.cfg_scale > 1.0

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1

    @property
    def shape(self) -> Shape:
        return self.height, self.width, self.num_frames

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return latent_shape(self.height, self.width, self.num_frames)

    @property
    def latent_bytes(self) -> int:
        """Of the final latents, which are float32 whatever the model computes in."""
        return 4 * math.prod(self.latent_shape)


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One value that cannot be rendered, said so that the user can mend it."""

    field: str
    value: Any
    allowed: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _prompt(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _side(value: Any) -> bool:
    return _is_int(value) and SIZE_MULTIPLE <= value <= MAX_SIDE and value % SIZE_MULTIPLE == 0


def _frames(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= MAX_FRAMES and (value - 1) % TEMPORAL_COMPRESSION == 0


def _between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low <= value <= high


_SIDE_ALLOWED = f"a multiple of {SIZE_MULTIPLE} from {SIZE_MULTIPLE} to {MAX_SIDE}"

# What each field of SamplingParams may be: one table for manifest rows, config defaults and the Python API.
RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_prompt, "a text that is not blank"),
    "negative_prompt": (_text, "a text"),
    "height": (_side, _SIDE_ALLOWED),
    "width": (_side, _SIDE_ALLOWED),
    "num_frames": (_frames, f"4n + 1 from 1 (an image) to {MAX_FRAMES}, as 33, 65 or 129"),
    "num_inference_steps": (lambda v: _is_int(v) and 1 <= v <= MAX_STEPS, f"a whole number from 1 to {MAX_STEPS}"),
    "seed": (lambda v: _is_int(v) and 0 <= v <= MAX_SEED, "a whole number from 0 to 2^63 - 1"),
    "guidance_scale": (_between(0.0, 100.0), "a number from 0 to 100"),
    "cfg_scale": (_between(1.0, 100.0), "a number from 1 (off) to 100"),
    "guidance_rescale": (_between(0.0, 1.0), "a number from 0 (off) to 1"),
    "flow_shift": (lambda v: _is_number(v) and 0.0 < v <= 1000.0, "a number above 0, at most 1000"),
}


def problems(values: Mapping[str, Any]) -> list[FieldProblem]:
    """Every given value of `values` that breaks its rule; fields that are absent are not judged."""
    return [
        FieldProblem(field, values[field], allowed)
        for field, (is_allowed, allowed) in RULES.items()
        if field in values and not is_allowed(values[field])
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How one video is spread over the ranks of a group. Part of its identity: another plan sums in another order."""

    ulysses_degree: int = 1  # ranks that share the attention heads
    ring_degree: int = 1  # ranks that share the keys
    cfg_degree: int = 1  # 2: each half of the group computes one branch of classifier-free guidance

    @property
    def sequence_degree(self) -> int:
        """Ranks that share the tokens of one item."""
        return self.ulysses_degree * self.ring_degree

    @property
    def world_size(self) -> int:
        return self.cfg_degree * self.sequence_degree

    def __str__(self) -> str:
        branches = f"CFG {self.cfg_degree} x " if self.cfg_degree > 1 else ""
        return f"{branches}Ulysses {self.ulysses_degree} x ring {self.ring_degree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """Where one rank of a denoise group stands.

    `address` is what `Engine.host_rendezvous` returned on rank 0. `local_rank` indexes the GPUs that the ranks of this
    node see, which all of them see in the same order.
    """

    rank: int
    local_rank: int
    plan: ParallelPlan
    device: Device
    address: str
    timeout_s: float
    decodes: bool = False  # `Denoiser.decode` will be called, too


class Embedding(Protocol):
    """One encoded prompt. The job carries it and reads only how much of the prompt the model saw."""

    @property
    def num_tokens(self) -> int:
        """Text tokens that reach the DiT, template excluded."""
        ...

    @property
    def tokens_lost(self) -> int:
        """Prompt tokens beyond the model's limit."""
        ...


class TextEncoder(Protocol):
    def encode(self, prompts: Sequence[str], *, image: bool) -> Sequence[Embedding]:
        """One embedding a prompt, each the same bits whatever else is in the batch; `image` picks the template."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StepState:
    """A denoise between two of its steps, and all that the steps after depend on beside the arguments."""

    step: int  # steps done, at least 1 and fewer than all
    latents: np.ndarray  # float32, shaped `SamplingParams.latent_shape`, equal on every rank


# (steps done, read): called when a step is done, not when it is queued on a device: a group whose next step takes many
# times longer than those before counts as hung. `read()` copies the latents of this step to host memory, and may be
# called only until the return; None in its place after a step that no denoise can be resumed from.
OnStep = Callable[[int, "Callable[[], np.ndarray] | None"], None]


class Denoiser(Protocol):
    """One rank of a denoise group: every rank is called with equal arguments at the same time."""

    def self_check(self) -> None:
        """Render something small as a group and compare it with what this rank computes alone.

        Called once, when the group has met. Raises DeviceError when they disagree: such a group must not render.
        """
        ...

    def denoise(
        self,
        params: SamplingParams,
        positive: Any,
        negative: Any | None,
        on_step: OnStep,
        resume: StepState | None = None,
    ) -> np.ndarray:
        """Final latents, float32, shaped `params.latent_shape`, equal on every rank.

        `on_step` is called after each of the `num_inference_steps` steps. With `resume`, only the steps after it are
        made, and the result is the same bits. Raises NonFiniteError when it is not finite, and DeviceError where that
        is no fault of the sample.
        """
        ...

    def decode(self, latents: np.ndarray) -> Generator[np.ndarray, None, None]:
        """What `Decoder.decode` yields for equal latents, bit for bit, on rank 0; nothing on the others, which must be
        iterated all the same.

        Rank 0 may raise NonFiniteError, or be closed before its end: then it first takes whatever the other ranks are
        still to send, so that these end as ever and the group can go on. After any other error it cannot.
        """
        ...


class Decoder(Protocol):
    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Frames of latents [C, T, h, w], in order, as uint8 chunks [frames, height, width, 3]."""
        ...


class Engine(Protocol):
    """Built in the driver and pickled to every actor: construction reads no weights and touches no device, and makes
    relative paths absolute, because actors have another working directory.
    """

    def check(self) -> list[str]:
        """What would stop this engine from loading (a missing weight file, ...), one clear sentence each."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON-able facts of the model that change pixels: weights revision, precisions, tile geometry, ..."""
        ...

    def group_problems(self, plan: ParallelPlan, shapes: Iterable[Shape] = ()) -> list[str]:
        """Why this engine could not shard itself so, nor render videos of those shapes then; empty when it can."""
        ...

    def text_encoder(self, device: Device) -> TextEncoder: ...

    def host_rendezvous(self, host: str, world_size: int) -> str:
        """Rank 0 only: open the meeting point of a group on a free port of `host` and return its address."""
        ...

    def join(self, place: RankSpec) -> Denoiser:
        """Load this rank's model and join its group; blocks until every rank has."""
        ...

    def decoder(self, device: Device) -> Decoder: ...
