"""Intermediate results of uncommitted samples: final latents and step checkpoints."""

from __future__ import annotations

import dataclasses
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from hv_batch.job import layout
from hv_batch.job.records import latents as latents_module
from hv_batch.job.records.latents import (
    FinalLatents,
    checkpointed,
    drop_latents,
    drop_steps,
    get_latents,
    get_steps,
    put_latents,
    put_steps,
    sample_identity,
)
from hv_batch.job.storage.store import Store
from hv_batch.protocol import StepState
from hv_batch.sampling_params import SamplingParams
from tests.support.records import PARAMS, SAMPLE, STAGES


def damage(store: Store, key: str, data: st.DataObject) -> None:
    """Truncate an object, or change one of its bytes."""
    whole = store.get(key)
    if data.draw(st.booleans(), label="truncate"):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, 1200) | st.integers(0, len(whole) - 1))
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    store.put(key, damaged)


def some_latents() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(PARAMS.latent_shape).astype(np.float32)


def test_latents_are_read_back_bit_for_bit(any_store):
    """P4: a decode from storage decodes the same latents, and gets the reports of the upstream stages."""
    latents = some_latents()
    put_latents(
        any_store, [FinalLatents(SAMPLE, latents.transpose(0, 1, 3, 2).transpose(0, 1, 3, 2), "identity", STAGES)]
    )
    stored = get_latents(any_store, SAMPLE, "identity")
    assert stored.latents.dtype == np.float32
    assert stored.latents.tobytes() == latents.tobytes()
    assert stored.stages == STAGES
    assert stored.latents.flags.writeable, "torch.from_numpy needs a writable array"
    drop_latents(any_store, SAMPLE.shard, SAMPLE.key)
    assert get_latents(any_store, SAMPLE, "identity") is None
    drop_latents(any_store, SAMPLE.shard, SAMPLE.key)


def test_latents_of_another_identity_are_ignored(any_store):
    """P3: latents of another config or seed would give another video."""
    put_latents(any_store, [FinalLatents(SAMPLE, some_latents(), "identity", STAGES)])
    assert get_latents(any_store, SAMPLE, "another") is None


def test_latents_of_another_shape_are_refused(any_store):
    """P4: a write with a wrong shape is an error of the engine; after a read, the sample is denoised again."""
    with pytest.raises(ValueError, match="latents of"):
        put_latents(any_store, [FinalLatents(SAMPLE, some_latents()[:, :, :, :4], "identity", STAGES)])
    put_latents(any_store, [FinalLatents(SAMPLE, some_latents(), "identity", STAGES)])
    taller = dataclasses.replace(SAMPLE, params=dataclasses.replace(PARAMS, height=128))
    assert get_latents(any_store, taller, "identity") is None


@settings(deadline=None)
@given(data=st.data())
def test_damaged_latents_are_ignored(data):
    """P4: a truncated or changed file means that the sample is denoised again; it never raises and never gives a wrong
    video.
    """
    store = Store(f"memory://{uuid.uuid4().hex}")
    key = layout.latent_key(SAMPLE.shard, SAMPLE.key)
    put_latents(store, [FinalLatents(SAMPLE, some_latents(), "identity", STAGES)])
    damage(store, key, data)
    stored = get_latents(store, SAMPLE, "identity")
    # The reports of the stages are not hashed: a changed letter there does not matter.
    assert stored is None or stored.latents.tobytes() == some_latents().tobytes()


@pytest.mark.parametrize("junk", [b"", b"{}", b"\x02" + bytes(7) + b"[]", b"\xff" * 64, b"\x04" + bytes(7) + b"null"])
def test_a_file_of_another_format_is_ignored(any_store, junk):
    """P4: the same for a file that was never a latents file."""
    any_store.put(layout.latent_key(17, SAMPLE.key), junk)
    assert get_latents(any_store, SAMPLE, "identity") is None


def test_an_outage_is_not_a_missing_latent(s3, s3_store):
    """P4: if an outage looked like a missing file, a finished denoise would be repeated."""
    put_latents(s3_store, [FinalLatents(SAMPLE, some_latents(), "identity", STAGES)])
    s3.faults = [503] * 100
    with pytest.raises(ConnectionError):
        get_latents(s3_store, SAMPLE, "identity")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_the_identity_covers_every_parameter(field):
    """P3: every parameter of the sample and the run's fingerprint; not the position in the manifest."""
    value = getattr(PARAMS, field)
    changed = value + "!" if isinstance(value, str) else value + 16
    other = dataclasses.replace(SAMPLE, params=dataclasses.replace(PARAMS, **{field: changed}))
    assert sample_identity(other, "run") != sample_identity(SAMPLE, "run") != sample_identity(SAMPLE, "another run")
    assert sample_identity(dataclasses.replace(SAMPLE, row=9, shard=1), "run") == sample_identity(SAMPLE, "run")


# Step checkpoints -----------------------------------------------------------------------------------------------------


def test_the_last_step_checkpoint_is_read_back_bit_for_bit(any_store):
    """P4: it replaces the previous one, and is listed for the next run until it is dropped."""
    put_steps(any_store, SAMPLE, StepState(1, some_latents()), "identity")
    put_steps(any_store, SAMPLE, StepState(3, -some_latents()), "identity")
    state = get_steps(any_store, SAMPLE, "identity")
    assert state.step == 3
    assert state.latents.tobytes() == (-some_latents()).tobytes()
    other = dataclasses.replace(SAMPLE, shard=2, key="a.b")
    put_steps(any_store, other, StepState(1, some_latents()), "identity")
    assert checkpointed(any_store) == {SAMPLE.key, "a.b"}
    for _ in range(2):
        drop_steps(any_store, SAMPLE.shard, SAMPLE.key)
        assert get_steps(any_store, SAMPLE, "identity") is None
    assert checkpointed(any_store) == {"a.b"}


HISTORY = {"velocity_0": some_latents() + 1, "anchor": some_latents() + 2}


def test_a_state_with_earlier_velocities_is_read_back_bit_for_bit(any_store):
    """P4: whatever later steps need is in the checkpoint; one without it has the format of earlier versions."""
    put_steps(any_store, SAMPLE, StepState(3, some_latents(), HISTORY), "identity")
    state = get_steps(any_store, SAMPLE, "identity")
    assert {name: array.tobytes() for name, array in state.history.items()} == {
        name: array.tobytes() for name, array in HISTORY.items()
    }
    key = layout.step_key(SAMPLE.shard, SAMPLE.key)
    assert b"hv_batch/steps/2" in any_store.get(key)
    put_steps(any_store, SAMPLE, StepState(3, some_latents()), "identity")
    assert b"hv_batch/steps/1" in any_store.get(key)


@pytest.mark.parametrize(
    "history",
    [
        {"velocity_0": np.full(PARAMS.latent_shape, np.nan, np.float32)},
        {"Velocity/0": some_latents()},
        {f"velocity_{n}": some_latents() for n in range(9)},
    ],
    ids=["not finite", "name", "number"],
)
def test_a_state_that_no_denoise_has_written_is_ignored(any_store, history):
    """P4: an attacker who can write to the bucket can write a checkpoint with a valid digest."""
    put_steps(any_store, SAMPLE, StepState(3, some_latents(), history), "identity")
    assert get_steps(any_store, SAMPLE, "identity") is None


def test_a_state_of_another_dtype_is_ignored(any_store):
    """P4: the same for the type of its numbers."""
    tensors = {"latents": some_latents().astype(np.float64)}
    digest = latents_module._steps_digest(tensors, 3)
    metadata = {"schema": "hv_batch/steps/1", "identity": "identity", "step": "3", "sha256": digest}
    any_store.put(layout.step_key(SAMPLE.shard, SAMPLE.key), save(tensors, metadata=metadata))
    assert get_steps(any_store, SAMPLE, "identity") is None


def test_step_checkpoints_and_final_latents_are_kept_apart(any_store):
    """P4: one is never read as the other."""
    put_steps(any_store, SAMPLE, StepState(1, some_latents()), "identity")
    assert get_latents(any_store, SAMPLE, "identity") is None
    put_latents(any_store, [FinalLatents(SAMPLE, some_latents(), "identity", STAGES)])
    steps, latents = layout.step_key(17, SAMPLE.key), layout.latent_key(17, SAMPLE.key)
    files = any_store.get(steps), any_store.get(latents)
    any_store.put(steps, files[1])
    any_store.put(latents, files[0])
    assert get_steps(any_store, SAMPLE, "identity") is None
    assert get_latents(any_store, SAMPLE, "identity") is None


@pytest.mark.parametrize("step", [0, 4, 5])
def test_a_step_checkpoint_lies_between_two_steps(any_store, step):
    """P3: a step number outside the denoise (of a run with another number of steps, say) is rejected."""
    put_steps(any_store, SAMPLE, StepState(step, some_latents()), "identity")
    assert get_steps(any_store, SAMPLE, "identity") is None


def test_a_step_checkpoint_of_another_identity_or_shape_is_ignored(any_store):
    """P3: its steps belong to another video."""
    put_steps(any_store, SAMPLE, StepState(1, some_latents()), "identity")
    assert get_steps(any_store, SAMPLE, "another") is None
    taller = dataclasses.replace(SAMPLE, params=dataclasses.replace(PARAMS, height=128))
    assert get_steps(any_store, taller, "identity") is None
    with pytest.raises(ValueError, match="latents of"):
        put_steps(any_store, taller, StepState(1, some_latents()), "identity")


@settings(deadline=None)
@given(data=st.data(), history=st.sampled_from([{}, HISTORY]))
def test_a_damaged_step_checkpoint_is_ignored(data, history):
    """P3, P4: if any byte changes, the step number included, the sample starts again and never gives a wrong video."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    put_steps(store, SAMPLE, StepState(2, some_latents(), history), "identity")
    damage(store, layout.step_key(SAMPLE.shard, SAMPLE.key), data)
    state = get_steps(store, SAMPLE, "identity")
    if state is not None:
        assert (state.step, state.latents.tobytes()) == (2, some_latents().tobytes())
        assert {name: array.tobytes() for name, array in state.history.items()} == {
            name: array.tobytes() for name, array in history.items()
        }


def test_a_changed_step_number_is_rejected(any_store):
    """P3: the same latents with another step number would give another video."""
    key = layout.step_key(SAMPLE.shard, SAMPLE.key)
    put_steps(any_store, SAMPLE, StepState(2, some_latents()), "identity")
    data = any_store.get(key)
    assert data.count(b'"step":"2"') == 1
    any_store.put(key, data.replace(b'"step":"2"', b'"step":"3"'))
    assert get_steps(any_store, SAMPLE, "identity") is None
