"""What the plan finds left to render in an output root, and what it clears away on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hv_batch.job import layout
from hv_batch.job.commits import commit, quarantine
from hv_batch.job.events import Stage
from hv_batch.job.latents import put_latents, put_steps
from hv_batch.job.plan import Passed, Pending, Plan
from hv_batch.protocol import StepState
from tests.unit.test_commits import PARAMS, SAMPLE, STAGES, a_commit, a_quarantine

LATENTS = np.ones(PARAMS.latent_shape, np.float32)


def samples(count, shard=0):
    return [replace(SAMPLE, key=f"s{shard}{i}", shard=shard) for i in range(count)]


def test_a_sample_goes_on_where_the_last_run_left_it(any_store):
    """P2, P4: at its decode where the final latents are stored, else with a note that a step checkpoint waits."""
    new, begun, rendered = samples(3)
    put_steps(any_store, begun, StepState(2, LATENTS), "identity")
    put_steps(any_store, rendered, StepState(2, LATENTS), "identity")
    put_latents(any_store, rendered, LATENTS, "identity", STAGES)
    assert list(Plan(any_store, [new, begun, rendered])) == [
        Pending(new, Stage.ENCODE, has_steps=False),
        Pending(begun, Stage.ENCODE, has_steps=True),
        Pending(rendered, Stage.DECODE, has_steps=True),
    ]


def test_step_checkpoints_of_ended_samples_are_cleared_away(any_store):
    """P4: what a crash between a record and the removal of its checkpoint has left; those of others stay."""
    done, given_up = samples(2)
    (waiting,) = samples(1, shard=1)
    commit(any_store, a_commit(done))
    quarantine(any_store, a_quarantine(given_up))
    for sample in (done, given_up, waiting):
        put_steps(any_store, sample, StepState(1, LATENTS), "identity")
    assert list(Plan(any_store, [done, given_up, waiting])) == [
        Passed(0),
        Pending(waiting, Stage.ENCODE, has_steps=True),
    ]
    assert list(any_store.list(layout.STEPS)) == [layout.step_key(1, waiting.key)]


def test_step_checkpoints_cost_one_listing_a_run(any_store, monkeypatch):
    """P7: however many shards a resume passes."""
    asked = []
    list_ = any_store.list
    monkeypatch.setattr(any_store, "list", lambda prefix: asked.append(prefix) or list_(prefix))
    list(Plan(any_store, [sample for shard in range(4) for sample in samples(1, shard)]))
    assert [prefix for prefix in asked if prefix.startswith(layout.STEPS)] == [layout.STEPS]
