"""What lies in Ray's object stores between the stages, in bytes, by whose work it is.

A result stays on the node of the worker that made it until the next stage is done with it. So no node's store fills
if each worker holds back: what it has made and is about to make stays within its share (`StageLimits.result_bytes`).
One result always gets through, however large: a worker of which nothing is left may make anything.

Latents weigh what their shape says. What an embedding weighs is known only when it has come; until then each counts as
the heaviest that came so far, or as an assumption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage

# Two prompts (classifier-free guidance) of 256 tokens, 4096 wide in bfloat16: the most that the released encoders give.
ASSUMED_EMBEDDINGS = 2 * 256 * 4096 * 2

Maker = tuple[Stage, int]  # the slot, whatever its life


@dataclass(slots=True)
class _Load:
    latents: int  # bytes they will have
    made: dict[Stage, tuple[Maker, int]] = field(default_factory=dict)  # by which stage: whose work, and its bytes


class ObjectStoreBudget:
    def __init__(self, share: Mapping[Stage, float]) -> None:
        self._share = share  # bytes, of one worker of each stage
        self._loads: dict[str, _Load] = {}
        self._held: Counter[Maker] = Counter()
        self._heaviest = 0  # of the embeddings that came

    def admit(self, key: str, latents: int) -> None:
        self._loads[key] = _Load(latents)

    def room(self, worker: WorkerId, keys: Sequence[str]) -> int:
        """How many of the samples, in order, the worker may work on now: at least one if nothing of it is left."""
        held = self._held[worker.stage, worker.slot]
        sums = accumulate(self._expected(worker.stage, key) for key in keys)
        fitting = sum(held + expected <= self._share[worker.stage] for expected in sums)
        return fitting if held else max(1, fitting)

    def begin(self, worker: WorkerId, keys: Sequence[str]) -> None:
        """The worker makes the results of its stage for these samples."""
        for key in keys:
            self._put(key, (worker.stage, worker.slot), self._expected(worker.stage, key))

    def arrive(self, worker: WorkerId, keys: Sequence[str], weights: Sequence[int]) -> None:
        """They are there, each as heavy as told, or as expected where nothing is told."""
        for key, weight in zip(keys, weights, strict=False):
            self._put(key, (worker.stage, worker.slot), weight)
        if worker.stage is Stage.ENCODE:
            self._heaviest = max(self._heaviest, *weights, 0)

    def keep(self, key: str, stage: Stage | None) -> None:
        """The sample goes to `stage`, or is gone (None): only what was made for this stage is still held."""
        made = self._loads[key].made
        for producer in [producer for producer in made if stage is None or producer + 1 != stage]:
            maker, weight = made.pop(producer)
            self._held[maker] -= weight
        if stage is None:
            del self._loads[key]

    def _put(self, key: str, maker: Maker, weight: int) -> None:
        made, stage = self._loads[key].made, maker[0]
        if stage in made:
            before, old = made[stage]
            self._held[before] -= old
        made[stage] = (maker, weight)
        self._held[maker] += weight

    def _expected(self, stage: Stage, key: str) -> int:
        if stage is Stage.ENCODE:
            return self._heaviest or ASSUMED_EMBEDDINGS
        return self._loads[key].latents if stage is Stage.DENOISE else 0
