"""Before a shard is sealed, its files are in the output root as their records describe them."""

from __future__ import annotations

import logging

import pytest

from hv_batch.job import layout
from hv_batch.job.dataset.lost_media import release_lost
from hv_batch.job.dataset.seal import read_committed
from hv_batch.job.records import commits
from hv_batch.job.storage.errors import StorageUnavailableError
from tests.support.rendered_roots import make_commit, make_quarantine, make_sample

SAMPLES = [make_sample(number) for number in (1, 2, 3)]
KEYS = [sample.key for sample in SAMPLES]


@pytest.fixture
def records(s3_store):
    """Three committed samples with media and posters."""
    made = []
    for sample in SAMPLES:
        poster = layout.poster_key(0, sample.key, "ab" * 32)
        record = make_commit(sample) | {"poster": poster}
        s3_store.put(record["file"], bytes(record["bytes"]))
        s3_store.put(poster, b"jpg")
        commits.commit(s3_store, record)
        made.append(record)
    return made


def test_nothing_is_released_if_all_files_are_there(s3, s3_store, records):
    """P1: a shard with all its files is sealed."""
    assert release_lost(s3_store, 0, records) == ()
    assert commits.scan_shard(s3_store, 0).committed == set(KEYS)


@pytest.mark.parametrize("lost", ["media", "poster", "size"])
def test_a_sample_whose_file_is_lost_is_pending_again(s3, s3_store, records, lost, caplog):
    """P1: a store that forgets a put which it has confirmed does not lead to a sealed shard with a missing video."""
    first = records[0]
    if lost == "size":
        s3_store.put(first["file"], bytes(first["bytes"] - 1))
    else:
        s3_store.delete(first["file"] if lost == "media" else first["poster"])
    with caplog.at_level(logging.WARNING):
        assert release_lost(s3_store, 0, records) == (KEYS[0],)
    assert commits.scan_shard(s3_store, 0).committed == set(KEYS[1:])
    assert KEYS[0] in caplog.text
    assert (first["poster"] if lost == "poster" else first["file"]) in caplog.text


def test_an_outdated_listing_releases_nothing(s3, s3_store, records, monkeypatch):
    """P1: the listings of some servers lag behind; what is there by its name is not lost."""
    monkeypatch.setattr(type(s3_store), "list_sizes", lambda *_: {})
    assert release_lost(s3_store, 0, records) == ()


def test_an_outage_releases_nothing(s3, s3_store, records):
    """P5: a store that does not answer has lost nothing."""
    s3.refusal = (503, "SlowDown")
    with pytest.raises(StorageUnavailableError):
        release_lost(s3_store, 0, records)
    s3.reset()
    assert commits.scan_shard(s3_store, 0).committed == set(KEYS)


def test_quarantined_samples_have_no_files(s3, s3_store, records):
    """P5: they do not keep a shard from being sealed."""
    sample = make_sample(4)
    commits.quarantine(s3_store, make_quarantine(sample))
    assert release_lost(s3_store, 0, read_committed(s3_store, 0, [*KEYS, sample.key])) == ()
