"""Step checkpoints and step times of a denoise.

Rank 0 writes step checkpoints and reads one to resume from (P4). Every rank measures its steps, so that the driver
notices a hang. A checkpoint that cannot be written or read must never fail a denoise: the denoise goes on without it,
and a permanent fault of the store is reported when the final latents or the video are written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from types import TracebackType
from typing import Self

from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.latents import get_steps, put_steps
from hv_batch.job.storage.store import Store
from hv_batch.protocol import StepState

# All steps of a denoise that run the model take about the same time. A step that takes several times longer than the
# longest one before it hangs, and is detected earlier than by timeouts.stall_s. The minimum allows for a busy node and
# for another group that loads 26 GB of weights.
OVERDUE = 5.0
MIN_LIMIT_S = 60.0


class StepTimer:
    """Measures the steps of one rank's denoises. Another thread of the actor reads the attributes."""

    def __init__(self) -> None:
        self.steps = 0  # of all denoises
        self.next_within_s = math.inf  # the next step ends within this time; inf if that is not known

    @contextmanager
    def of(self, steps: int) -> Iterator[Callable[[int, int | None], None]]:
        """Measure a denoise of `steps` steps. Yields a function that must be called after each step, with the number of
        finished steps and with that of those that ran the model (None: all).

        Steps that do not run the model are not measured, because the next one may. There is no limit for the first
        step, which includes reading a checkpoint and selecting kernels, none until a later one has run the model, and
        none after the last step, when the latents are written to the output root.
        """
        last, longest, before = math.inf, 0.0, -1

        def after_step(done: int, computed: int | None = None) -> None:
            nonlocal last, longest, before
            now, runs = time.monotonic(), done if computed is None else computed
            longest, last = max(longest, now - last if runs > before else 0.0), now
            before = runs
            self.next_within_s = max(MIN_LIMIT_S, OVERDUE * longest) if longest > 0 and done < steps else math.inf
            self.steps += 1

        try:
            yield after_step
        finally:
            self.next_within_s = math.inf


class StepWriter:
    """Writes the step checkpoints of one denoise, every `every` steps (0: only on request) and when `asked` is set.

    A context manager. On exit it waits for a running write, so that none lands after the sample has its final record.
    """

    def __init__(self, store: Store, sample: Sample, identity: str, every: int, asked: Event) -> None:
        self._store, self._sample, self._identity = store, sample, identity
        self._every = every
        self._asked = asked
        self._thread: ThreadPoolExecutor | None = None  # started by the first checkpoint; most denoises write none
        self._writing: Future[None] | None = None
        self.failed = 0  # writes that did not succeed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread:
            self._thread.shutdown()

    def after_step(self, done: int, read: Callable[[], StepState]) -> None:
        """Start a write if one is due. The ranks wait only for the copy of the state to host memory.

        `done` is the number of finished steps; `read` returns the state after them. No write starts while the last one
        runs, so on a slow store checkpoints become rare instead of piling up.
        """
        is_due = (self._every > 0 and done % self._every == 0) or self._asked.is_set()
        if not is_due or done == self._sample.params.num_inference_steps:
            return
        if self._writing and not self._writing.done():
            return
        self._asked.clear()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="steps")
        self._writing = self._thread.submit(self._write, read())

    def _write(self, state: StepState) -> None:
        try:
            put_steps(self._store, self._sample, state, self._identity)
        except Exception:  # noqa: BLE001  # stores raise errors of many types, and none may fail a denoise
            self.failed += 1


def read_steps(store: Store, sample: Sample, identity: str, earlier: Collection[str] = ()) -> StepState | None:
    """The last step checkpoint, as `get_steps`; None if there is none or it cannot be read."""
    try:
        return get_steps(store, sample, identity, earlier)
    except Exception:  # noqa: BLE001  # as above: the denoise can start from the first step
        return None
