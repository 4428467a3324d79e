"""Status of an output root, read from storage alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.dataset.seal import seal_shard
from hv_batch.job.inspection import status
from hv_batch.job.records import commits, lease, lease_holder
from hv_batch.job.storage import canonical_json
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.rendered_roots import BLACK, STILL, make_commit, make_quarantine, make_sample, open_root


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root") if request.param == "disk" else f"memory://{tmp_path.name}")


def half_rendered(store: Store) -> None:
    """10 samples: a sealed shard with one quarantined sample, a partly rendered shard, and a short, untouched last
    shard.
    """
    open_root(store, 10)
    for number in (1, 2, 3, 5):
        commits.commit(store, make_commit(make_sample(number)))
    commits.quarantine(store, make_quarantine(make_sample(4)))
    commits.quarantine(store, make_quarantine(make_sample(6)))
    seal_shard(store, 0, ["s001", "s002", "s003", "s004"])


def test_counts_by_shard(store):
    """P1, P2: each sample is either committed, quarantined or pending; the last shard may be short."""
    half_rendered(store)
    found = status.read_status(store)
    assert [(s.samples, s.committed, s.quarantined, s.pending, s.state) for s in found.shards] == [
        (4, 3, 1, 0, "sealed"),
        (4, 1, 1, 2, "partial"),
        (2, 0, 0, 2, "untouched"),
    ]
    assert (found.samples, found.committed, found.quarantined, found.pending, found.sealed) == (10, 4, 2, 4, 1)
    assert not found.finished


def test_commit_beside_a_quarantine_counts_once(store):
    """P1: a crash between two writes leaves both records, and the sample counts once."""
    half_rendered(store)
    store.put(layout.quarantine_key(0, "s001"), canonical_json.encode(make_quarantine(make_sample(1))))
    assert status.read_status(store).shards[0].quarantined == 1


def test_complete_shard_that_is_not_sealed_and_finished_run(store):
    """P2: the state says what a resume still has to do."""
    open_root(store, 1)
    commits.commit(store, make_commit(make_sample(1)))
    assert status.read_status(store).shards[0].state == "complete"
    store.put(layout.SUCCESS, b"")
    assert status.read_status(store).finished


def test_dict_is_json_and_adds_up(store):
    """P2: `status --json` is plain JSON, and its totals equal the sums over the shards."""
    half_rendered(store)
    document = json.loads(json.dumps(status.read_status(store).to_dict()))
    for name in ("samples", "committed", "quarantined", "pending"):
        assert document[name] == sum(shard[name] for shard in document["shards"])


def test_table_names_every_shard(store):
    """P2: the text table has one line for each shard, the totals, and the reasons of quarantined samples."""
    half_rendered(store)
    table = status.read_status(store).render()
    assert [line.split() for line in table.splitlines()[4:7]] == [
        ["shard-00000", "4", "3", "1", "0", "sealed"],
        ["shard-00001", "4", "1", "1", "2", "partial"],
        ["shard-00002", "2", "0", "0", "2", "untouched"],
    ]
    assert "4 of 10 samples committed, 2 quarantined, 4 pending; 1 of 3 shards sealed" in table
    assert table.splitlines()[-1].split() == ["2", "POISON", "not", "finite", "(as", "s004,", "s006)"]


def test_long_table_lists_what_needs_attention():
    """P7: of 40,000 shards, the table lists those that need attention and the number of the others."""
    clean = {"samples": 4, "committed": 4, "quarantined": 0, "sealed": True}
    many = [status.ShardStatus(shard=n, **clean) for n in range(1000)]
    many[7] = status.ShardStatus(shard=7, samples=4, committed=3, quarantined=1, sealed=True)
    table = status.Status(url="u", finished=True, shards=tuple(many)).render()
    assert "shard-00007" in table
    assert "shard-00008" not in table
    assert "999 shards that are sealed and have no quarantined samples" in table
    untouched = [status.ShardStatus(shard=n, samples=4, committed=0, quarantined=0, sealed=False) for n in range(1000)]
    table = status.Status(url="u", finished=False, shards=tuple(untouched)).render()
    assert len(table.splitlines()) < status.MAX_LINES + 10
    assert f"{1000 - status.MAX_LINES:,} more shards" in table


def test_some_shards_alone(store):
    """P2: the status of some shards counts only these; a shard that does not exist is refused."""
    half_rendered(store)
    found = status.read_status(store, [2, 1])
    assert [shard.shard for shard in found.shards] == [1, 2]
    assert (found.samples, found.committed) == (6, 1)
    assert [reason.examples for reason in found.reasons] == [("s006",)]
    with pytest.raises(UserError, match="no shard 3"):
        status.read_status(store, [0, 3])


def test_the_holder_of_the_lease_is_shown(store):
    """P1: while a driver is running, and after it was killed."""
    half_rendered(store)
    assert status.read_status(store).to_dict()["holder"] is None
    me = lease_holder.this_process("run", "raysubmit_1")
    with lease.hold_lease(store, me):
        assert f"held by `hv-batch run` on {me.host}, process {me.pid}" in status.read_status(store).render()
    store.put(layout.LEASE, canonical_json.encode(dataclasses.asdict(me) | {"process": "1"}))
    found = status.read_status(store)
    assert "which has ended; the next run takes over" in found.render()
    assert json.loads(json.dumps(found.to_dict()))["holder"]["gone"] is True


def test_root_without_a_run(store):
    """P6: the message names the wrong path."""
    with pytest.raises(UserError, match=r"run\.json"):
        status.read_status(store)


def test_the_looks_of_sealed_and_open_shards_are_counted(store):
    """One line says how many videos look wrong; samples without scores are not counted."""
    open_root(store, 6)
    for number, scores in enumerate((BLACK, STILL, BLACK, None, BLACK), 1):
        commits.commit(store, make_commit(make_sample(number), scores=scores))
    seal_shard(store, 0, ["s001", "s002", "s003", "s004"])
    found = status.read_status(store)
    assert found.looks == {}, "a status that only counts reads no records"
    scored = dataclasses.replace(found, looks=status.count_looks(store, found))
    assert scored.looks == {"black": 3, "still": 1}
    assert "\n3 of 4 videos look black, 1 do not move\n" in scored.render()
    assert scored.to_dict()["looks"] == {"black": 3, "still": 1}


def test_of_many_open_shards_only_the_sealed_ones_are_scored(store, monkeypatch):
    """P7: `status` does not read the records of a long run."""
    open_root(store, 6)
    for number in range(1, 7):
        commits.commit(store, make_commit(make_sample(number), scores=BLACK))
    seal_shard(store, 0, ["s001", "s002", "s003", "s004"])
    monkeypatch.setattr(status, "MAX_RECORDS", 1)
    assert status.count_looks(store, status.read_status(store)) == {"black": 4}
