"""hv_batch.job.manifest.selection and plan: which samples a command renders, and what it leaves to others."""

import json
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.selection import Selection, parse_selection
from hv_batch.job.records import run_document
from hv_batch.job.records.commits import quarantine, quarantine_record
from hv_batch.job.records.pending import LOOK_AHEAD, PendingSamples, ShardSkipped, only_failed
from hv_batch.job.stages import Stage
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


def memory():
    return Store(f"memory://{uuid.uuid4().hex}")


def index_of(tmp_path, rows, shard_size=4):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.model_validate({"output": {"shard_size": shard_size}})
    return check_manifest(Manifest(str(path)), config, memory())


@pytest.fixture
def index(tmp_path):
    """22 samples in shards of 4."""
    kinds = ("cat", "dog")
    rows = [
        {"prompt": f"p{n}", "id": f"s{n:02d}", "kind": kinds[n % 2], "height": 720 + 16 * (n % 3), "good": n < 4}
        for n in range(20)
    ]
    return index_of(tmp_path, [*rows, {"prompt": "two", "id": "x", "num_videos": 2, "cfg_scale": 6, "tags": [1, "ä"]}])


def commit(store, *samples):
    for sample in samples:
        store.put(layout.commit_key(sample.shard, sample.key), b"{}")


def pending(plan):
    return [found.sample.key for found in plan if not isinstance(found, ShardSkipped)]


def selected(index, **options):
    return pending(PendingSamples(memory(), index, parse_selection(**options)))


def test_without_options_everything_is_selected(index):
    """The default is the whole manifest, in its order."""
    assert selected(index) == [sample.key for sample in index]
    assert Selection().is_whole


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit": 3}, ["s00", "s01", "s02"]),
        ({"limit": 100, "shards": "5"}, ["x-v0", "x-v1"]),
        ({"shards": "0,2-3,3"}, ["s00", "s01", "s02", "s03", *(f"s{n:02d}" for n in range(8, 16))]),
        ({"where": ["kind=cat"], "limit": 3}, ["s00", "s02", "s04"]),
        ({"where": ["kind=cat", "kind=dog"], "shards": "1"}, ["s04", "s05", "s06", "s07"]),
        ({"where": ["kind=dog", "height=752"]}, ["s05", "s11", "s17"]),
        ({"where": ["height=752.0"], "limit": 1}, ["s02"]),
        ({"where": ["good=true"]}, ["s00", "s01", "s02", "s03"]),
        ({"where": ["kind="]}, ["x-v0", "x-v1"]),
        ({"where": ["cfg_scale=6"]}, ["x-v0", "x-v1"]),
        ({"where": ['tags=[1, "ä"]']}, ["x-v0", "x-v1"]),
        ({"where": ["id=x"]}, ["x-v0", "x-v1"]),
        ({"where": ["prompt=p7"]}, ["s07"]),
    ],
)
def test_what_a_selection_means(index, options, expected):
    """Shards and columns first, then the limit; a column named twice means any of its values."""
    assert selected(index, **options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "a whole number from 1"),
        ({"where": ["kind"]}, "allowed is column=value"),
        ({"where": ["=cat"]}, "allowed is column=value"),
        ({"where": ["knid=cat"]}, "the column knid, which the manifest does not have; allowed: good, kind, tags, id"),
        ({"where": ["kind=bird"]}, "No sample of the manifest matches kind=bird"),
        ({"shards": ""}, "is no shard"),
        ({"shards": "1-"}, "is no shard"),
        ({"shards": "3-2"}, "is no shard"),
        ({"shards": "-1"}, "is no shard"),
        ({"shards": "5-6"}, "allowed are 0 to 5"),
        ({"shards": "0-999999999"}, "allowed are 0 to 5"),
    ],
)
def test_a_selection_that_cannot_be_is_told(index, options, message):
    """P6: before anything starts, with what would be allowed."""
    with pytest.raises(UserError) as caught:
        selected(index, **options)
    assert message in str(caught.value)


def test_a_selection_is_the_same_whatever_is_done_already(index):
    """P2: the same command twice renders nothing the second time, limit or not."""
    store, chosen = memory(), parse_selection(limit=3, where=["kind=dog"])
    samples = list(index)
    commit(store, samples[1], samples[5])
    plan = PendingSamples(store, index, chosen)
    assert pending(plan) == ["s03"]
    assert (plan.total, plan.counts.committed_before) == (3, 2)
    plan.committed(samples[3])
    assert plan.take_complete() == []


def test_a_shard_is_sealed_by_whoever_renders_its_last_sample(index):
    """P1: a run over a part seals only shards that are complete as a whole, with all their keys."""
    store, samples = memory(), list(index)
    plan = PendingSamples(store, index, parse_selection(where=["kind=cat"]))
    for sample in (found.sample for found in plan if not isinstance(found, ShardSkipped)):
        plan.committed(sample)
        commit(store, sample)
    assert plan.take_complete() == []
    rest = PendingSamples(store, index, parse_selection(where=["kind=dog"], shards="1"))
    for sample in (found.sample for found in rest if not isinstance(found, ShardSkipped)):
        rest.committed(sample)
        commit(store, sample)
    (complete,) = rest.take_complete()
    assert (complete.shard, complete.keys) == (1, ("s04", "s05", "s06", "s07"))
    again = PendingSamples(store, index, parse_selection(where=["kind=cat"]))
    assert pending(again) == []
    assert [found.shard for found in again.take_complete()] == [1]
    commit(store, *samples)


@settings(deadline=None, max_examples=40)  # a busy machine is not a failure
@given(
    done=st.sets(st.integers(0, 21)),
    given_up=st.sets(st.integers(0, 21)),
    waiting=st.sets(st.integers(0, 21)),
    chosen=st.sets(st.integers(0, 5), min_size=1),
    limit=st.none() | st.integers(1, 25),
)
def test_a_plan_is_what_is_selected_and_not_terminal(done, given_up, waiting, chosen, limit, tmp_path_factory):
    """P1, P2: whatever state a root is in; samples with latents go on at the decode, complete shards get sealed."""
    index = index_of(tmp_path_factory.mktemp("m"), [{"prompt": "a", "id": f"s{n:02d}"} for n in range(22)])
    store, samples = memory(), list(index)
    for numbers, key in (
        (done, layout.commit_key),
        (given_up, layout.quarantine_key),
        (waiting, layout.latent_key),
    ):
        for number in numbers:
            store.put(key(samples[number].shard, samples[number].key), b"{}")
    selection = Selection(limit=limit, shards=tuple(range(shard, shard + 1) for shard in chosen))
    inside = [number for number in range(22) if number // 4 in chosen][:limit]
    plan = PendingSamples(store, index, selection)
    found = [(item.sample.key, item.stage) for item in plan if not isinstance(item, ShardSkipped)]
    assert found == [
        (f"s{number:02d}", Stage.DECODE if number in waiting else Stage.ENCODE)
        for number in inside
        if number not in done | given_up
    ]
    assert plan.counts.committed_before == len(done & {*inside})
    assert plan.counts.quarantined_before == len((given_up - done) & {*inside})
    for key, _ in found:
        plan.committed(samples[int(key[1:])])
    terminal = done | given_up | {*inside}
    whole = {number // 4 for number in inside if {*range(number // 4 * 4, min(22, number // 4 * 4 + 4))} <= terminal}
    assert {complete.shard for complete in plan.take_complete()} == whole
    left = {key for shard in range(6) for key in map(layout.sample_key, store.list(layout.latent_dir(shard)))}
    assert left == {f"s{number:02d}" for number in waiting - ((done | given_up) & {*inside})}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["s00", "s01", "s05", "s10"]),
        ({"where": ["kind=dog"]}, ["s01", "s05"]),
        ({"limit": 2}, ["s00", "s01"]),
        ({"shards": "1-2"}, ["s05", "s10"]),
    ],
)
def test_only_what_failed(index, options, expected):
    """`--failed-only`: of the selection only samples that were given up; others stay as they are, pending ones too."""
    store, samples = memory(), list(index)
    failed = [samples[n] for n in (0, 1, 5, 10)]
    store.put(layout.RUN, run_document.encode(root_of(index)))
    commit(store, *(sample for sample in samples[:15] if sample not in failed))
    for sample in failed:
        failure = Failure(FailureClass.POISON, "not finite").to_dict()
        record = quarantine_record(sample, failures=[failure], fingerprint="", versions={})
        quarantine(store, record)
    plan = PendingSamples(store, index, only_failed(store, parse_selection(**options)))
    assert plan.takes_back
    assert plan.take_back() == len(expected)
    found = [found for found in plan if not isinstance(found, ShardSkipped)]
    assert [item.sample.key for item in found] == expected
    assert all([failure.message for failure in item.earlier] == ["not finite"] for item in found)
    again = PendingSamples(store, index, only_failed(store, parse_selection(**options)))
    assert (again.take_back(), pending(again)) == (0, expected)  # as after a crash
    assert not PendingSamples(store, index).takes_back


def root_of(index) -> dict:
    facts = {"samples": index.summary.samples}
    config = {"output": {"shard_size": 4}}
    return {"schema": run_document.RUN_SCHEMA, "identity": {}, "fingerprint": "", "manifest": facts, "config": config}


def test_done_shards_cost_two_requests_and_no_look_at_the_manifest(tmp_path, monkeypatch):
    """P2: a resume of which almost all is done begins at once: nothing is read of a sealed shard but two listings."""
    index = index_of(tmp_path, [{"prompt": "a", "id": f"s{n:03d}"} for n in range(400)])
    store, samples = memory(), list(index)
    commit(store, *samples[:-1])
    for shard in range(99):
        store.put(layout.metadata_key(shard), b"")
    asked = []
    for name in ("exists", "list", "get"):
        act = getattr(Store, name)

        def count(self, key, act=act, name=name):
            if self.url == store.url:
                asked.append((name, key))
            return act(self, key)

        monkeypatch.setattr(Store, name, count)
    looked = []
    whole = index.samples
    monkeypatch.setattr(index, "samples", lambda shard: looked.append(shard) or whole(shard))
    plan = PendingSamples(store, index)
    found = list(plan)
    assert [item.sample.key for item in found if not isinstance(item, ShardSkipped)] == ["s399"]
    assert plan.counts.committed_before == 399
    assert looked == [99]
    assert len(asked) <= 99 * 2 + 6
    assert sum(isinstance(item, ShardSkipped) for item in found) < 10


def test_a_sealed_shard_that_lost_a_record_is_not_taken_for_done(index):
    """P1: the seal alone does not tell; what has no record is rendered."""
    store, samples = memory(), list(index)
    commit(store, *samples[:3])
    store.put(layout.metadata_key(0), b"")
    assert pending(PendingSamples(store, index, parse_selection(shards="0"))) == ["s03"]


@pytest.mark.slow
def test_shards_are_looked_up_a_little_ahead(tmp_path):
    """P7: however long the manifest, only so many shards are looked up before their turn."""
    index = index_of(tmp_path, [{"prompt": "a", "id": f"s{n:03d}"} for n in range(300)], shard_size=1)
    store = memory()
    plan = iter(PendingSamples(store, index))
    next(plan)
    commit(store, *list(index)[LOOK_AHEAD + 2 :])
    assert len([found for found in plan if not isinstance(found, ShardSkipped)]) == LOOK_AHEAD + 1
