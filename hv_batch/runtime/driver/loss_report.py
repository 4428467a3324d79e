"""The cost of the denoise groups that one command has lost, by cause."""

from __future__ import annotations

from collections import Counter

from hv_batch.job.failure import FailureClass


class Losses:
    """Counts lost groups. `on_gpus` is false if groups compute on CPUs; their seconds are not reported."""

    def __init__(self, *, on_gpus: bool) -> None:
        self._on_gpus = on_gpus
        self._groups: Counter[FailureClass] = Counter()
        self._seconds: Counter[FailureClass] = Counter()

    def add(self, cause: FailureClass, seconds: float, ranks: int) -> None:
        """A group that had started was lost, `seconds` into a denoise; 0 if it was idle."""
        self._groups[cause] += 1
        self._seconds[cause] += round(seconds) * ranks

    def to_dict(self) -> dict[str, dict[str, int | None]]:
        """By failure class: groups, and GPU-seconds of the denoises that were cut off (null on a CPU).

        GPU-seconds are an upper bound: steps that a step checkpoint has saved are not deducted.
        """
        return {
            cause.value: {"groups": count, "gpu_seconds": self._seconds[cause] if self._on_gpus else None}
            for cause, count in sorted(self._groups.items())
        }

    def describe(self) -> str:
        """For example "2 x PREEMPTED, 1 x INFRA"; empty if no group was lost."""
        return ", ".join(f"{count} x {cause.value}" for cause, count in self._groups.most_common())
