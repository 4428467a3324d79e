"""Between two steps, inside a group: rank 0 writes step checkpoints and reads one to resume from (P4), and every rank
tells by how long its steps take when the next one is overdue.

A checkpoint is insurance, and must never cost more than what it insures: one that cannot be written or read is as good
as none, and what is wrong with the store is said where the final latents or the video go there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from types import TracebackType
from typing import Self

import numpy as np

from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.latents import get_steps, put_steps
from hv_batch.job.storage.store import Store
from hv_batch.protocol import StepState

# All steps of a denoise take about as long, so one that takes several times longer than any before it hangs, and eight
# GPUs need not wait for timeouts.stall_s. But a busy node, or a neighbour that loads 26 GB, may hold up any step.
OVERDUE = 5.0
LEAST_PATIENCE_S = 60.0


class StepTimer:
    """Of the denoises of one rank, one after the other; asked from another thread."""

    def __init__(self) -> None:
        self.steps = 0  # of all of them
        self.patience_s = math.inf  # within which the next step will be made; inf where nobody knows

    @contextmanager
    def of(self, steps: int) -> Iterator[Callable[[int], None]]:
        """A denoise that ends with step `steps`; yields what is to be called after each, with its number.

        Nothing is known of the first two, which begin with reading a checkpoint and with choosing kernels, and of what
        follows the last one: that is the output root's pace.
        """
        last, longest = math.inf, 0.0

        def after_step(done: int) -> None:
            nonlocal last, longest
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            self.patience_s = max(LEAST_PATIENCE_S, OVERDUE * longest) if longest > 0 and done < steps else math.inf
            self.steps += 1

        try:
            yield after_step
        finally:
            self.patience_s = math.inf


class StepWriter:
    """Writes the step checkpoints of one denoise, every `every` steps (0: never by itself) and when `asked` is set.

    A context manager: after it no write is under way, so none can land once the sample's last word is spoken.
    """

    def __init__(self, store: Store, sample: Sample, identity: str, every: int, asked: Event) -> None:
        self._store, self._sample, self._identity = store, sample, identity
        self._every = every
        self._asked = asked
        self._thread: ThreadPoolExecutor | None = None  # most denoises write none
        self._is_due = False
        self._writing: Future[None] | None = None
        self.failed = 0  # writes that did not succeed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread:
            self._thread.shutdown()

    def after_step(self, done: int, read: Callable[[], np.ndarray] | None) -> None:
        """Begin a write if one is due; the ranks wait for nothing but the copy to host memory.

        While the last write is under way no other begins: on a slow store checkpoints become rare, and do not pile up.
        What is due after a step that cannot be resumed from is written after the next one that can.
        """
        self._is_due |= self._every > 0 and done % self._every == 0
        is_last = done == self._sample.params.num_inference_steps
        if is_last or read is None or not (self._is_due or self._asked.is_set()):
            return
        self._is_due = False
        if self._writing and not self._writing.done():
            return
        self._asked.clear()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="steps")
        self._writing = self._thread.submit(self._write, StepState(done, read()))

    def _write(self, state: StepState) -> None:
        try:
            put_steps(self._store, self._sample, state, self._identity)
        except Exception:  # noqa: BLE001  # every store has errors of its own, and none may end a denoise
            self.failed += 1


def read_steps(store: Store, sample: Sample, identity: str) -> StepState | None:
    """The last step checkpoint, or None where there is none or the store does not give it."""
    try:
        return get_steps(store, sample, identity)
    except Exception:  # noqa: BLE001  # as above: the denoise can begin anew
        return None
