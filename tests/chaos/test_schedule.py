"""Schedules can be replayed, and name only events that the agent can carry out."""

from __future__ import annotations

import pytest

from tests.chaos.agent import TITLES, Agent
from tests.chaos.faults.storage_faults import FAULTS
from tests.chaos.schedule import BY_ROOT, make_schedule


def test_equal_seeds_give_equal_schedules():
    assert make_schedule(7, "s3", 50) == make_schedule(7, "s3", 50)
    assert make_schedule(7, "s3", 50) != make_schedule(8, "s3", 50)


def test_a_long_schedule_has_every_kind_of_event():
    for root, kinds in BY_ROOT.items():
        assert {event.kind for event in make_schedule(1, root, 1500)} == set(kinds)


def test_a_schedule_can_be_restricted():
    assert {event.kind for event in make_schedule(1, "s3", 50, kinds={"kill-rank"})} == {"kill-rank"}


@pytest.mark.parametrize("kind", sorted({kind for kinds in BY_ROOT.values() for kind in kinds}))
def test_the_agent_knows_each_event(kind):
    act, _, target = kind.partition("-")
    if act == "s3":
        assert target in FAULTS
    elif target not in TITLES and kind != "disk-full":
        assert callable(getattr(Agent, f"_{kind.replace('-', '_')}"))
