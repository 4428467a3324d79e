"""The step cache: most steps run the DiT, the others predict its velocity from those of earlier steps.

`StepSchedule` (hv_batch/step_schedule.py) lists the computed steps. After a computed step j, the guided velocity of the
later steps is the polynomial in the step number through the velocities of the last computed steps:

    predict   v(i) for i > j, from the last `order` + 1 computed steps, until the next computed step m
    correct   when v(m) is known: repeat the steps j .. m - 1 with the polynomial through v(m) and the last computed
              steps, which interpolates where the prediction extrapolated, and continue from the result

The correction costs no run of the model. It is that of a predictor-corrector method (UniC in UniPC, arXiv 2302.04867),
applied to the steps of the uncached denoise instead of to larger ones, so with every step computed nothing is corrected
and all bits are those without a cache.

All ranks hold equal velocities and so equal state. The state is a few tensors of the latents' size, which a step
checkpoint holds: a denoise can be resumed after every step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from torch import Tensor

from hv_batch.step_schedule import CORRECTOR_NODES, StepSchedule, kept_velocities

ANCHOR = "anchor"


class StepCache:
    """The state of the step cache in the denoise of one batch of videos.

    `levels` are the noise levels [steps + 1]. All tensors are float32, shaped like the latents of the batch.
    """

    def __init__(self, schedule: StepSchedule, levels: Tensor) -> None:
        self._order = schedule.order
        self._corrects = schedule.correct
        self._kept = kept_velocities(schedule)
        self._computed = schedule.steps(len(levels) - 1)
        self._changes = (levels[1:] - levels[:-1]).tolist()  # of the noise level in each step
        self._velocities: list[Tensor] = []  # of the last computed steps, the latest last
        self._anchor: Tensor | None = None  # the latents before the last computed step

    def is_computed(self, step: int) -> bool:
        """Return whether step number `step`, from 0, runs the model."""
        return step in self._computed

    def count(self, steps: int) -> int:
        """Return the number of computed steps among the first `steps`."""
        return bisect_left(self._computed, steps)

    def predict(self, step: int) -> Tensor:
        """Return the velocity of a step that is not computed."""
        velocities = self._velocities[-(self._order + 1) :]
        return _combine(_weights(self._nodes(step)[-len(velocities) :], step), velocities)

    def correct(self, step: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """Store the velocity of a computed step. Return the latents from which the step starts.

        `latents` are those at which the model has computed `velocity`.
        """
        nodes, velocities = [*self._nodes(step), step], [*self._velocities, velocity]
        if self._corrects and self._anchor is not None and nodes[-2] < step - 1:
            nodes, velocities = nodes[-CORRECTOR_NODES:], velocities[-CORRECTOR_NODES:]
            weights = [0.0] * len(nodes)
            for repeated in range(nodes[-2], step):
                for place, weight in enumerate(_weights(nodes, repeated)):
                    weights[place] += weight * self._changes[repeated]
            latents = self._anchor + _combine(weights, velocities)
        self._anchor = latents if self._corrects else None
        self._velocities = velocities[-self._kept :]
        return latents

    def state(self) -> dict[str, Tensor]:
        """Return the tensors from which, with the latents, a denoise can be resumed."""
        anchor = {} if self._anchor is None else {ANCHOR: self._anchor}
        return anchor | {_name(place): velocity for place, velocity in enumerate(self._velocities)}

    def names(self, step: int) -> set[str]:
        """Return the names of the tensors of `state` after the first `step` steps, of which there is at least one."""
        velocities = {_name(place) for place in range(min(self.count(step), self._kept))}
        return velocities | ({ANCHOR} if self._corrects else set())

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue after the first `step` steps from the tensors of `names(step)`."""
        self._anchor = state.get(ANCHOR)
        self._velocities = [state[_name(place)] for place in range(min(self.count(step), self._kept))]

    def _nodes(self, step: int) -> Sequence[int]:
        """Return the computed steps of `self._velocities`, before `step`."""
        last = self.count(step)
        return self._computed[last - len(self._velocities) : last]


def _name(place: int) -> str:
    return f"velocity_{place}"


def _weights(nodes: Sequence[int], at: int) -> list[float]:
    """Return the weights of the values at `nodes` in the value at `at` of the polynomial through them (Lagrange)."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (at - other) / (node - other)
        weights.append(weight)
    return weights


def _combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """Return the weighted sum, added up in order."""
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + tensor * weight
    return total
