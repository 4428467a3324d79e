"""hv_batch.job.manifest.selection and hv_batch.job.records.pending: the samples that one command renders."""

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
from hv_batch.job.records.pending import PendingSamples, only_failed
from hv_batch.job.records.shard_scan import LOOK_AHEAD
from hv_batch.job.stages import Stage
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.pending import iterate


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
    return [found.sample.key for found in iterate(plan)]


def selected(index, **options):
    return pending(PendingSamples(memory(), index, parse_selection(**options)))


def test_without_options_everything_is_selected(index):
    """The default selection is the whole manifest, in its order."""
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
def test_a_selection_picks_its_samples(index, options, expected):
    """Shards and conditions apply first, then the limit; two conditions on one column allow either value."""
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
def test_an_invalid_selection_is_rejected(index, options, message):
    """P6: the error comes before the run starts and gives the allowed values."""
    with pytest.raises(UserError) as caught:
        selected(index, **options)
    assert message in str(caught.value)


def test_a_selection_does_not_depend_on_the_output_root(index):
    """P2: the same command renders nothing the second time, with or without a limit."""
    store, chosen = memory(), parse_selection(limit=3, where=["kind=dog"])
    samples = list(index)
    commit(store, samples[1], samples[5])
    plan = PendingSamples(store, index, chosen)
    assert pending(plan) == ["s03"]
    assert (plan.total, plan.counts.committed_before) == (3, 2)
    plan.committed(samples[3])
    assert plan.take_complete() == []


def test_a_shard_is_sealed_by_the_run_that_renders_its_last_sample(index):
    """P1: a run with a selection seals only shards of which all samples are complete, with all their keys."""
    store, samples = memory(), list(index)
    plan = PendingSamples(store, index, parse_selection(where=["kind=cat"]))
    for sample in (found.sample for found in iterate(plan)):
        plan.committed(sample)
        commit(store, sample)
    assert plan.take_complete() == []
    rest = PendingSamples(store, index, parse_selection(where=["kind=dog"], shards="1"))
    for sample in (found.sample for found in iterate(rest)):
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
    quarantined=st.sets(st.integers(0, 21)),
    with_latents=st.sets(st.integers(0, 21)),
    chosen=st.sets(st.integers(0, 5), min_size=1),
    limit=st.none() | st.integers(1, 25),
)
def test_a_plan_is_what_is_selected_and_not_terminal(done, quarantined, with_latents, chosen, limit, tmp_path_factory):
    """P1, P2: property: in any root, samples with latents continue at the decode and complete shards are sealed."""
    index = index_of(tmp_path_factory.mktemp("m"), [{"prompt": "a", "id": f"s{n:02d}"} for n in range(22)])
    store, samples = memory(), list(index)
    for numbers, key in (
        (done, layout.commit_key),
        (quarantined, layout.quarantine_key),
        (with_latents, layout.latent_key),
    ):
        for number in numbers:
            store.put(key(samples[number].shard, samples[number].key), b"{}")
    selection = Selection(limit=limit, shards=tuple(range(shard, shard + 1) for shard in chosen))
    inside = [number for number in range(22) if number // 4 in chosen][:limit]
    plan = PendingSamples(store, index, selection)
    found = [(item.sample.key, item.stage) for item in iterate(plan)]
    assert found == [
        (f"s{number:02d}", Stage.DECODE if number in with_latents else Stage.ENCODE)
        for number in inside
        if number not in done | quarantined
    ]
    assert plan.counts.committed_before == len(done & {*inside})
    assert plan.counts.quarantined_before == len((quarantined - done) & {*inside})
    for key, _ in found:
        plan.committed(samples[int(key[1:])])
    terminal = done | quarantined | {*inside}
    whole = {number // 4 for number in inside if {*range(number // 4 * 4, min(22, number // 4 * 4 + 4))} <= terminal}
    assert {complete.shard for complete in plan.take_complete()} == whole
    left = {key for shard in range(6) for key in map(layout.sample_key, store.list(layout.latent_dir(shard)))}
    assert left == {f"s{number:02d}" for number in with_latents - ((done | quarantined) & {*inside})}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["s00", "s01", "s05", "s10"]),
        ({"where": ["kind=dog"]}, ["s01", "s05"]),
        ({"limit": 2}, ["s00", "s01"]),
        ({"shards": "1-2"}, ["s05", "s10"]),
    ],
)
def test_failed_only_selects_quarantined_samples(index, options, expected):
    """`--failed-only` renders the quarantined samples of the selection and no others, not even pending ones."""
    store, samples = memory(), list(index)
    failed = [samples[n] for n in (0, 1, 5, 10)]
    facts = {"url": "prompts.jsonl", "rows": index.summary.rows, "samples": index.summary.samples}
    document = {"identity": {"parallel": {"device": "cpu"}}, "config": {"output": {"shard_size": 4}}}
    run_document.open_run(store, document | {"manifest": facts, "versions": {}})
    commit(store, *(sample for sample in samples[:15] if sample not in failed))
    for sample in failed:
        failure = Failure(FailureClass.POISON, "not finite").to_dict()
        record = quarantine_record(sample, failures=[failure], fingerprint="f" * 64, versions={})
        quarantine(store, record)
    plan = PendingSamples(store, index, only_failed(store, parse_selection(**options)))
    assert plan.takes_back
    assert plan.take_back() == len(expected)
    found = list(iterate(plan))
    assert [item.sample.key for item in found] == expected
    assert all([failure.message for failure in item.earlier] == ["not finite"] for item in found)
    again = PendingSamples(store, index, only_failed(store, parse_selection(**options)))
    assert (again.take_back(), pending(again)) == (0, expected)  # as after a crash
    assert not PendingSamples(store, index).takes_back


def test_complete_shards_cost_two_requests_and_no_read_of_the_manifest(tmp_path, monkeypatch):
    """P2: a resume of an almost complete run starts at once: a sealed shard costs only two listings."""
    index = index_of(tmp_path, [{"prompt": "a", "id": f"s{n:03d}"} for n in range(400)])
    store, samples = memory(), list(index)
    commit(store, *samples[:-1])
    for shard in range(99):
        store.put(layout.metadata_key(shard), b"")
    requests = []
    for name in ("exists", "list", "get"):
        act = getattr(Store, name)

        def count(self, key, act=act, name=name):
            if self.url == store.url:
                requests.append((name, key))
            return act(self, key)

        monkeypatch.setattr(Store, name, count)
    read_shards = []
    read_samples = index.samples
    monkeypatch.setattr(index, "samples", lambda shard: read_shards.append(shard) or read_samples(shard))
    plan = PendingSamples(store, index)
    assert [item.sample.key for item in iterate(plan)] == ["s399"]
    assert plan.counts.committed_before == 399
    assert read_shards == [99]
    assert len(requests) <= 99 * 2 + 8  # the two listings of tombstones: of the root, and of the open shard


def test_a_sealed_shard_that_lost_a_record_is_not_complete(index):
    """P1: a seal alone is no proof; a sample without a record is rendered."""
    store, samples = memory(), list(index)
    commit(store, *samples[:3])
    store.put(layout.metadata_key(0), b"")
    assert pending(PendingSamples(store, index, parse_selection(shards="0"))) == ["s03"]


@pytest.mark.slow
def test_shards_are_looked_up_a_little_ahead(tmp_path):
    """P7: the number of shards that are looked up in advance does not depend on the manifest's length."""
    index = index_of(tmp_path, [{"prompt": "a", "id": f"s{n:03d}"} for n in range(300)], shard_size=1)
    store = memory()
    plan = iterate(PendingSamples(store, index))
    next(plan)
    commit(store, *list(index)[LOOK_AHEAD + 2 :])
    assert len(list(plan)) == LOOK_AHEAD + 1
