"""The terminal records of samples, and the scan of a shard."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.licences import TENCENT
from hv_batch.job.records.commits import (
    ShardState,
    commit,
    quarantine,
    read_commit,
    read_quarantine,
    scan_shard,
)
from hv_batch.job.records.latents import FinalLatents, put_latents
from hv_batch.job.storage.canonical_json import decode, encode
from hv_batch.job.storage.store import Store
from tests.support.records import FAILURES, PARAMS, SAMPLE, STAGES, a_commit, a_quarantine

# Records --------------------------------------------------------------------------------------------------------------


def test_the_commit_record_is_complete(any_store):
    """P1: file, hash, parameters, timings, attempts and versions; readable on its own."""
    assert commit(any_store, a_commit())
    record = read_commit(any_store, 17, SAMPLE.key)
    assert record["schema"] == "hv_batch/commit/1"
    assert record["file"] == f"data/shard-00017/fox.v1-v0-{'ab' * 4}.mp4"
    assert record["params"] == PARAMS.to_dict()
    assert (record["id"], record["row"], record["video_index"], record["shard"]) == ("fox.v1", 3, 0, 17)
    assert (record["sha256"], record["bytes"], record["frames_sha256"]) == ("ab" * 32, 1234, "cd" * 32)
    assert record["produced"] == {"num_frames": 9, "height": 64, "width": 96}
    assert record["stages"] == {"encode": 0.5, "denoise": 8.0}
    assert record["places"]["denoise"] == {"node": "n2", "ulysses_degree": 2}
    assert (record["attempts"], record["history"]) == (2, FAILURES[:1])
    assert (record["fps"], record["extra"], record["licence"]) == (24, {"category": "animals"}, TENCENT)
    assert record["fingerprint"] == "f" * 64
    assert "狐狸".encode() in any_store.get(layout.commit_key(17, SAMPLE.key)), "text is readable"


def test_the_quarantine_record_is_complete(any_store):
    """P5: class, message, traceback and all failed attempts of a quarantined sample."""
    assert quarantine(any_store, a_quarantine())
    record = read_quarantine(any_store, 17, SAMPLE.key)
    assert record["schema"] == "hv_batch/quarantine/1"
    assert (record["class"], record["message"], record["traceback"]) == (
        "POISON",
        "ValueError: not finite",
        "Traceback ...",
    )
    assert (record["attempts"], record["history"]) == (2, FAILURES)
    assert record["params"]["prompt"] == PARAMS.prompt


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(extra=st.dictionaries(st.text(alphabet=st.characters(), max_size=8), json_values, max_size=4))
def test_columns_of_the_user_survive(extra):
    """P1: any text, also one that UTF-8 cannot hold, is read back unchanged; key order does not change the bytes."""
    assert decode(encode(extra)) == json.loads(json.dumps(extra)) == extra
    assert encode(extra) == encode(dict(reversed(extra.items())))


def test_not_a_number_is_no_json():
    """P1: a record must be JSON that other programs can read."""
    with pytest.raises(ValueError, match="JSON"):
        encode({"x": float("nan")})


# Exactly one record ---------------------------------------------------------------------------------------------------


def test_a_sample_is_committed_once(any_store):
    """P1: a late writer finds the record and changes nothing; a repeated commit of the first writer succeeds."""
    first, second = a_commit(), a_commit(sha256="ef" * 32)
    assert commit(any_store, first)
    assert not commit(any_store, second)
    assert commit(any_store, first)
    assert read_commit(any_store, 17, SAMPLE.key) == first


def test_a_commit_whose_reply_was_lost_counts_as_ours(s3, s3_store):
    """P1: the PUT succeeded but its reply was lost; the retry finds its own record."""
    s3.faults, s3.loses_replies = [503], True
    assert commit(s3_store, a_commit())
    assert s3.failed_requests == 1


def test_a_committed_sample_is_never_quarantined(any_store, monkeypatch):
    """P1: a late failure does not remove a video, and writes nothing, not even temporarily."""
    commit(any_store, a_commit())
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_new_all", None)
        assert not quarantine(any_store, a_quarantine())
    assert scan_shard(any_store, 17) == ShardState(frozenset({SAMPLE.key}), frozenset(), frozenset(), False)
    assert not any_store.exists(layout.quarantine_key(17, SAMPLE.key))


def test_a_late_commit_ends_the_quarantine(any_store):
    """P1: the late commit removes the quarantine record, so the sample has one record."""
    assert quarantine(any_store, a_quarantine())
    assert scan_shard(any_store, 17).quarantined == {SAMPLE.key}
    assert commit(any_store, a_commit())
    assert scan_shard(any_store, 17).quarantined == frozenset()
    assert not any_store.exists(layout.quarantine_key(17, SAMPLE.key))


class TurnTaking:
    """A store whose operations wait until a schedule names their thread."""

    def __init__(self, store: Store, schedule: list[str]) -> None:
        self._store, self._schedule = store, schedule
        self._condition = threading.Condition()
        self._finished: set[str] = set()

    def __getattr__(self, name: str):
        def act(*args):
            me = threading.current_thread().name
            with self._condition:
                self._condition.wait_for(lambda: self._next() in (me, None))
                if self._schedule:
                    self._schedule.pop(0)
                self._condition.notify_all()
                return getattr(self._store, name)(*args)

        return act

    def each(self, act, items):
        return [act(item) for item in items]

    def _next(self) -> str | None:
        while self._schedule and self._schedule[0] in self._finished:
            self._schedule.pop(0)
        return self._schedule[0] if self._schedule else None

    def run(self, name: str, act, record, results: dict) -> None:
        results[name] = act(self, record)
        with self._condition:
            self._finished.add(name)
            self._condition.notify_all()


def schedules() -> Iterator[tuple[str, ...]]:
    """Every interleaving of at most four operations of a quarantine with at most four of a commit."""
    for places in itertools.combinations(range(8), 4):
        yield tuple("commit" if i in places else "quarantine" for i in range(8))


@pytest.mark.parametrize("schedule", schedules())
def test_commit_and_quarantine_race_to_one_record(schedule):
    """P1: in every order of their operations, only the commit record is left."""
    store, results = Store(f"memory://{uuid.uuid4().hex}"), {}
    turns = TurnTaking(store, list(schedule))
    threads = [
        threading.Thread(target=turns.run, name=act.__name__, args=(act.__name__, act, record, results))
        for act, record in ((commit, a_commit()), (quarantine, a_quarantine()))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert results["commit"]
    assert store.exists(layout.commit_key(17, SAMPLE.key))
    assert not store.exists(layout.quarantine_key(17, SAMPLE.key))


# The scan of a shard --------------------------------------------------------------------------------------------------


def test_scan_reports_one_shard_only(any_store):
    """P2: a resume finds the committed, quarantined and denoised samples of this shard only."""
    keys = {"committed": "a", "quarantined": "b.json", "latents": "c.d"}
    for shard in (1, 10):
        commit(any_store, a_commit(dataclasses.replace(SAMPLE, shard=shard, key=keys["committed"])))
        quarantine(any_store, a_quarantine(dataclasses.replace(SAMPLE, shard=shard, key=keys["quarantined"])))
    with_latents = dataclasses.replace(SAMPLE, shard=1, key=keys["latents"])
    put_latents(any_store, [FinalLatents(with_latents, np.zeros(PARAMS.latent_shape, np.float32), "identity", STAGES)])
    any_store.put(layout.metadata_key(10), b"parquet")
    assert scan_shard(any_store, 1) == ShardState(
        frozenset({"a"}), frozenset({"b.json"}), frozenset({"c.d"}), sealed=False
    )
    assert scan_shard(any_store, 10) == ShardState(frozenset({"a"}), frozenset({"b.json"}), frozenset(), sealed=True)
    assert scan_shard(any_store, 0) == ShardState(frozenset(), frozenset(), frozenset(), sealed=False)


def test_after_a_crash_between_two_steps_the_commit_counts(any_store):
    """P1: a writer that died before it removed the quarantine record leaves both; the sample counts as committed."""
    any_store.put_new(layout.quarantine_key(17, SAMPLE.key), encode(a_quarantine()))
    any_store.put_new(layout.commit_key(17, SAMPLE.key), encode(a_commit()))
    state = scan_shard(any_store, 17)
    assert (state.committed, state.quarantined) == ({SAMPLE.key}, frozenset())
