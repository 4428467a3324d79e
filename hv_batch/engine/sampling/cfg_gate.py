"""CFG gating: the negative branch of classifier-free guidance runs only in the first steps of a denoise.

Later steps run the positive branch and reuse the difference of the last step that ran both (option `cfg_until`):

    negative = positive - (positive - negative) of that step

The method is that of FastVideo's CFG gating, and of LinearAG (arXiv 2312.12487) with a constant in place of its fitted
coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

DIFFERENCE = "guidance_difference"


class CfgGate:
    """The state of CFG gating in the denoise of one batch of videos.

    `last` is the number of first steps that run both branches.
    """

    def __init__(self, last: int) -> None:
        self._last = last
        self._difference: Tensor | None = None  # float32, positive - negative, shaped like the latents of the batch

    def is_open(self, step: int) -> bool:
        """Return whether step number `step`, from 0, runs both branches if it is computed."""
        return step < self._last

    def split(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocities of the negative and of the positive branch, given those of both, negative first."""
        negative, positive = velocity.chunk(2)
        self._difference = positive - negative
        return negative, positive

    def complete(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocities of both branches of a step that runs only the positive one."""
        assert self._difference is not None
        return positive - self._difference, positive

    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which a denoise can be resumed."""
        return {} if self._difference is None else {DIFFERENCE: self._difference}

    def names(self) -> set[str]:
        """Return the names of the tensors of `state` after the first step."""
        return {DIFFERENCE}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the tensors of `state`."""
        self._difference = state[DIFFERENCE]
