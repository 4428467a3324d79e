"""Conditions on committed samples, and the samples of a root that satisfy them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.dataset import committed
from hv_batch.job.dataset.committed import matching_records
from hv_batch.job.dataset.conditions import matches, parse_conditions
from hv_batch.job.dataset.seal import seal_shard
from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.records import commits
from hv_batch.job.records.run_document import DATASET_SCHEMA_1, read_run
from hv_batch.job.storage import canonical_json
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.plans import publish_plan
from tests.support.rendered_roots import BLACK, SCORES, STILL, make_commit, make_sample, open_root

RECORD = make_commit(make_sample(3, extra={"category": "cat", "score": 0.5, "look": "mine"}), scores=BLACK)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def fill(store: Store, scores=(SCORES, BLACK, STILL, SCORES, BLACK, None)) -> None:
    """Six samples; the first shard of four is sealed, the second is open."""
    samples = [make_sample(n, extra={"category": "cat" if n % 2 else "dog"}) for n in range(1, len(scores) + 1)]
    open_root(store, len(samples))
    publish_plan(store, samples)
    for sample, of_frames in zip(samples, scores, strict=True):
        commits.commit(store, make_commit(sample, scores=of_frames))
    seal_shard(store, 0, [sample.key for sample in samples[:4]])


def found(store: Store, *where: str, **options) -> list[str]:
    records = matching_records(store, read_run(store), parse_conditions(where), **options)
    return [record["key"] for record in records]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["look=black"], True),
        (["look!=black"], False),
        (["luma_mean<=2.5"], True),
        (["luma_mean<2.5"], False),
        (["clipped_share>0.5", "category=cat"], True),
        (["category=dog"], False),
        (["category=dog", "category=cat"], True),
        (["category!=dog", "category!=cat"], False),
        (["height=128", "seed>=1003"], True),
        (["score>0.25"], True),
        (["prompt>1"], None),
        (["absent="], True),
        (["absent<3"], False),
    ],
)
def test_a_record_satisfies_its_conditions(where, expected):
    if expected is None:
        with pytest.raises(UserError, match="prompt is a text"):
            parse_conditions(where)
    else:
        assert matches(RECORD, parse_conditions(where)) is expected


@pytest.mark.parametrize("where", ["look", "look=dark", "look<3", "luma_mean=dark", "luma_mean<nan", "=3", "seed<"])
def test_a_malformed_condition_is_refused_with_what_is_allowed(where):
    """P6: the message repeats the condition."""
    with pytest.raises(UserError, match=r"--where is .*allowed"):
        parse_conditions([where])


def test_samples_are_found_in_sealed_and_open_shards(store):
    fill(store)
    assert found(store, "look=black") == ["s002", "s005"]
    assert found(store, "look=still") == ["s003"]
    assert found(store, "look=black", "category=dog") == ["s002"]
    assert found(store, "look=black", shards=[1]) == ["s005"]
    assert found(store) == ["s001", "s002", "s003", "s004", "s005", "s006"]


def test_of_a_sealed_shard_only_the_records_that_match_are_read(store, monkeypatch):
    """P7: a search in a million samples reads one table for each shard."""
    fill(store)
    read = []
    original = committed.read_commit
    monkeypatch.setattr(committed, "read_commit", lambda *args: read.append(args[2]) or original(*args))
    assert found(store, "luma_mean<16") == ["s002", "s005"]
    assert sorted(read) == ["s002", "s005", "s006"]


def test_an_unknown_column_is_refused(store):
    fill(store)
    with pytest.raises(UserError, match=r'names the column "catgory".*allowed: category, id, .*luma_mean.*look'):
        found(store, "catgory=cat")


def test_a_table_of_version_1_has_no_scores_so_the_records_are_read(store):
    """P2: a root of version 1 that this version continues has scores in its new records only."""
    fill(store)
    run = json.loads(store.get(layout.RUN))
    del run["dataset"]
    store.put(layout.RUN, canonical_json.encode(run))
    store.delete(layout.metadata_key(0))
    seal_shard(store, 0, ["s001", "s002", "s003", "s004"], schema=DATASET_SCHEMA_1)
    assert found(store, "look=black") == ["s002", "s005"]


def test_a_damaged_record_is_reported_or_left_out(store):
    fill(store)
    store.put(layout.commit_key(1, "s005"), b"{}")
    damaged: list[InvalidObjectError] = []
    assert found(store, "look=black", damaged=damaged.append) == ["s002"]
    assert [error.key for error in damaged] == [layout.commit_key(1, "s005")]
    with pytest.raises(InvalidObjectError):
        found(store, "look=black")
