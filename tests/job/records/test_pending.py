"""What is left to render in an output root, and what a scan removes from it."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict

import fsspec
import numpy as np

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.records.commits import commit, quarantine
from hv_batch.job.records.latents import FinalLatents, put_latents, put_steps
from hv_batch.job.records.pending import PendingSamples
from hv_batch.job.records.shard_scan import Pending
from hv_batch.job.stages import Stage
from hv_batch.job.storage.store import Store
from hv_batch.protocol import StepState
from tests.support.pending import iterate
from tests.support.records import PARAMS, STAGES, a_commit, a_quarantine

LATENTS = np.ones(PARAMS.latent_shape, np.float32)


def index_of(count, shard_size):
    """The index of a manifest of `count` rows with PARAMS."""
    url = f"memory://{uuid.uuid4().hex}/m.jsonl"
    rows = [{**asdict(PARAMS), "id": f"s{i}"} for i in range(count)]
    fsspec.filesystem("memory").pipe(url.removeprefix("memory:/"), "\n".join(map(json.dumps, rows)).encode())
    config = RunConfig.model_validate({"output": {"shard_size": shard_size}})
    return check_manifest(Manifest(url), config, Store(f"memory://{uuid.uuid4().hex}"))


def test_a_sample_goes_on_where_the_last_run_left_it(any_store):
    """P2, P4: at its decode if the final latents are stored, otherwise with a note that there is a step checkpoint."""
    index = index_of(3, shard_size=3)
    new, begun, rendered = index
    put_steps(any_store, begun, StepState(2, LATENTS), "identity")
    put_steps(any_store, rendered, StepState(2, LATENTS), "identity")
    put_latents(any_store, [FinalLatents(rendered, LATENTS, "identity", STAGES)])
    assert list(iterate(PendingSamples(any_store, index))) == [
        Pending(new, Stage.ENCODE, has_steps=False),
        Pending(begun, Stage.ENCODE, has_steps=True),
        Pending(rendered, Stage.DECODE, has_steps=True),
    ]


def test_step_checkpoints_of_terminal_samples_are_removed(any_store):
    """P4: a crash between a record and the removal of its checkpoint leaves them; those of other samples stay."""
    index = index_of(3, shard_size=2)
    done, given_up, waiting = index
    commit(any_store, a_commit(done))
    quarantine(any_store, a_quarantine(given_up))
    for sample in (done, given_up, waiting):
        put_steps(any_store, sample, StepState(1, LATENTS), "identity")
    assert list(iterate(PendingSamples(any_store, index))) == [Pending(waiting, Stage.ENCODE, has_steps=True)]
    assert list(any_store.list(layout.STEPS)) == [layout.step_key(1, waiting.key)]


def test_step_checkpoints_cost_one_listing_a_run(any_store, monkeypatch):
    """P7: one listing for a resume, however many shards it passes."""
    asked = []
    list_ = any_store.list
    monkeypatch.setattr(any_store, "list", lambda prefix: asked.append(prefix) or list_(prefix))
    list(iterate(PendingSamples(any_store, index_of(4, shard_size=1))))
    assert [prefix for prefix in asked if prefix.startswith(layout.STEPS)] == [layout.STEPS]
