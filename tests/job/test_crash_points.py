"""A crash before and after every operation that changes an output root, followed by the same command (P1, P2, P4)."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.records.commits import read_commit
from hv_batch.job.records.quarantine import read_quarantined, release
from hv_batch.job.records.run_document import read_run
from hv_batch.job.records.withdrawn import withdrawn_keys
from hv_batch.job.storage.store import Store
from tests.support.continued_runs import Command, copied, rows_of, verified
from tests.support.crash_points import (
    ACTS,
    EXPECTED,
    EXPECTED_BUT_TRIES,
    NAMED,
    POISON,
    SAMPLES,
    SHARDS,
    acts_of,
    crash_and_resume,
    drive,
    finished_url,
    fresh_url,
    is_sound,
    number_of,
    points,
    repair,
    run_small,
    take_back,
    withdraw_two,
)
from tests.support.doubles import Crash, CrashingStore
from tests.support.small_runs import TRIES, everything


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", NAMED)
def test_a_crash_at_a_named_point(tmp_path, point, when):
    """P1, P2: on a local disk, the root ends byte for byte as after an undisturbed run, and no work is done twice."""
    crash_and_resume(str(tmp_path / "root"), [(number_of(NAMED[point]), when)])


@pytest.mark.parametrize("point", ["record", pytest.param("seal", marks=pytest.mark.slow)])
def test_a_crash_on_s3(s3_store, point):
    """P1, P2: the same with conditional PUTs in place of hard links."""
    crash_and_resume(s3_store.url, [(number_of(NAMED[point]), "after")])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(4))
def test_a_crash_at_every_point_on_s3(s3_store, first):
    """P1, P2: every operation on S3; in four parts, because the server handles one request at a time."""
    for point in points(len(ACTS))[first::4]:
        crash_and_resume(f"{s3_store.url}/{point[0]}-{point[1]}", [point])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tmp_path", "s3_store"])
def test_two_drivers_at_once(request, kind):
    """P1: if the lease fails, two concurrent runs end like one run, with one record for each sample."""
    place = request.getfixturevalue(kind)
    for again in range(2):
        url = f"{place.url if isinstance(place, Store) else place}/{again}"
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            list(pool.map(drive, [url] * 2))
        is_sound(Store(url))
        assert everything(Store(url)) == EXPECTED


def test_a_crash_at_every_point():
    """P1, P2: every operation of a run."""
    for point in points(len(ACTS)):
        crash_and_resume(fresh_url(), [point])


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(st.integers(0, len(ACTS) - 1), st.sampled_from(["before", "after"])), max_size=4))
def test_crash_after_crash(crashes):
    """P2: resumes may be killed as well, any number of times."""
    crash_and_resume(fresh_url(), crashes)


# The commands of an operator may be killed as well --------------------------------------------------------------------

# By default at every seventeenth point, because each takes two or three runs.
SOME = pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 17])


@SOME
def test_a_retry_that_is_killed(every):
    """P2, P5: at whatever point it is killed, the run command leaves a valid root, and the retry can be repeated. No
    terminal attempt is lost from the history.
    """
    for at, when in list(points(acts_of(take_back)))[::every]:
        url = finished_url()
        with pytest.raises(Crash):
            take_back(CrashingStore(url, at, when))
        store = Store(url)
        run_small(store, SAMPLES, poison=POISON)
        is_sound(store)
        assert everything(store, ignoring=TRIES) == EXPECTED_BUT_TRIES
        attempts_before = [record["attempts"] for record in read_quarantined(store, SHARDS)]
        take_back(store)
        run_small(store, SAMPLES)
        is_sound(store)
        assert len(list(store.list("commits"))) == len(SAMPLES)
        again = [read_commit(store, shard, key)["attempts"] for shard, key in ((0, "s003"), (1, "s005"))]
        assert again == [attempts + 1 for attempts in attempts_before]


@SOME
def test_a_repair_that_is_killed(every):
    """P2: at whatever point it is killed, the run command renders what was removed and restores the root."""
    for at, when in list(points(acts_of(repair)))[::every]:
        url = finished_url()
        with pytest.raises(Crash):
            repair(CrashingStore(url, at, when))
        run_small(Store(url), SAMPLES, poison=POISON)
        is_sound(Store(url))
        assert everything(Store(url)) == EXPECTED


@SOME
def test_a_withdrawal_that_is_killed(every):
    """P1, P2: at whatever point it is killed, the same command finishes it, with or without a run in between."""
    undisturbed = finished_url()
    withdraw_two(Store(undisturbed))
    expected = everything(Store(undisturbed))
    for at, when in list(points(acts_of(withdraw_two)))[::every]:
        for runs_between in (False, True):
            url = finished_url()
            store = Store(url)
            with pytest.raises(Crash):
                withdraw_two(CrashingStore(url, at, when))
            if runs_between:
                denoised: Counter[str] = Counter()
                run_small(store, SAMPLES, poison=POISON, denoised=denoised)
                assert not denoised, "a sample was rendered again"
            withdraw_two(store)
            is_sound(store)
            assert everything(store) == expected
            assert {key for shard in SHARDS for key in withdrawn_keys(store, shard)} == {"s002", "s005"}


# A root that continues with a grown manifest or an allowed change -----------------------------------------------------


def crash_and_continue(folder: Path, kind: str, *, to_the_end: bool) -> None:
    """Crash at each of the writes with which a root continues, or at each write of the command; then repeat it."""
    first = Command(folder / "m.jsonl", rows_of(5), poison={"s005"})
    grown = {"rows": [*first.rows, {**rows_of(6)[5], "take": 1}]}
    change = grown if kind == "grown" else {"sections": {"defaults": {"flow_shift": 5.0}}}
    then = replace(first, **change, allowed=["defaults"], poison=())
    begun = Store(fresh_url())
    first.run(begun)
    if kind == "allowed":  # otherwise no sample would be left that could get the new value
        release(begun, read_quarantined(begun, SHARDS))

    def run_again(at: int | None, when: str) -> tuple[CrashingStore, Counter[str]]:
        store, denoised = CrashingStore(copied(begun), at, when), Counter()
        with suppress(Crash):
            then.run(store, denoised)
        return store, denoised

    undisturbed, _ = run_again(None, "never")
    acts = undisturbed.acts
    last = len(acts) if to_the_end else acts.index(f"put {layout.INDEX}") + 1
    unlike = {"identities"}  # they hold the time of the change
    expected = everything(Store(undisturbed.url), ignoring=unlike)
    assert last >= 4, "run.json, the card, the parts and the index"
    for at, when in points(last):
        crashed, denoised = run_again(at, when)
        store = Store(crashed.url)
        then.run(store, denoised)
        assert everything(store, ignoring=unlike) == expected
        assert verified(store).findings == []
        assert len(read_run(store)["earlier"]) == 1
        assert sum(denoised.values()) <= len(denoised) + 1, "a crash costs one denoise at most"


@pytest.mark.parametrize("kind", ["grown", pytest.param("allowed", marks=pytest.mark.slow)])
def test_a_continuation_that_is_killed(tmp_path, kind):
    """P2: wherever it is killed until it renders, the same command ends in the root of an undisturbed one."""
    crash_and_continue(tmp_path, kind, to_the_end=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grown", "allowed"])
def test_a_continuation_that_is_killed_at_every_point(tmp_path, kind):
    """P2: the same for every write."""
    crash_and_continue(tmp_path, kind, to_the_end=True)
