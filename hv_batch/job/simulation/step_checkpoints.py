"""Step checkpoints of simulated denoises: how many steps of a sample a lost group leaves behind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Denoise:
    first: int  # step that it began with
    began: float
    step_s: float
    requested: int = 0  # steps that a requested checkpoint will hold

    def done(self, now: float) -> int:
        return self.first + int((now - self.began) / self.step_s + 1e-9) if self.step_s else self.first


class StepCheckpoints:
    """`every` is the number of steps between two checkpoints; 0: only requested ones."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._stored: dict[str, int] = {}  # steps
        self._running: dict[str, _Denoise] = {}

    def begin(self, key: str, steps: int, now: float, step_s: float) -> int:
        """A denoise of the sample begins after its stored steps, and each step takes `step_s` seconds.

        Returns how many of the `steps` are left.
        """
        stored = self._stored.get(key, 0)
        self._running[key] = _Denoise(stored, now, step_s)
        return steps - stored

    def request(self, key: str, now: float) -> None:
        """Write a checkpoint after the current step."""
        if denoise := self._running.get(key):
            denoise.requested = denoise.done(now) + 1

    def lose(self, key: str, now: float) -> float:
        """The denoise ends early. Returns the seconds of it that a checkpoint holds."""
        if (denoise := self._running.pop(key, None)) is None:
            return 0.0
        done = denoise.done(now)
        regular = done - done % self._every if self._every else 0
        stored = max(denoise.first, regular, denoise.requested if denoise.requested <= done else 0)
        if stored:
            self._stored[key] = stored
        return (stored - denoise.first) * denoise.step_s

    def forget(self, key: str) -> None:
        """The denoise of the sample has ended, well or with an error for which it begins anew."""
        self._stored.pop(key, None)
        self._running.pop(key, None)
