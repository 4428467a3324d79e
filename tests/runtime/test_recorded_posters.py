"""Posters are no part of a run's identity; an output root in whose identity they are keeps its value (P2)."""

from __future__ import annotations

import logging

import pytest

from hv_batch.job.config.run_config import load_config
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.records.run_document import RunState, open_run, read_run
from hv_batch.job.records.run_identity import with_recorded_poster
from hv_batch.job.storage.store import Store
from hv_batch.runtime.preflight import prepare_run
from tests.support.manifests import write_rows
from tests.support.runs import write_config


@pytest.fixture
def prepare(tmp_path):
    """Prepares a run in the root `out` with this value of `media.poster`."""
    manifest = write_rows(tmp_path / "m.jsonl", {"prompt": "a"})

    def prepare(poster, allow_change=()):
        config = load_config(str(write_config(tmp_path, tmp_path / "marks", media={"poster": poster})))
        store, spool = Store(str(tmp_path / "out")), Store(str(tmp_path / "spool"))
        return prepare_run(config, Manifest(manifest), store, spool, None, allow_change=allow_change), store

    return prepare


@pytest.fixture
def old_root(prepare):
    """A root of a version whose identity had `media.poster`, which was false by default."""
    job, store = prepare(False)
    identity = with_recorded_poster(job.document["identity"], False)
    open_run(store, {**job.document, "identity": identity})
    job.index.publish(store)
    return store


def test_posters_may_change_from_one_command_to_the_next(prepare):
    job, store = prepare(True)
    open_run(store, job.document)
    assert "poster" not in read_run(store)["identity"]["media"]
    for poster in (True, False):
        resumed, _ = prepare(poster)
        assert (resumed.state, resumed.continuation) == (RunState.RESUMED, None)
        assert resumed.context.fingerprint == job.context.fingerprint
        assert resumed.context.config.media.poster is poster


@pytest.mark.parametrize("allowed", [(), ("media",)])
def test_an_old_root_keeps_its_value(old_root, prepare, allowed, caplog):
    """P2: the new default does not make posters for half of its videos, and the identity stays that of its records."""
    with caplog.at_level(logging.INFO):
        job, store = prepare(True, allowed)
    assert (job.state, job.continuation) == (RunState.RESUMED, None)
    assert job.context.fingerprint == read_run(store)["fingerprint"]
    assert job.context.config.media.poster is False
    assert any("media.poster is false, as in run.json" in line for line in caplog.messages)


def test_an_old_root_gets_posters_if_the_operator_allows_it(old_root, prepare):
    job, _ = prepare(True, ("media.poster",))
    assert job.continuation is not None
    assert list(job.continuation.changed) == ["media.poster"]
    assert job.context.config.media.poster is True
