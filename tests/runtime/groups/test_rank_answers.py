"""What a group makes of its ranks' answers and errors, and how long it waits for them (P4, P5)."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayError

from hv_batch.job.scheduling.messages import Published
from hv_batch.runtime.groups import rank_answers
from hv_batch.runtime.groups.rank_answers import COLLATERAL_S, RankAnswers

REFS = ("a", "b", "c")


class Group:
    """Answers of three ranks: the test lets them arrive, and lets time pass."""

    def __init__(self, monkeypatch):
        self.watched, self.timers, self.failed = {}, [], []
        self.results = {}
        monkeypatch.setattr(rank_answers.ray, "get", self._get)
        self.answers = RankAnswers(
            REFS,
            lambda answers: [Published(f"{ref}={answers[ref]}") for ref in REFS],
            self._fail,
            self.watched.__setitem__,
            lambda delay_s, call: self.timers.append((delay_s, call)),
        )

    def _get(self, ref):
        if isinstance(result := self.results[ref], Exception):
            raise result
        return result

    def _fail(self, errors):
        self.failed.append(dict(errors))
        return [Published("failed")]

    def arrive(self, ref, result):
        self.results[ref] = result
        return self.watched.pop(ref)(ref)

    def time_out(self):
        ((delay_s, call),) = self.timers
        assert delay_s == COLLATERAL_S
        return call()


@pytest.fixture
def group(monkeypatch):
    return Group(monkeypatch)


def test_the_answers_of_all_ranks_come_together(group):
    assert group.arrive("b", 2) == group.arrive("a", 1) == []
    assert group.arrive("c", 3) == [Published("a=1"), Published("b=2"), Published("c=3")]
    assert group.timers == []


def test_errors_of_other_ranks_are_collected_for_a_moment(group):
    """P5: the most telling error may come after the first; those that come too late change nothing."""
    first, second = RayError("lost its peer"), RayError("CUDA error")
    assert group.arrive("a", first) == []
    assert group.answers.is_failing
    assert group.arrive("b", second) == []
    assert group.time_out() == [Published("failed")]
    assert not group.answers.is_failing
    assert group.arrive("c", RayError("late")) == []
    assert group.failed == [{"a": first, "b": second}]


def test_nothing_is_awaited_once_every_rank_has_answered(group):
    """P4: a group whose ranks all refuse a sample goes on at once; the timer changes nothing."""
    errors = {ref: ActorDiedError() for ref in REFS}
    events = [event for ref in REFS for event in group.arrive(ref, errors[ref])]
    assert events == [Published("failed")]
    assert group.failed == [errors]
    assert group.time_out() == []


def test_a_killed_group_reports_nothing(group):
    """P5: what comes after the kill is of an earlier incarnation."""
    group.arrive("a", RayError("first"))
    group.answers.cancel()
    assert group.time_out() == group.arrive("b", RayError("second")) == group.arrive("c", 3) == []
    assert group.failed == []
    assert not group.answers.is_failing
