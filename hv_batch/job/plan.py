"""What is left to render, shard by shard, and when a shard is complete.

A shard is looked up in the output root only when the run comes to it, and forgotten once it is sealed: however long the
manifest, only the shards between the oldest running sample and the newest are held (P7).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

from hv_batch.job.commits import scan_shard
from hv_batch.job.events import Stage
from hv_batch.job.latents import checkpointed, drop_latents, drop_steps
from hv_batch.job.samples import Sample
from hv_batch.job.storage import Store
from hv_batch.job.store_errors import StorageUnavailableError

T = TypeVar("T")


@dataclass(slots=True)
class Tally:
    """Samples by how they stand, over the part of the manifest the plan has come to."""

    committed_before: int = 0  # found in the output root
    quarantined_before: int = 0
    committed: int = 0  # by this run
    quarantined: int = 0

    @property
    def terminal(self) -> int:
        return self.committed_before + self.quarantined_before + self.committed + self.quarantined


@dataclass(frozen=True, slots=True)
class Pending:
    """A sample that is to be rendered."""

    sample: Sample
    stage: Stage  # the station at which it begins
    has_steps: bool  # an earlier run has left a step checkpoint of it


@dataclass(frozen=True, slots=True)
class Passed:
    """A shard with nothing left to render has been looked up."""

    shard: int


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The output root does not answer; going on with the iteration asks it again."""

    error: StorageUnavailableError


@dataclass(slots=True)
class _OpenShard:
    keys: tuple[str, ...]  # in plan order
    pending: int


@dataclass(frozen=True, slots=True)
class Sealable:
    """A shard whose last sample has become terminal."""

    shard: int
    keys: tuple[str, ...]


class Plan:
    """Iterate it for the pending samples; tell it what became of each.

    `keep_latents` leaves alone what a crash between a commit and the removal of its latents has left behind.
    """

    def __init__(self, store: Store, samples: Iterable[Sample], *, keep_latents: bool = False) -> None:
        self.tally = Tally()
        self._store = store
        self._keep_latents = keep_latents
        self._open: dict[int, _OpenShard] = {}
        self._sealable: list[Sealable] = []
        self._pending = self._walk(samples)

    def __iter__(self) -> Iterator[Pending | Passed | Unanswered]:
        return self._pending

    def _walk(self, samples: Iterable[Sample]) -> Iterator[Pending | Passed | Unanswered]:
        # One listing for all shards: only what was running when a run ended has a step checkpoint.
        with_steps = yield from _persist(partial(checkpointed, self._store))
        for shard, members in groupby(samples, key=attrgetter("shard")):
            inside = list(members)
            state = yield from _persist(partial(scan_shard, self._store, shard))
            terminal = state.committed | state.quarantined
            self.tally.committed_before += sum(sample.key in state.committed for sample in inside)
            self.tally.quarantined_before += sum(sample.key in state.quarantined for sample in inside)
            keys = tuple(sample.key for sample in inside)
            pending = [sample for sample in inside if sample.key not in terminal]
            if pending:
                self._open[shard] = _OpenShard(keys, len(pending))
            elif not state.sealed:
                self._sealable.append(Sealable(shard, keys))
            if not self._keep_latents:
                for sample in inside:
                    if sample.key in state.latents & terminal:
                        yield from _persist(partial(drop_latents, self._store, sample))
            for sample in inside:
                if sample.key in with_steps & terminal:
                    yield from _persist(partial(drop_steps, self._store, sample))
            if not pending:
                yield Passed(shard)
            for sample in pending:
                stage = Stage.DECODE if sample.key in state.latents else Stage.ENCODE
                yield Pending(sample, stage, sample.key in with_steps)

    def committed(self, sample: Sample) -> None:
        self.tally.committed += 1
        self._terminal(sample)

    def quarantined(self, sample: Sample) -> None:
        self.tally.quarantined += 1
        self._terminal(sample)

    def _terminal(self, sample: Sample) -> None:
        shard = self._open[sample.shard]
        shard.pending -= 1
        if shard.pending == 0:
            del self._open[sample.shard]
            self._sealable.append(Sealable(sample.shard, shard.keys))

    def take_sealable(self) -> list[Sealable]:
        """The shards that have become complete since the last call, including those a crash left unsealed."""
        ready, self._sealable = self._sealable, []
        return ready


def _persist(act: Callable[[], T]) -> Generator[Unanswered, None, T]:
    """What `act` on the output root returns, however often it takes. An exception would end the iteration for good."""
    while True:
        try:
            return act()
        except StorageUnavailableError as error:
            yield Unanswered(error)
