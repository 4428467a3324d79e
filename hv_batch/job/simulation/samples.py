"""The samples of a simulation, and how long each takes at each stage."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hv_batch.job.config.hardware import Gpu
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.cost_model.speed import ENCODE_SECONDS, decode_seconds, denoise_seconds
from hv_batch.job.scheduling.messages import Admitted
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleKind:
    """Samples of equal cost. Times are those of one worker, or one group, without jitter."""

    encode_s: float
    denoise_s: float
    decode_s: float
    steps: int = 50
    size_class: int = 0
    work: Workload | None = None  # None: unknown to the scheduler, so it builds no micro-batches
    latent_bytes: int = 0

    def seconds(self, stage: Stage) -> float:
        return (self.encode_s, self.denoise_s, self.decode_s)[stage]


class SamplePlan:
    """`count` samples with the kinds `kind_of(number)`. The denoise of `poisoned` random ones always fails."""

    def __init__(
        self, kinds: Sequence[SampleKind], count: int, kind_of: Callable[[int], int], poisoned: int = 0, seed: int = 0
    ) -> None:
        self.kinds = kinds
        self.count = count
        self._kind_of = kind_of
        self.poisoned = frozenset(random.Random(seed).sample(range(count), min(poisoned, count)))
        self._next = 0

    @property
    def is_exhausted(self) -> bool:
        return self._next >= self.count

    def kind(self, key: str) -> SampleKind:
        return self.kinds[self._kind_of(number_of(key))]

    def admit(self, most: int) -> list[Admitted]:
        """The next samples, at most `most`."""
        numbers = range(self._next, min(self.count, self._next + most))
        self._next = numbers.stop
        return [self._admitted(number) for number in numbers]

    def _admitted(self, number: int) -> Admitted:
        kind = self.kinds[self._kind_of(number)]
        return Admitted(f"s{number}", latent_bytes=kind.latent_bytes, size_class=kind.size_class, work=kind.work)


def number_of(key: str) -> int:
    """The number of the sample with this key."""
    return int(key[1:])


def predicted_kind(run: ResolvedRun, work: Workload, gpu: Gpu) -> SampleKind:
    """The times of the cost model for one workload of a run."""
    plan = run.groups.by_shape[work.shape]
    return SampleKind(
        encode_s=work.branches * ENCODE_SECONDS,
        denoise_s=denoise_seconds(gpu, run.model, work, plan),
        decode_s=decode_seconds(gpu, run.model, work, plan.world_size if run.groups_decode else 1),
        steps=work.steps,
        size_class=run.groups.size_class(work.shape),
        work=work,
    )
