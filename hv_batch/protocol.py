"""The interface of an engine, the sampling parameters and the errors that all layers share.

This module holds plain data and structural types. It imports neither torch nor Ray nor storage, so every layer may
import it.

The config names an engine by import path (``model.engine``); hv_batch builds it from ``model.options``. Any class that
satisfies `Engine` can render: the HunyuanVideo engine of this package, another engine, or a test double.

    text_encoder().encode(prompts)            -> one embedding per prompt    (opaque to the job)
    join(spec).denoise(params, embeddings)    -> latents, float32 numpy      (called on every rank of the group)
    decoder().decode(latents)                 -> chunks of frames, uint8     (in order, streamed)
    join(spec).decode(latents)                -> the same chunks on rank 0   (called on every rank of the group)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
MAX_HISTORY = 8  # arrays of a step state besides the latents
MAX_SEED = 2**63 - 1  # torch.Generator takes a signed 64-bit seed


DEFAULT_NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, "
    "bad hands, bad teeth, bad eyes, bad limbs, distortion"
)


MAX_LORAS = 8  # of one video
MAX_LORA_STRENGTH = 100.0
LORA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NO_LORA = "none"  # in a manifest, where an empty cell means the default


class UserError(Exception):
    """An error that the user can fix. The text is one paragraph: what is wrong, where, what is allowed, the remedy.

    The command prints it without a traceback and exits with code 1.
    """


def latent_shape(height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
    """Return (channels, latent frames, latent height, latent width) of a video of height x width pixels."""
    return (
        LATENT_CHANNELS,
        (num_frames - 1) // TEMPORAL_COMPRESSION + 1,
        height // SPATIAL_COMPRESSION,
        width // SPATIAL_COMPRESSION,
    )


class NonFiniteError(ValueError):
    """Latents or frames contain NaN or infinity: the precision overflowed, or the weights are damaged."""


class DeviceError(RuntimeError):
    """A device, a link between devices, or one rank's copy of the weights is faulty. The sample is not the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """All user-chosen values that change the pixels of one video.

    Validate untrusted values with `problems` before you build one.
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
    lora: str = ""  # names of LoRAs in the form of `canonical_lora`; empty: none

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict. `dataclasses.asdict` takes ten times as long because it looks for containers.

        An empty `lora` is left out, so that records and hashes of videos without one stay as they were before it.
        """
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) or name != "lora"}

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
        """Size of the final latents in bytes. They are float32 in every precision of the model."""
        return 4 * math.prod(self.latent_shape)


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One invalid value: the field, the value, and a phrase that describes the allowed values."""

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


def parse_lora(text: str) -> dict[str, float | None]:
    """Return the strengths of LoRAs by name, from a text such as "film:0.7,grain". None: the LoRA's own strength.

    Raises ValueError if the text has another form, if a name occurs twice, or if a strength is out of bounds.
    """
    strengths: dict[str, float | None] = {}
    for item in text.split(",") if text.strip() and text.strip() != NO_LORA else ():
        name, colon, number = (part.strip() for part in item.partition(":"))
        strength = float(number) if colon else None
        if not LORA_NAME.fullmatch(name) or name in strengths or name == NO_LORA:
            raise ValueError(f"{name!r} is not the name of a LoRA, or occurs twice")
        if strength is not None and not abs(strength) <= MAX_LORA_STRENGTH:
            raise ValueError(f"{strength} is not from -{MAX_LORA_STRENGTH:g} to {MAX_LORA_STRENGTH:g}")
        strengths[name] = strength
    if len(strengths) > MAX_LORAS:
        raise ValueError(f"{len(strengths)} LoRAs, more than {MAX_LORAS}")
    return strengths


def canonical_lora(value: Any) -> Any:
    """Return the one form of a choice of LoRAs: names in order, each with its strength if it has one.

    `value` is a text such as "film: 0.70, grain", or a list of such texts; "none" and an empty list become "". Equal
    choices get equal texts, and so equal pixels. Any other value is returned unchanged and breaks the rule of `lora`.
    """
    text = ",".join(value) if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value) else value
    if not isinstance(text, str):
        return value
    try:
        strengths = parse_lora(text)
    except ValueError:
        return value
    return ",".join(
        name if strength is None else f"{name}:{float(strength)!r}" for name, strength in sorted(strengths.items())
    )


def _lora(value: Any) -> bool:
    try:
        return isinstance(value, str) and parse_lora(value) is not None and canonical_lora(value) == value
    except ValueError:
        return False


_SIDE_ALLOWED = f"a multiple of {SIZE_MULTIPLE} from {SIZE_MULTIPLE} to {MAX_SIDE}"

# The allowed values of each field of SamplingParams: one table for manifest rows, config defaults and the Python API.
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
    "lora": (
        _lora,
        f"at most {MAX_LORAS} names of LoRAs, each once and with an optional strength, as film or film:0.7,grain; or "
        f"{NO_LORA}. Paths are not allowed",
    ),
}

# Fields that a record may lack.
OPTIONAL_FIELDS = frozenset({"lora"})


def problems(values: Mapping[str, Any]) -> list[FieldProblem]:
    """Return one `FieldProblem` for each value that breaks its rule. Absent fields are not checked."""
    return [
        FieldProblem(field, values[field], allowed)
        for field, (is_allowed, allowed) in RULES.items()
        if field in values and not is_allowed(values[field])
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How one video is divided over the ranks of a group.

    The plan is part of the video's identity, because another plan sums in another order.
    """

    ulysses_degree: int = 1  # ranks over which the attention heads are divided
    ring_degree: int = 1  # ranks over which the keys are divided
    cfg_degree: int = 1  # 2: each half of the group computes one branch of classifier-free guidance (CFG)

    @property
    def sequence_degree(self) -> int:
        """Number of ranks over which the tokens of one item are divided."""
        return self.ulysses_degree * self.ring_degree

    @property
    def world_size(self) -> int:
        return self.cfg_degree * self.sequence_degree

    def __str__(self) -> str:
        branches = f"CFG {self.cfg_degree} x " if self.cfg_degree > 1 else ""
        return f"{branches}Ulysses {self.ulysses_degree} x ring {self.ring_degree}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """The position of one rank in its denoise group.

    `address` is the return value of `Engine.host_rendezvous` on rank 0. `local_rank` indexes the GPUs that are visible
    to the ranks of this node; all ranks of a node must see them in the same order. `timeout_s` (seconds) bounds joining
    and each collective.
    """

    rank: int
    local_rank: int
    plan: ParallelPlan
    device: Device
    address: str
    timeout_s: float
    decodes: bool = False  # whether `Denoiser.decode` will be called as well
    # The values of the engine's open options that the run has chosen; empty if it has not yet (see `Engine`).
    choices: Mapping[str, str] = field(default_factory=dict)


class Embedding(Protocol):
    """One encoded prompt. The job transports it and reads only these two counts."""

    @property
    def num_tokens(self) -> int:
        """Number of prompt tokens that reach the DiT, excluding the template."""
        ...

    @property
    def tokens_lost(self) -> int:
        """Number of prompt tokens beyond the model's limit, which are dropped."""
        ...


class TextEncoder(Protocol):
    def encode(self, prompts: Sequence[str], *, image: bool) -> Sequence[Embedding]:
        """Return one embedding per prompt, in order. `image` selects the image template instead of the video template.

        The bits of an embedding must not depend on the other prompts of the call.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StepState:
    """The state of a denoise between two steps. With the arguments, it determines all later steps."""

    step: int  # number of finished steps: at least 1, fewer than all
    latents: np.ndarray  # float32, shaped `SamplingParams.latent_shape`, equal on every rank
    # What later steps need besides, such as earlier velocities, by names of letters, digits and "_": at most
    # MAX_HISTORY arrays like `latents`.
    history: Mapping[str, np.ndarray] = field(default_factory=dict)


class OnStep(Protocol):
    """Called when a step is finished, not when it is queued on a device: the runtime treats a group as hung if its next
    step takes many times longer than the previous ones.
    """

    def __call__(self, done: int, read: Callable[[], StepState], computed: int | None = None, /) -> None:
        """`done` is the number of finished steps. `read()` copies the state after this step to host memory and may be
        called only before this method returns.

        `computed` is the number of finished steps that ran the model, if some do not: these take much longer.
        """
        ...


class Denoiser(Protocol):
    """One rank of a denoise group. Every method must be called on all ranks at the same time, with equal arguments."""

    def self_check(self) -> None:
        """Compute a small input as a group and compare the result with what this rank computes alone.

        Called once, after all ranks have joined. Raises DeviceError if the results differ by more than rounding; such
        a group must not render.
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
        """Return the final latents: float32, shaped `params.latent_shape`, equal on every rank.

        `on_step` is called after each of the `num_inference_steps` steps. With `resume`, only the steps after
        `resume.step` are computed, and the result has the same bits. Raises NonFiniteError if the latents are not
        finite because of the sample, and DeviceError if they are not finite because of a faulty device.
        """
        ...

    def decode(self, latents: np.ndarray) -> Generator[np.ndarray, None, None]:
        """On rank 0, yield the same chunks as `Decoder.decode`, bit for bit. On other ranks, yield nothing.

        The generator must be iterated to its end on the other ranks as well. Rank 0 may raise NonFiniteError, or its
        generator may be closed early. In both cases rank 0 first receives the tiles that the other ranks still send, so
        these finish normally and the group stays usable. After any other error the group must be rebuilt.
        """
        ...


class Decoder(Protocol):
    def decode(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the frames of latents [C, T, h, w], in order, as uint8 chunks [frames, height, width, 3].

        Raises NonFiniteError if the decoded frames are not finite.
        """
        ...


class Engine(Protocol):
    """Builds the parts of a model: text encoder, denoiser, decoder.

    The driver builds the engine and pickles it to every actor. The constructor must therefore read no weights and touch
    no device. It must make relative paths absolute, because actors run in another working directory.

    Optional: `licence() -> str`, the licence of the weights as the Hugging Face Hub names it, such as apache-2.0. An
    engine without it renders under the licence of the released weights. `lora_problems() -> list[str]`, the part of
    `check` about LoRAs, which needs no weights; `hv-batch plan` calls it. The denoiser of an engine that uses
    `StepState.history` must have `can_resume(params, state) -> bool`, because a state from storage may lack arrays.

    Also optional: `open_options() -> tuple[str, ...]`, the names of the options that are left to the hardware
    (`attention: auto`). The first group that joins decides them: its denoisers return equal values from
    `choices() -> Mapping[str, str]`. The run records these, and passes them to `RankSpec.choices` of later groups, and
    to `use_choices(choices)` of groups that have decided at the same time. A rank that cannot compute with them raises
    DeviceError, so that its node is avoided.
    """

    def check(self) -> list[str]:
        """Return one sentence for each problem that prevents loading, such as a missing weight file; empty if none."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return the JSON-serialisable facts of the model that change pixels: weights revision, precisions, tiles."""
        ...

    def group_problems(self, plan: ParallelPlan, shapes: Iterable[Shape] = ()) -> list[str]:
        """Return the reasons why this engine cannot run with `plan`, or cannot render `shapes` with it; empty if none.

        `shapes` are (height, width, frames) in pixels.
        """
        ...

    def text_encoder(self, device: Device) -> TextEncoder:
        """Load the text encoder on `device`."""
        ...

    def host_rendezvous(self, host: str, world_size: int) -> str:
        """Start the rendezvous store of a group on a free port of `host`; return its address. Called on rank 0 only."""
        ...

    def join(self, spec: RankSpec) -> Denoiser:
        """Load this rank's model and join its group. Blocks until every rank has joined."""
        ...

    def decoder(self, device: Device) -> Decoder:
        """Load the decoder on `device`."""
        ...
