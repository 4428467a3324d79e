"""Step checkpoints: when they are written, that a failed write does not affect the denoise, their duration."""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest

from hv_batch.job import layout
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.records.latents import get_steps, put_steps
from hv_batch.job.storage.store import Store
from hv_batch.protocol import StepState
from hv_batch.runtime.groups import step_checkpoints
from hv_batch.runtime.groups.step_checkpoints import MIN_LIMIT_S, OVERDUE, StepTimer, StepWriter, read_steps
from hv_batch.runtime.worker import InFlight
from tests.support.records import PARAMS, SAMPLE

STEPS = PARAMS.num_inference_steps


def latents_after(step):
    return np.full(PARAMS.latent_shape, step, np.float32)


DEADLINE_S = 30  # of what takes milliseconds, so that a test that fails does not hang


class GatedStore(Store):
    """A store whose writes wait until the test allows them."""

    def __init__(self, url):
        super().__init__(url)
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)

    def put(self, key, data):
        self.begun.release()
        assert self.gate.wait(DEADLINE_S)
        super().put(key, data)


class Denoise:
    """Reports the steps of a test, and counts the copies of their latents."""

    def __init__(self, store, every, asked=None):
        self.read = []
        self.asked = asked or threading.Event()
        self.writer = StepWriter(store, SAMPLE, "identity", every, self.asked)

    def step(self, done):
        self.writer.after_step(done, lambda: self.read.append(done) or StepState(done, latents_after(done)))


@pytest.mark.parametrize(("every", "written"), [(0, []), (1, [1, 2, 3]), (2, [2]), (3, [3]), (4, []), (9, [])])
def test_checkpoints_are_written_every_so_many_steps(any_store, every, written):
    """P4: `groups.checkpoint_every`; never after the last step, and latents are copied only to be written."""
    denoise = Denoise(any_store, every)
    with denoise.writer:
        for step in range(1, STEPS + 1):
            denoise.step(step)
            if denoise.writer._writing:
                denoise.writer._writing.result()
    assert denoise.read == written
    state = get_steps(any_store, SAMPLE, "identity")
    assert (state.step if state else None) == (written[-1] if written else None)


def test_a_checkpoint_that_is_asked_for_follows_the_step_under_way(tmp_path):
    """P4: one checkpoint per request, for any `checkpoint_every`."""
    store = Store(str(tmp_path))
    denoise = Denoise(store, every=0)
    with denoise.writer:
        denoise.step(1)
        denoise.asked.set()
        denoise.step(2)
        denoise.step(3)
    assert denoise.read == [2]
    assert get_steps(store, SAMPLE, "identity").step == 2


def test_a_slow_store_makes_checkpoints_rare_and_holds_no_step_up(tmp_path):
    """P4, P7: one write at a time; checkpoints that become due meanwhile are skipped, requested ones come later."""
    store = GatedStore(str(tmp_path))
    denoise = Denoise(store, every=1)
    with denoise.writer:
        denoise.step(1)
        assert store.begun.acquire(timeout=DEADLINE_S)
        denoise.asked.set()
        denoise.step(2)  # comes back while the first write is held
        assert denoise.read == [1]
        assert denoise.asked.is_set()
        store.gate.set()
        denoise.writer._writing.result()
        denoise.step(3)
    assert denoise.read == [1, 3]
    assert get_steps(store, SAMPLE, "identity").step == 3, "the last write has ended with the denoise"
    assert denoise.writer.failed == 0


def test_a_write_under_way_ends_before_the_denoise_does(tmp_path):
    """P1: no write lands after the denoise has ended, not even after a failure."""
    store = GatedStore(str(tmp_path))
    denoise = Denoise(store, every=1)
    ended = threading.Event()

    def fail():
        try:
            with denoise.writer:
                denoise.step(1)
                raise RuntimeError("lost peer")
        except RuntimeError:
            ended.set()

    thread = threading.Thread(target=fail)
    thread.start()
    assert store.begun.acquire(timeout=DEADLINE_S)
    assert not ended.is_set()
    store.gate.set()
    thread.join()
    assert get_steps(store, SAMPLE, "identity").step == 1


def test_a_store_that_does_not_answer_disturbs_no_denoise(s3, s3_store):
    """P4: a failed write is only counted; a checkpoint that cannot be read is treated as missing."""
    put_steps(s3_store, SAMPLE, StepState(1, latents_after(1)), "identity")
    s3.faults = [503] * 1000
    denoise = Denoise(s3_store, every=1)
    with denoise.writer:
        for step in (1, 2):
            denoise.step(step)
            denoise.writer._writing.result()
    assert denoise.writer.failed == 2
    assert read_steps(s3_store, SAMPLE, "identity") is None
    s3.faults = []
    assert read_steps(s3_store, SAMPLE, "identity").step == 1


def test_a_place_that_cannot_be_written_disturbs_no_denoise(tmp_path):
    """P4: the same for permanent errors."""
    store = Store(str(tmp_path))
    store.put(layout.STEPS + layout.shard_name(SAMPLE.shard), b"a file where the folder should be")
    denoise = Denoise(store, every=1)
    with denoise.writer:
        denoise.step(1)
    assert denoise.writer.failed == 1


def test_what_led_to_a_refused_result_is_not_gone_on_from():
    """P5: after a POISON failure the sample starts from its noise, because the checkpoint may contain the fault."""
    lost, poisoned = (Failure(kind, "failed") for kind in (FailureClass.INFRA, FailureClass.POISON))
    assert InFlight(SAMPLE, has_steps=True, failures=(lost,)).may_resume()
    assert not InFlight(SAMPLE, has_steps=True, failures=(poisoned, lost)).may_resume()
    assert not InFlight(SAMPLE, failures=(lost,)).may_resume(), "nothing is read where nothing can be"


def test_a_rank_tells_when_its_next_step_is_overdue(monkeypatch):
    """P4: by its slowest step so far; never before two were made, nor after the last, when the output root has the
    word, nor after a denoise that failed.
    """
    now = 0.0
    monkeypatch.setattr(step_checkpoints, "time", SimpleNamespace(monotonic=lambda: now))
    pace, limits = StepTimer(), []
    for took in ([900.0, 1.0, 40.0, 2.0, 500.0], [3.0, 20.0]):
        with suppress(RuntimeError), pace.of(5) as after_step:
            for done, seconds in enumerate(took, 1):
                now += seconds
                after_step(done)
                limits.append(pace.next_within_s)
            raise RuntimeError("lost peer")
        assert pace.next_within_s == math.inf
    slowest = OVERDUE * 40.0
    assert limits == [math.inf, MIN_LIMIT_S, slowest, slowest, math.inf, math.inf, OVERDUE * 20.0]
    assert pace.steps == 7


def test_a_step_that_does_not_run_the_model_sets_no_limit(monkeypatch):
    """P4: the step cache predicts most steps in almost no time; the next computed step must not look like a hang."""
    now = 0.0
    monkeypatch.setattr(step_checkpoints, "time", SimpleNamespace(monotonic=lambda: now))
    pace, limits = StepTimer(), []
    with pace.of(9) as after_step:
        # (duration, number of computed steps so far), resumed after step 1
        for done, (seconds, computed) in enumerate([(0.1, 1), (0.1, 1), (100.0, 2), (0.1, 2), (0.1, 2), (90.0, 3)], 2):
            now += seconds
            after_step(done, computed)
            limits.append(pace.next_within_s)
    assert limits == [math.inf, math.inf, *[OVERDUE * 100.0] * 4]
