"""What a report adds up over shards: facets, causes, spreads and progress do not depend on how samples are divided."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job.report import facets, pace, spread
from hv_batch.job.report.causes import add_causes, group_causes
from hv_batch.job.report.facets import FacetSums, count_facets, restrict
from hv_batch.job.report.pace import Pace, TimeBins, join
from hv_batch.job.report.spread import Spread

VALUES = st.dictionaries(st.sampled_from(["topic", "take"]), st.sampled_from([f"v{n}" for n in range(8)]), max_size=2)


def sample(values: dict[str, str], **changes) -> dict:
    unknown = dict.fromkeys(("class", "height", "width", "frames"))
    return {"state": "committed", "flags": [], "facets": values, **unknown, **changes}


@given(st.lists(VALUES, max_size=40), st.integers(1, 7))
def test_facets_count_every_sample_once(values, shard_size):
    """The sums over shards are the counts over all samples, whatever the size of a shard."""
    samples = [sample(each) for each in values]
    sums, whole = FacetSums(), FacetSums()
    for first in range(0, len(samples), shard_size):
        sums.add(count_facets(samples[first : first + shard_size]))
    whole.add(count_facets(samples))
    assert sums.result() == whole.result()
    expected = Counter(each["topic"] for each in values if "topic" in each)
    assert sums.result().get("topic", {}) == expected


def test_a_facet_has_a_bounded_number_of_values(monkeypatch):
    """P7: the rest is `other`, in the report and in the line of each shard."""
    monkeypatch.setattr(facets, "MAX_SHOWN", 3)
    samples = [sample({"topic": f"t{n % 6}"}) for n in range(60)] + [sample({"topic": "t0"})]
    sums = FacetSums()
    sums.add(counts := count_facets(samples))
    shown = sums.result()
    assert shown["topic"] == {"t0": 11, "t1": 10, "t2": 10, "other": 30}
    assert restrict(counts, shown)["topic"] == shown["topic"]


def test_a_column_that_names_the_samples_is_no_facet():
    """A hash of each prompt or a number of each row would be a facet with as many values as samples."""
    sums = FacetSums()
    sums.add(count_facets(sample({"hash": f"{n:x}", "topic": "birds"}) for n in range(100)))
    assert sums.result().keys() == {"state", "topic"}


def test_a_column_named_like_a_facet_of_the_report_keeps_its_values():
    from hv_batch.job.report.samples import describe_committed
    from tests.support.rendered_roots import make_commit, make_sample

    described = describe_committed(make_commit(make_sample(1, extra={"state": "Ohio", "n": 3, "long": "x" * 99})))
    assert described["facets"] == {"extra_state": "Ohio", "n": "3"}


def failure(number: int, kind: str = "POISON", message: str = "step 3 is not finite") -> dict:
    return {
        "id": f"i{number}",
        "key": f"k{number}",
        "shard": number // 4,
        "params": {"prompt": "x" * 1000},
        "class": kind,
        "message": message,
        "traceback": "y" * 99_999,
    }


FAILURES = st.lists(st.tuples(st.sampled_from(["POISON", "INFRA"]), st.sampled_from(["a 1", "a 2", "b"])), max_size=30)


@given(FAILURES, st.integers(1, 30))
def test_causes_do_not_depend_on_the_shards(kinds, cut):
    """P5: every failure counts for one cause, and the first three are its examples."""
    records = [failure(number, *each) for number, each in enumerate(kinds)]
    joined = add_causes(group_causes(records[:cut]), group_causes(records[cut:]))
    expected = Counter((kind, message.replace("1", "#").replace("2", "#")) for kind, message in kinds)
    assert {(cause["class"], cause["message"]): cause["count"] for cause in joined} == expected
    for cause in joined:
        assert len(cause["examples"]) == min(3, cause["count"])
        assert len(cause["traceback"]) <= 8000
        assert all(len(example["prompt"]) <= 300 for example in cause["examples"])
    assert [cause["count"] for cause in joined] == sorted(expected.values(), reverse=True)


def test_the_number_of_causes_is_bounded():
    """P7: messages that differ in more than numbers do not fill the page."""
    causes = group_causes(failure(n, message="x" * (n % 150 + 1)) for n in range(600))
    assert len(causes) <= 101
    assert sum(cause["count"] for cause in causes) == 600


@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=60), st.integers(1, 9))
def test_spreads_are_those_of_all_times(millis, cut):
    """Mean, smallest and largest are exact; percentiles to one percent, and to a millisecond."""
    found = Spread()
    found.add(millis[:cut])
    found.add(millis[cut:])
    seconds = [each / 1000 for each in millis]
    shown = found.to_dict()
    assert shown["count"] == len(seconds)
    assert shown["mean"] == pytest.approx(math.fsum(seconds) / len(seconds), rel=1e-4, abs=0.001)
    assert shown["min"] == pytest.approx(min(seconds), rel=1e-4, abs=0.001)
    assert shown["max"] == pytest.approx(max(seconds), rel=1e-4, abs=0.001)
    for name, percent in spread.PERCENTS.items():
        exact = np.percentile(seconds, percent, method="inverted_cdf")
        assert shown[name] == pytest.approx(exact, rel=0.011, abs=0.0021)


TIMES = st.lists(st.integers(1_700_000_000, 1_700_200_000), max_size=50)


@given(TIMES, TIMES)
def test_bins_of_time_do_not_depend_on_the_order(first, second):
    """P7: a bounded number of bins, and the same ones whichever shard comes first."""
    bounded, pace.MAX_BINS = pace.MAX_BINS, 16
    try:
        there, back, merged, other = TimeBins(), TimeBins(), TimeBins(), TimeBins()
        there.add(first)
        there.add(second)
        back.add([*second[::-1], *first])
        merged.add(first)
        other.add(second)
        merged.merge(other)
    finally:
        pace.MAX_BINS = bounded
    for bins in (back, merged):
        assert (bins.width, bins.counts) == (there.width, there.counts)
    assert len(there.counts) <= 16
    assert sum(there.counts.values()) == len(first) + len(second)


@given(TIMES, TIMES)
def test_progress_ends_at_the_counts(committed, quarantined):
    """At most MAX_POINTS points, in order, from nothing to everything."""
    good, bad = TimeBins(), TimeBins()
    good.add(committed)
    bad.add(quarantined)
    points = Pace(good, bad, samples=200, withdrawn=1).points()
    if not committed and not quarantined:
        assert points == []
        return
    assert len(points) <= pace.MAX_POINTS
    assert points[0][1:] == [0, 0, 199]
    assert points[-1][1:] == [len(committed), len(quarantined), 199 - len(committed) - len(quarantined)]
    assert points == sorted(points)


def test_the_rate_is_that_of_the_last_hour():
    """The samples of an earlier night do not count, and one sample is no rate."""
    good, bad, now = TimeBins(), TimeBins(), 1_700_000_000
    good.add([now - 90_000 + n for n in range(1000)])
    found = Pace(good, bad, samples=2000, withdrawn=0)
    assert (found.rate(now), found.eta_s(now, 1000), found.eta_s(now, 0)) == (None, None, 0.0)
    good.add([now - 60 * n for n in range(11)])
    assert found.rate(now) == pytest.approx(10 / 600)
    assert found.eta_s(now, 100) == pytest.approx(6000)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=20), st.integers(0, 5))
def test_joined_ranges_cover_the_same_time(spans, gap):
    ranges = [(float(begin), float(begin + length)) for begin, length in spans]
    joined = join(ranges, gap)
    assert all(later[0] - earlier[1] > gap for earlier, later in itertools.pairwise(joined))
    covered = {second for begin, end in joined for second in range(int(begin), int(end))}
    assert {second for begin, end in ranges for second in range(int(begin), int(end))} <= covered
