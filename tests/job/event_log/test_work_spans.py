"""Tasks of a worker become spans of time: no sample is left out, and their number does not grow with the samples."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.event_log.work_spans import FIRST_S, PAUSE_S, WorkSpan, WorkSpans

TASKS = st.tuples(st.floats(0, 100), st.floats(0.01, 900), st.integers(1, 8), st.booleans())


@given(st.lists(TASKS, max_size=60))
def test_every_task_is_in_one_span(tasks):
    """The spans of a worker follow each other, and their sums are those of its tasks."""
    spans, found, now = WorkSpans(0.0), [], 0.0
    for idle_s, task_s, samples, failed in tasks:
        begun, now = now + idle_s, now + idle_s + task_s
        before = spans.task_ended("denoise-0.0", begun, now, samples, failed=failed)
        found += [before] if before else []
        found += [span for _, span in spans.take_due(now, 1)]
    last = spans.take("denoise-0.0", now)
    found += [last] if last else []
    assert sum(span.samples for span in found) == sum(samples for _, _, samples, _ in tasks)
    assert sum(span.failed for span in found) == sum(samples for _, _, samples, failed in tasks if failed)
    assert sum(span.seconds for span in found) == pytest.approx(sum(seconds for _, seconds, _, _ in tasks))
    assert all(span.seconds <= span.until - span.since + 1e-6 for span in found)
    assert all(before.until <= after.since + 1e-6 for before, after in pairwise(found))


def test_a_pause_ends_a_span():
    spans = WorkSpans(0.0)
    assert spans.task_ended("a", 0.0, 2 * FIRST_S, 1, failed=False) is None
    resumed = 2 * FIRST_S + PAUSE_S
    assert spans.task_ended("a", resumed, resumed + 1, 1, failed=False) == WorkSpan(0.0, 2 * FIRST_S, 1, 0, 2 * FIRST_S)
    assert spans.take("a", resumed + 1) == WorkSpan(resumed, resumed + 1, 1, 0, 1.0)
    assert spans.take("a", resumed + 1) is None


@pytest.mark.parametrize("workers", [1, 100, 900])
def test_a_night_of_many_workers_has_a_bounded_number_of_spans(workers):
    """P7: 12 hours of workers that are idle half of the time, longer than a pause."""
    spans, found = WorkSpans(0.0), 0
    for now in range(200, 12 * 3600, 200):
        for worker in map(str, range(workers)):
            found += spans.task_ended(worker, now - 100.0, float(now), 1, failed=False) is not None
        found += sum(1 for _ in spans.take_due(float(now), workers))
    assert found <= 10_000
