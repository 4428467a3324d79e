"""Which steps run the model: properties of schedules, and the options of the step cache and of CFG gating."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.protocol import UserError
from hv_batch.step_schedule import (
    StepSchedule,
    guided_steps,
    parse_cfg_until,
    parse_step_cache,
)

JENGA = (0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 26, 29, 32, 35, 38, 41, 43, 45, 46, 47, 49)


@st.composite
def spreads(draw):
    of = draw(st.integers(2, 200))
    computed = draw(st.integers(2, of))
    warmup, taper = draw(st.integers(0, computed)), draw(st.sampled_from([0.0, 0.35, 0.9]))
    return StepSchedule(computed=computed, of=of, warmup=warmup, taper=taper)


@st.composite
def lists(draw):
    of = draw(st.integers(2, 200))
    return StepSchedule(computed=tuple(draw(st.sets(st.integers(0, of - 1), min_size=1))), of=of)


@given(schedule=spreads() | lists(), total=st.integers(1, 300))
def test_the_first_and_the_last_step_are_computed(schedule, total):
    """For every number of steps; computed steps ascend and exist."""
    steps = schedule.steps(total)
    assert steps[0] == 0
    assert steps[-1] == total - 1
    assert list(steps) == sorted(set(steps))


@given(schedule=spreads(), total=st.integers(1, 300))
def test_the_share_of_computed_steps_is_that_of_the_option(schedule, total):
    """The cost of a video is known in advance. The warm-up is complete, and the other gaps are even
    without a taper, and never grow by more than rounding with one.
    """
    steps = schedule.steps(total)
    assert len(steps) == min(total, max(2, -(-schedule.computed * total // schedule.of)))
    dense = min(len(steps) - 1, -(-schedule.warmup * total // schedule.of))
    assert steps[:dense] == tuple(range(dense))
    gaps = [after - before for before, after in pairwise(steps[max(0, dense - 1) :])]
    if schedule.taper == 0:
        assert not gaps or max(gaps) - min(gaps) <= 1
    else:
        assert all(after <= before + 1 for before, after in pairwise(gaps))


@given(schedule=lists())
def test_a_list_is_kept_at_its_own_number_of_steps(schedule):
    """A published list of 50 steps means these steps at 50 steps."""
    assert schedule.steps(schedule.of) == tuple(sorted({0, *schedule.computed, schedule.of - 1}))


def test_published_lists_and_shares():
    """The documented examples."""
    assert StepSchedule(computed=16).steps(50) == (0, 4, 9, 13, 16, 20, 24, 27, 30, 34, 36, 39, 42, 44, 47, 49)
    assert StepSchedule(computed=16, taper=0.0).steps(20) == (0, 3, 6, 10, 13, 16, 19)
    assert StepSchedule(computed=16, warmup=5).steps(50)[:7] == (0, 1, 2, 3, 4, 9, 15)
    assert StepSchedule(computed=JENGA).steps(50) == JENGA
    assert len(StepSchedule(computed=JENGA).steps(100)) == 2 * len(JENGA)


def test_half_of_the_steps_is_half_of_them():
    """A share of 0.5 of 50 steps is 25 steps; a share is rounded up."""
    assert [guided_steps(0.5, total) for total in (1, 2, 50, 51)] == [1, 1, 25, 26]
    assert guided_steps(0.3, 10) == 3  # 0.3 * 10 is above 3 in floating point on no machine
    assert guided_steps(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001


@given(schedule=spreads() | lists())
def test_an_identity_is_read_back(schedule):
    """P3: the identity of a run holds the complete option, as JSON values."""
    assert parse_step_cache(schedule.identity()) == schedule


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_no_cache_is_the_default_of_every_version(off):
    """P2: run.json of older versions may hold a threshold of 0."""
    assert parse_step_cache(off) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.1, r"0\.1 is not allowed\. .*first-block cache, which hv_batch 0\.2\.0.*\{kind: schedule, computed: 16\}"),
        (True, "True is not allowed; allowed is a mapping such as"),
        ("0.1", "'0.1' is not allowed; allowed is a mapping"),
        ([3], "allowed is a mapping"),
        ({"kind": "first-block", "computed": 3}, "allowed is a mapping"),
        ({"kind": "schedule"}, "allowed is a mapping"),
        (
            {"kind": "schedule", "computed": 3, "every": 2},
            "unknown 'every'; allowed are kind, computed, of",
        ),
        ({"kind": "schedule", "computed": 1}, r"computed must be a whole number from 2 to 50 \(of\)"),
        ({"kind": "schedule", "computed": 0.5}, "computed must be a whole number"),
        ({"kind": "schedule", "computed": True}, "computed must be a whole number"),
        ({"kind": "schedule", "computed": {"a": 1}}, "computed must be a whole number"),
        ({"kind": "schedule", "computed": 20, "of": 10}, r"computed must be a whole number from 2 to 10 \(of\)"),
        ({"kind": "schedule", "computed": 2, "of": 1}, "of must be a whole number from 2 to 1000"),
        ({"kind": "schedule", "computed": 2, "of": [50]}, "of must be a whole number from 2 to 1000"),
        ({"kind": "schedule", "computed": []}, "a list of step numbers from 0 to 49"),
        ({"kind": "schedule", "computed": [0, 50]}, "a list of step numbers from 0 to 49"),
        ({"kind": "schedule", "computed": [0, [3]]}, "a list of step numbers from 0 to 49"),
        ({"kind": "schedule", "computed": [3, 3]}, "lists a step twice"),
        ({"kind": "schedule", "computed": [0, 3], "warmup": 2}, "warmup is not allowed with a list"),
        ({"kind": "schedule", "computed": 5, "warmup": 6}, r"warmup must be a whole number from 0 to 5 \(computed\)"),
        ({"kind": "schedule", "computed": 5, "taper": 1}, r"taper must be a number from 0 to 0\.9, not 1\.0"),
        ({"kind": "schedule", "computed": 5, "taper": float("nan")}, "taper must be a number"),
        ({"kind": "schedule", "computed": 5, "correct": 1}, "correct must be true or false"),
        ({"kind": "schedule", "computed": 5, "order": 3}, "order must be a whole number from 0 to 2"),
        ({"kind": "schedule", "computed": 5, "order": "1"}, "order must be a whole number"),
    ],
)
def test_a_wrong_step_cache_is_reported_with_the_allowed_values(value, message):
    """P6: a number, from a root or a config of an older version, names that version and the new form."""
    with pytest.raises(UserError, match=message):
        parse_step_cache(value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "0.5", float("nan"), [0.5]])
def test_a_wrong_share_is_reported_with_the_allowed_values(value):
    """P6: the same for CFG gating."""
    with pytest.raises(UserError, match=r"cfg_until: .* is not allowed; allowed is a number above 0 and at most 1"):
        parse_cfg_until(value)


def test_every_step_guided_is_the_default():
    assert parse_cfg_until(None) is parse_cfg_until(1) is parse_cfg_until(1.0) is None
    assert parse_cfg_until(0.5) == 0.5
