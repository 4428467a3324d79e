"""The interface of an engine, and the errors that all layers share.

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

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hv_batch.sampling_params import SamplingParams, Shape

if TYPE_CHECKING:
    import numpy as np

Device = Literal["cpu", "cuda"]

MAX_HISTORY = 8  # arrays of a step state besides the latents


class UserError(Exception):
    """An error that the user can fix. The text is one paragraph: what is wrong, where, what is allowed, the remedy.

    The command prints it without a traceback and exits with code 1.
    """


class NonFiniteError(ValueError):
    """Latents or frames contain NaN or infinity: the precision overflowed, or the weights are damaged."""


class DeviceError(RuntimeError):
    """A device, a link between devices, or one rank's copy of the weights is faulty. The sample is not the cause."""


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
