"""`gc` finds the files that are not needed, and nothing else (P1, P4)."""

from __future__ import annotations

import time
import uuid

import boto3
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.event_log.reader import MAX_DRIVERS
from hv_batch.job.inspection.garbage import Kind, find_garbage, remove
from hv_batch.job.inspection.verify import MediaShape, verify
from hv_batch.job.records.latents import FinalLatents, put_latents, sample_identity
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.plans import publish_plan
from tests.support.rendered_roots import FINGERPRINT
from tests.support.small_runs import COMPARED, everything, run_small, some_samples

SAMPLES = some_samples(6)
FUTURE = time.time() + 3600


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "root"))


def keep_latents(store: Store, sample) -> None:
    latents = np.random.default_rng(sample.params.seed).standard_normal(sample.params.latent_shape)
    put_latents(store, [FinalLatents(sample, latents.astype(np.float32), sample_identity(sample, FINGERPRINT), {})])


def test_a_clean_root_has_no_garbage(store):
    """P1: all files of a finished run are needed."""
    run_small(store, SAMPLES, poison={"s003"})
    assert list(find_garbage(store, older_than=FUTURE)) == []


def litter(store: Store) -> set[tuple[Kind, str]]:
    """Adds files of killed workers to a root in which s006 is pending. Returns those that are garbage."""
    run_small(store, SAMPLES, poison={"s003"})
    (media,) = [key for key in store.list("data/shard-00001") if "/s006-" in key]
    unseal_shard(store, 1)
    store.delete(layout.commit_key(1, "s006"))
    store.put("data/shard-00000/s001-0a1b2c3d.mp4", b"of the slower of two")
    store.put("data/shard-00000/s003-0a1b2c3d.mp4", b"of one that was given up")
    store.put("data/shard-00000/notes.txt", b"a foreign file")
    for sample in (SAMPLES[0], SAMPLES[2], SAMPLES[5]):
        keep_latents(store, sample)
        store.put(f"steps/{layout.shard_name(sample.shard)}/{sample.key}.safetensors", b"x")
    return {
        (Kind.MEDIA, media),
        (Kind.MEDIA, "data/shard-00000/s001-0a1b2c3d.mp4"),
        (Kind.MEDIA, "data/shard-00000/s003-0a1b2c3d.mp4"),
        (Kind.LATENTS, "latents/shard-00000/s001.safetensors"),
        (Kind.LATENTS, "latents/shard-00000/s003.safetensors"),
        (Kind.STEPS, "steps/shard-00000/s001.safetensors"),
        (Kind.STEPS, "steps/shard-00000/s003.safetensors"),
    }


def test_files_of_killed_workers_are_found_and_removed(any_store):
    """P1, P4: media without a record, latents and checkpoints of finished samples. Those of a pending sample are kept.

    New files are kept, because a decoder uploads its media before it commits them.
    """
    expected = litter(any_store)
    assert list(find_garbage(any_store, older_than=time.time() - 3600)) == []
    found = list(find_garbage(any_store, older_than=FUTURE))
    assert {(garbage.kind, garbage.name) for garbage in found} == expected
    for garbage in found:
        remove(any_store, garbage)
    assert list(find_garbage(any_store, older_than=FUTURE)) == []
    assert any_store.exists("data/shard-00000/notes.txt")
    assert any_store.exists(layout.latent_key(1, "s006"))
    any_store.delete("data/shard-00000/notes.txt")
    any_store.delete("steps/shard-00001/s006.safetensors")
    run_small(any_store, SAMPLES, poison={"s003"})
    undisturbed = Store("memory://undisturbed-garbage")
    run_small(undisturbed, SAMPLES, poison={"s003"})
    assert {k: v for k, v in everything(any_store).items() if k.startswith("data/")} == {
        k: v for k, v in everything(undisturbed).items() if k.startswith("data/")
    }


def test_events_that_nothing_reads(store):
    """The events of the newest drivers are kept, whatever else lies in their folder."""
    run_small(store, SAMPLES)
    drivers = [f"20261129T014500Z-{n:08x}" for n in range(MAX_DRIVERS + 2)]
    for driver in drivers:
        store.put(layout.event_part(driver, 0), b"")
    store.put("events/notes.txt", b"")
    found = list(find_garbage(store, older_than=FUTURE))
    assert [garbage.name for garbage in found] == [layout.event_part(driver, 0) for driver in drivers[:2]]
    assert {garbage.kind for garbage in found} == {Kind.EVENTS}


def test_posters_and_interrupted_seals(store):
    """P1: a poster that no record names, files of an interrupted seal, and parts without an index are garbage; the
    files of a sealed shard are kept.
    """
    run_small(store, SAMPLES, poison={"s003"}, adorned=True)
    assert list(find_garbage(store, older_than=FUTURE)) == []
    expected = everything(store)
    store.delete(layout.SUCCESS)
    store.delete(layout.metadata_key(1))
    store.put("plan/part-00000-0a1b2c3d.parquet", b"of a start that was cut short")
    for key in ("s001", "s003", "s009"):
        store.put(f"posters/shard-00000/{key}-0a1b2c3d.jpg", b"of the slower of two")
    found = list(find_garbage(store, older_than=FUTURE))
    assert {(garbage.kind, garbage.name) for garbage in found} == {
        (Kind.POSTER, "posters/shard-00000/s001-0a1b2c3d.jpg"),
        (Kind.POSTER, "posters/shard-00000/s003-0a1b2c3d.jpg"),
        (Kind.POSTER, "posters/shard-00000/s009-0a1b2c3d.jpg"),
        (Kind.SEAL, "webdataset/shard-00001.tar"),
        (Kind.SEAL, "lineage/shard-00001.parquet"),
        (Kind.SEAL, "report/shards/shard-00001.json"),
        (Kind.PLAN, "plan/part-00000-0a1b2c3d.parquet"),
    }
    for garbage in found:
        remove(store, garbage)
    run_small(store, SAMPLES, adorned=True)
    assert everything(store) == expected


PLACES = st.sampled_from([f"{layout.shard_name(sample.shard)}/{sample.key}" for sample in SAMPLES])
HASHES = st.text("0123456789abcdef", min_size=8, max_size=8)
LITTER = st.one_of(
    st.builds("data/{}-{}.mp4".format, PLACES, HASHES),
    st.builds("posters/{}-{}.jpg".format, PLACES, HASHES),
    st.builds("latents/{}.safetensors".format, PLACES),
    st.builds("steps/{}.safetensors".format, PLACES),
    st.builds("plan/part-00000-{}.parquet".format, HASHES),
)


@settings(max_examples=10)
@given(st.sets(LITTER, max_size=12), st.sets(st.sampled_from([s.key for s in SAMPLES])))
def test_nothing_that_is_needed_is_removed(litter, poison):
    """P1: a finished run is byte for byte as before the garbage was added, and valid."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    run_small(store, SAMPLES, poison=poison, adorned=True)
    expected = everything(store)
    for name in litter - {name for folder in COMPARED for name in store.list(folder)}:
        store.put(name, b"of a worker that was killed")
    for garbage in find_garbage(store, older_than=FUTURE):
        remove(store, garbage)
    assert everything(store) == expected
    assert [*store.list("steps"), *store.list("plan")] == []
    assert verify(store, lambda data, suffix: MediaShape(17, 128, 96), decodes=None).findings == []


def test_the_parts_of_an_index_are_kept(store):
    """P2: a resume reads its samples from them; if the document cannot be read, no part is garbage."""
    run_small(store, SAMPLES)
    publish_plan(store, SAMPLES)
    store.put("plan/part-00001-0a1b2c3d.parquet", b"rows")
    found = [garbage.name for garbage in find_garbage(store, older_than=FUTURE)]
    assert found == ["plan/part-00001-0a1b2c3d.parquet"]
    store.put(layout.INDEX, b"{")
    assert list(find_garbage(store, older_than=FUTURE)) == []


def test_media_that_belong_to_a_committed_file_are_kept(store):
    """P1: files with the name of a committed video (a poster) are needed as well."""
    run_small(store, SAMPLES)
    (media,) = [key for key in store.list("data/shard-00000") if "/s001-" in key]
    store.put(media.replace(".mp4", ".jpg"), b"its poster")
    store.put("data/shard-00000/s001-0a1b2c3d.jpg", b"of a version that lost")
    found = [garbage.name for garbage in find_garbage(store, older_than=FUTURE)]
    assert found == ["data/shard-00000/s001-0a1b2c3d.jpg"]


def test_a_record_that_cannot_be_read_makes_no_garbage(store):
    """P1: without a readable record, no file of the sample is removed."""
    run_small(store, SAMPLES)
    store.put("data/shard-00000/s001-0a1b2c3d.mp4", b"another version")
    store.put(layout.commit_key(0, "s001"), b"{")
    assert list(find_garbage(store, older_than=FUTURE)) == []


def test_drafts_of_killed_writers(tmp_path):
    """P2: hidden files on a local disk, which no listing shows."""
    store = Store(str(tmp_path))
    run_small(store, SAMPLES)
    for name in ("data/shard-00000/.draft-01", ".probe-02"):
        (tmp_path / name).write_bytes(b"half")
    found = list(find_garbage(store, older_than=FUTURE))
    assert [(garbage.kind, garbage.name) for garbage in found] == [
        (Kind.DRAFT, ".probe-02"),
        (Kind.DRAFT, "data/shard-00000/.draft-01"),
    ]
    for garbage in found:
        remove(store, garbage)
        remove(store, garbage)
    assert not list(tmp_path.rglob(".draft-*"))


def test_unfinished_uploads_on_s3(s3_store):
    """P2: S3 bills them and no listing shows them; those of other roots in the bucket are not touched."""
    run_small(s3_store, SAMPLES[:1])
    bucket, client = s3_store.url.split("/")[2], boto3.client("s3")
    for key in ("some/root/data/shard-00000/x.mp4", "some/root-2/x.mp4"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    s3_store.put(".probe-01", b"x")
    found = list(find_garbage(s3_store, older_than=FUTURE))
    assert {(garbage.kind, garbage.name) for garbage in found} == {
        (Kind.UPLOAD, "data/shard-00000/x.mp4"),
        (Kind.DRAFT, ".probe-01"),
    }
    for garbage in found:
        remove(s3_store, garbage)
    assert list(find_garbage(s3_store, older_than=FUTURE)) == []
    assert [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [
        "some/root-2/x.mp4"
    ]


def test_a_root_without_a_run_is_refused(store):
    """P6: a wrong path is refused before any listing."""
    store.put("data/shard-00000/a-0a1b2c3d.mp4", b"x")
    with pytest.raises(UserError, match=r"run\.json"):
        list(find_garbage(store, older_than=FUTURE))
