"""Small runs that crash before or after a given operation on the output root."""

from __future__ import annotations

import uuid
from collections import Counter
from contextlib import suppress
from functools import partial

from hv_batch.job import layout
from hv_batch.job.dataset.seal import read_rows
from hv_batch.job.inspection.findings import Fault, Finding
from hv_batch.job.inspection.verify import MediaShape, remove_faults, verify
from hv_batch.job.inspection.withdraw import find_samples, withdraw
from hv_batch.job.records.commits import scan_shard
from hv_batch.job.records.quarantine import read_quarantined, release
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.store import Store
from tests.support.doubles import Crash, CrashingStore
from tests.support.plans import publish_plan
from tests.support.small_runs import TRIES, everything, some_samples
from tests.support.small_runs import run_small as run_plain

SAMPLES = some_samples(6)


POISON = frozenset({"s003", "s005"})


SHARDS = range(2)


# Every run here writes posters and tars as well: more operations, and more states after a crash.
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


# The operations that matter most for P1 and P2, by name. Another test covers every operation of a run.
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
    """Crash at each (operation number, before or after) and check each resume, then run to the end and compare."""
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


def drive(url: str) -> None:
    run_small(Store(url), SAMPLES, poison=POISON)


def points(acts: int) -> list[tuple[int, str]]:
    """Every moment between two operations, and both ends: just after one is just before the next."""
    return [*((at, "before") for at in range(acts)), (acts - 1, "after")]


def is_sound(store: Store) -> None:
    """P1: one record for each sample, sealed tables that match the records, and a finished run."""
    found = verify(store, lambda data, suffix: MediaShape(17, 128, 96), decodes=None)
    assert found.findings == []
    assert (found.pending, found.tables) == (0, len(SHARDS))
    assert store.exists(layout.SUCCESS)
    for shard in SHARDS:
        assert {row["key"] for row in read_rows(store, shard)} == scan_shard(store, shard).committed


def finished_url() -> str:
    url = fresh_url()
    run_small(Store(url), SAMPLES, poison=POISON)
    publish_plan(Store(url), SAMPLES)
    return url


def acts_of(act) -> int:
    store = CrashingStore(finished_url())
    act(store)
    return len(store.acts)


def take_back(store: Store) -> None:
    release(store, read_quarantined(store, SHARDS))


def repair(store: Store) -> None:
    """Removes one sample of each shard, as `verify --repair` does for damaged media."""
    found = []
    for shard, key in ((0, "s002"), (1, "s006")):
        (media,) = [name for name in Store(store.url).list(layout.media_dir(shard)) if f"/{key}-" in name]
        found.append(Finding(shard, key, Fault.HASH, "", (layout.commit_key(shard, key), media)))
    remove_faults(store, found)


def withdraw_two(store: Store) -> None:
    """Withdraws a committed sample and a quarantined one."""
    run = read_run(store)
    for name in ("s002", "s005"):
        withdraw(store, run, find_samples(store, run, name), "a face", lambda: None)
