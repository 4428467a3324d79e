"""What lost denoise groups have cost one command, by cause: what an operator asks about a night on spot nodes."""

from __future__ import annotations

from collections import Counter

from hv_batch.job.failure import FailureClass


class Losses:
    """`on_gpus` is false where groups compute on CPUs, whose seconds nobody pays by the piece."""

    def __init__(self, *, on_gpus: bool) -> None:
        self._on_gpus = on_gpus
        self._groups: Counter[FailureClass] = Counter()
        self._seconds: Counter[FailureClass] = Counter()

    def add(self, kind: FailureClass, seconds: float, ranks: int) -> None:
        """A group that had started was lost `seconds` into a denoise; 0 when it was idle."""
        self._groups[kind] += 1
        self._seconds[kind] += round(seconds) * ranks

    def to_dict(self) -> dict[str, dict[str, int | None]]:
        """By failure class: groups, and GPU-seconds of the denoises that were cut off (null on a CPU).

        GPU-seconds are an upper bound: what a step checkpoint has saved of them is not deducted.
        """
        return {
            kind.value: {"groups": count, "gpu_seconds": self._seconds[kind] if self._on_gpus else None}
            for kind, count in sorted(self._groups.items())
        }

    def describe(self) -> str:
        """As "2 x PREEMPTED, 1 x INFRA"; empty when no group was lost."""
        return ", ".join(f"{count} x {kind.value}" for kind, count in self._groups.most_common())
