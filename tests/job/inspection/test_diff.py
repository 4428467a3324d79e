"""`diff` reports how two runs differ, sample by sample (P3)."""

from __future__ import annotations

import dataclasses

import pytest

from hv_batch.job import layout
from hv_batch.job.inspection.diff import compare
from hv_batch.job.records import commits, run_document
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.rendered_roots import make_commit, make_quarantine, make_sample, open_root
from tests.support.small_runs import run_small, some_samples


@pytest.fixture
def stores(tmp_path):
    return Store(str(tmp_path / "a")), Store(f"memory://{tmp_path.name}/b")


def test_equal_runs(stores):
    """P3: equal plans give equal bytes, on another store and with another history."""
    run_small(stores[0], some_samples(6), poison={"s003"})
    run_small(stores[1], some_samples(6), poison={"s003"})
    found = compare(*stores)
    assert found.is_equal
    assert (found.equal_bytes, found.quarantined_in_both, found.identity) == (5, 1, [])


def with_bytes(record: dict) -> dict:
    """The record of a video with other bytes."""
    file = layout.media_key(record["shard"], record["key"], "0" * 64, ".mp4")
    return record | {"sha256": "0" * 64, "file": file}


def test_every_kind_of_difference(stores):
    """P3: each sample is in one category, the most informative one."""
    for store in stores:
        open_root(store, 9)
    a, b = stores
    same = make_sample(1)
    for store in stores:
        commits.commit(store, make_commit(same))
        commits.quarantine(store, make_quarantine(make_sample(8)))
    commits.commit(a, make_commit(make_sample(2)))
    commits.commit(b, with_bytes(make_commit(make_sample(2))))
    commits.commit(a, make_commit(make_sample(3)))
    commits.commit(b, with_bytes(make_commit(make_sample(3))) | {"frames_sha256": "0" * 64})
    commits.commit(a, make_commit(make_sample(4)))
    commits.commit(b, make_commit(make_sample(4, seed=5, width=64)))
    commits.commit(a, make_commit(make_sample(5)))
    commits.commit(b, make_commit(make_sample(6)))
    commits.commit(a, make_commit(make_sample(7)))
    commits.quarantine(b, make_quarantine(make_sample(7)))
    commits.quarantine(a, make_quarantine(make_sample(9)))
    commits.commit(b, make_commit(make_sample(9)))
    found = compare(a, b)
    assert found.to_dict() == {
        "a": a.url,
        "b": b.url,
        "identity": [],
        "equal_bytes": 1,
        "quarantined_in_both": 1,
        "other_bytes": ["s002"],
        "other_frames": ["s003"],
        "other_parameters": {"s004": ["width", "seed"]},
        "only_in_a": ["s005"],
        "only_in_b": ["s006"],
        "quarantined_in_a": ["s009"],
        "quarantined_in_b": ["s007"],
        "equal": False,
    }
    assert "1 with equal frames and different bytes: s002" in found.render()
    assert "s004 (width, seed)" in found.render()


def test_another_lora_is_another_parameter(stores):
    """P3: a LoRA changes the pixels, so `diff` reports it as the cause of other frames."""
    for store, lora in zip(stores, ("", "film:0.5"), strict=True):
        open_root(store, 1)
        commits.commit(store, make_commit(make_sample(1, lora=lora)))
    assert compare(*stores).other_parameters == {"s001": ["lora"]}


def test_sealed_and_open_shards_compare_as_equal(stores):
    """P1: the table of a sealed shard and the records of an open shard compare as equal."""
    run_small(stores[0], some_samples(6))
    open_root(stores[1], 6)
    for key in stores[0].list("commits"):
        stores[1].put(key, stores[0].get(key))
    assert compare(*stores).equal_bytes == 6


def test_an_outdated_table_is_not_used(stores):
    """P1: a sample that was committed after the seal counts."""
    for store in stores:
        run_small(store, some_samples(4), poison={"s002"})
    late = make_commit(make_sample(2))
    for store in stores:
        commits.commit(store, late)
    assert compare(*stores).equal_bytes == 4


def test_runs_of_different_layout_are_matched_by_key(stores):
    """P3: another shard size moves samples to other shards and changes no pixels."""
    samples = some_samples(6)
    run_small(stores[0], samples)
    moved = [dataclasses.replace(sample, shard=5 - number) for number, sample in enumerate(samples)]
    identity = run_document.read_run(stores[0])["identity"] | {"shard_size": 1}
    document = {"identity": identity, "versions": {}}
    document["config"] = {"output": {"shard_size": 1}, "parallel": {"device": "cpu"}}
    document["manifest"] = {"url": "prompts.jsonl", "rows": 6, "samples": 6}
    run_document.open_run(stores[1], document)
    for sample in moved:
        record = commits.read_commit(stores[0], (sample.row - 1) // 4, sample.key)
        file = layout.media_key(sample.shard, sample.key, record["sha256"], ".mp4")
        commits.commit(stores[1], record | {"shard": sample.shard, "file": file})
    found = compare(*stores)
    assert (found.equal_bytes, found.is_equal) == (6, True)
    assert found.identity == ["shard_size: (absent) -> 1"]


def test_a_root_without_a_run_is_refused(stores):
    """P6: the message names the wrong path."""
    run_small(stores[0], some_samples(1))
    with pytest.raises(UserError, match="/b is not an output root"):
        compare(*stores)
