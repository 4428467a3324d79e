"""A crash before and after every act that changes an output root, and the same command again (P1, P2, P4)."""

from __future__ import annotations

import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import TRIES, everything, some_samples
from small_runs import run_small as run_plain

from hv_batch.job import layout
from hv_batch.job.dataset.seal import read_rows
from hv_batch.job.inspection.findings import Fault, Finding
from hv_batch.job.inspection.verify import Picture, remove_faults, verify
from hv_batch.job.records.commits import read_commit, scan_shard
from hv_batch.job.records.quarantine import read_quarantined, release
from hv_batch.job.storage.store import Store
from tests.doubles import Crash, CrashingStore

SAMPLES = some_samples(6)
POISON = frozenset({"s003", "s005"})
SHARDS = range(2)

# Every run here makes posters and tars as well: more acts, and more that may be left half done.
run_small = partial(run_plain, adorned=True)


def fresh_url() -> str:
    return f"memory://{uuid.uuid4().hex}"


def undisturbed_acts() -> list[str]:
    store = CrashingStore(fresh_url())
    run_small(store, SAMPLES, poison=POISON)
    return store.acts


def undisturbed_root(**options) -> dict:
    store = Store(fresh_url())
    run_small(store, SAMPLES, poison=POISON)
    return everything(store, **options)


ACTS = undisturbed_acts()
EXPECTED = undisturbed_root()
EXPECTED_BUT_TRIES = undisturbed_root(ignoring=TRIES)


def number_of(act: str) -> int:
    return next(number for number, done in enumerate(ACTS) if done.startswith(act))


# What P1 and P2 are about, by name; the test after it takes every other act of a run as well.
NAMED = {
    "run.json": "put_new run.json",
    "latents": "put latents/shard-00000/s002",
    "poster": "put_file posters/shard-00000/s002",
    "media": "put_file data/shard-00000/s002",
    "record": "put_new commits/shard-00000/s002",
    "latents dropped": "delete latents/shard-00000/s002",
    "quarantine": "put_new quarantine/shard-00000/s003",
    "sums": "put report/shards/shard-00000",
    "lineage": "put lineage/shard-00000",
    "tar": "put_file webdataset/shard-00000",
    "seal": "put_new data/shard-00000/metadata.parquet",
    "last seal": "put_new data/shard-00001/metadata.parquet",
    "report": "put report/index.html",
    "summary": "put summary.json",
    "_SUCCESS": "put _SUCCESS",
}


def crash_and_resume(store_url: str, crashes: list[tuple[int, str]]) -> None:
    """Crash at each (act number, before or after) in turn, checking each resume; then run to the end and compare."""
    denoised: Counter[str] = Counter()
    committed: frozenset[str] = frozenset()
    for at, when in [*crashes, (None, "never")]:
        before = Counter(denoised)
        waiting = frozenset().union(*(scan_shard(Store(store_url), shard).latents for shard in SHARDS))
        with suppress(Crash):
            run_small(CrashingStore(store_url, at, when), SAMPLES, poison=POISON, denoised=denoised)
        again = {key for key, count in denoised.items() if count > before[key]}
        assert not again & committed, "committed samples were rendered again"
        assert not again & waiting, "samples with final latents were denoised again"
        states = [scan_shard(Store(store_url), shard) for shard in SHARDS]
        committed = frozenset().union(*(state.committed for state in states))
    store = Store(store_url)
    assert everything(store) == EXPECTED
    assert sum(denoised.values()) <= len(SAMPLES) - len(POISON) + len(crashes), "a crash costs one denoise at most"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", NAMED)
def test_a_crash_at_a_named_point(tmp_path, point, when):
    """P1, P2: on a real disk the root ends byte for byte as the undisturbed one, and nothing is paid for twice."""
    crash_and_resume(str(tmp_path / "root"), [(number_of(NAMED[point]), when)])


@pytest.mark.parametrize("point", ["record", "seal"])
def test_a_crash_on_s3(s3_store, point):
    """P1, P2: the same where names come by conditional PUT instead of by link."""
    crash_and_resume(s3_store.url, [(number_of(NAMED[point]), "after")])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(4))
def test_a_crash_at_every_point_on_s3(s3_store, first):
    """P1, P2: no act is left out there either; in four parts, for a server of one request at a time."""
    for point in points(len(ACTS))[first::4]:
        crash_and_resume(f"{s3_store.url}/{point[0]}-{point[1]}", [point])


def drive(url: str) -> None:
    run_small(Store(url), SAMPLES, poison=POISON)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tmp_path", "s3_store"])
def test_two_drivers_at_once(request, kind):
    """P1: where a lease was no help, two runs end as one would have, with one record a sample."""
    place = request.getfixturevalue(kind)
    for again in range(2):
        url = f"{place.url if isinstance(place, Store) else place}/{again}"
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            list(pool.map(drive, [url] * 2))
        is_sound(Store(url))
        assert everything(Store(url)) == EXPECTED


def points(acts: int) -> list[tuple[int, str]]:
    """Every moment between two of so many acts, and both ends: just after an act is just before the next."""
    return [*((at, "before") for at in range(acts)), (acts - 1, "after")]


def test_a_crash_at_every_point():
    """P1, P2: no act of a run is left out."""
    for point in points(len(ACTS)):
        crash_and_resume(fresh_url(), [point])


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(st.integers(0, len(ACTS) - 1), st.sampled_from(["before", "after"])), max_size=4))
def test_crash_after_crash(crashes):
    """P2: the resume may be killed as well, as often as you like."""
    crash_and_resume(fresh_url(), crashes)


# What an operator does may be killed too ------------------------------------------------------------------------------


def is_sound(store: Store) -> None:
    """P1: one record a sample, sealed tables that say the same, and the run finished."""
    found = verify(store, lambda data, suffix: Picture(17, 128, 96), decodes=None)
    assert found.findings == []
    assert (found.pending, found.tables) == (0, len(SHARDS))
    assert store.exists(layout.SUCCESS)
    for shard in SHARDS:
        assert {row["key"] for row in read_rows(store, shard)} == scan_shard(store, shard).committed


def finished_url() -> str:
    url = fresh_url()
    run_small(Store(url), SAMPLES, poison=POISON)
    return url


def acts_of(act) -> int:
    store = CrashingStore(finished_url())
    act(store)
    return len(store.acts)


def take_back(store: Store) -> None:
    release(store, read_quarantined(store, SHARDS))


def test_a_retry_that_is_killed():
    """P2, P5: whatever it had done, the run command leaves a sound root, and the retry can be repeated; no try that
    ended a sample is forgotten."""
    for at, when in points(acts_of(take_back)):
        url = finished_url()
        with pytest.raises(Crash):
            take_back(CrashingStore(url, at, when))
        store = Store(url)
        run_small(store, SAMPLES, poison=POISON)
        is_sound(store)
        assert everything(store, ignoring=TRIES) == EXPECTED_BUT_TRIES
        told = [record["attempts"] for record in read_quarantined(store, SHARDS)]
        take_back(store)
        run_small(store, SAMPLES)
        is_sound(store)
        assert len(list(store.list("commits"))) == len(SAMPLES)
        again = [read_commit(store, shard, key)["attempts"] for shard, key in ((0, "s003"), (1, "s005"))]
        assert again == [attempts + 1 for attempts in told]


def mend(store: Store) -> None:
    """Take away one sample of each shard, as if its media were broken."""
    found = []
    for shard, key in ((0, "s002"), (1, "s006")):
        (media,) = [name for name in Store(store.url).list(layout.media_dir(shard)) if f"/{key}-" in name]
        found.append(Finding(shard, key, Fault.HASH, "", (layout.commit_key(shard, key), media)))
    remove_faults(store, found)


def test_a_repair_that_is_killed():
    """P2: the run command renders what was removed and leaves the root as it was, wherever the repair stopped."""
    for at, when in points(acts_of(mend)):
        url = finished_url()
        with pytest.raises(Crash):
            mend(CrashingStore(url, at, when))
        run_small(Store(url), SAMPLES, poison=POISON)
        is_sound(Store(url))
        assert everything(Store(url)) == EXPECTED
