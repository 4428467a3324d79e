"""The store on Google Cloud Storage and Azure Blob Storage, with their own fsspec drivers over HTTP (P1)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.inspection.garbage import find_garbage
from hv_batch.job.inspection.verify import MediaShape, verify
from hv_batch.job.storage.store import PutIfAbsent, Store
from tests.support.cloud_servers import GcsServer, azurite
from tests.support.crash_points import NAMED, POISON, crash_and_resume, number_of
from tests.support.small_runs import everything, run_small, some_samples

pytestmark = pytest.mark.slow

WRITERS = 8
FUTURE = 2**33  # seconds since 1970


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    pytest.importorskip("gcsfs")
    server = GcsServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def azure(tmp_path_factory) -> Iterator[str]:
    pytest.importorskip("adlfs")
    from azure.storage.blob import BlobServiceClient

    with azurite(tmp_path_factory.mktemp("azurite")) as connection:
        BlobServiceClient.from_connection_string(connection).create_container("nights")
        yield connection


@pytest.fixture
def gcs_store(gcs: GcsServer, monkeypatch) -> Store:
    gcs.ignores_conditions = False
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
    monkeypatch.setattr("hv_batch.job.storage.store.PAUSES_S", (0.0, 0.0, 0.0))
    return Store(f"gs://nights/{uuid.uuid4().hex}/root")


@pytest.fixture
def azure_store(azure: str, monkeypatch) -> Store:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure)
    monkeypatch.setattr("hv_batch.job.storage.store.PAUSES_S", (0.0, 0.0, 0.0))
    return Store(f"az://nights/{uuid.uuid4().hex}/root")


@pytest.fixture(params=["gcs_store", "azure_store"])
def store(request) -> Store:
    return request.getfixturevalue(request.param)


def test_the_probe_finds_a_conditional_put(store):
    """P1: the probe finds a conditional PUT and leaves nothing behind."""
    assert store.probe() is PutIfAbsent.CONDITIONAL_PUT
    assert not store.leftovers()


@pytest.mark.parametrize("size", [10, 7 * 2**20])
def test_of_many_writers_one_wins(store, size):
    """P1: one writer succeeds and its bytes are stored, also if the driver uploads a large object in parts."""
    store.probe()

    def write(number: int) -> bool:
        return store._backend.create(f"commits/{size}", bytes([number]) * size)

    with ThreadPoolExecutor(WRITERS) as pool:
        won = list(pool.map(write, range(WRITERS)))
    assert sum(won) == 1
    assert store.get(f"commits/{size}") == bytes([won.index(True)]) * size
    assert not store.put_new(f"commits/{size}", b"late")


def test_what_a_store_does(store, tmp_path: Path):
    """P1: put replaces, a missing object is missing, a folder is not an object, files are uploaded and downloaded
    complete.
    """
    store.put("a/b.json", b"1")
    store.put("a/b.json", b"2")
    assert store.get("a/b.json") == b"2"
    assert (store.exists("a/b.json"), store.exists("a"), store.exists("a/c")) == (True, False, False)
    with pytest.raises(FileNotFoundError):
        store.get("a/c")
    with pytest.raises(FileNotFoundError):
        store.get_file("a/c", tmp_path / "none")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 2**17)
    for _ in range(2):
        store.put_file("media.mp4", source)
    store.get_file("media.mp4", target)
    assert target.read_bytes() == source.read_bytes()
    assert store.modified("media.mp4") > 1.7e9
    assert list(store.list("a")) == ["a/b.json"]
    for _ in range(2):
        store.delete("a/b.json")
    assert list(store.list("a")) == []


@pytest.mark.parametrize("point", ["media", "record", "seal", "_SUCCESS"])
def test_a_run_that_crashes_and_resumes(store, point):
    """P1, P2: the whole protocol; the root ends byte for byte as on a local disk, valid and without garbage."""
    crash_and_resume(store.url, [(number_of(NAMED[point]), "after")])
    assert verify(store, lambda data, suffix: MediaShape(17, 128, 96), decodes=None).findings == []
    assert list(find_garbage(store, older_than=FUTURE)) == []


def test_posters_and_tars(store, tmp_path):
    """P2: a root with posters and tars is complete, as on a local disk."""
    samples = some_samples(6)
    run_small(store, samples, poison=POISON, adorned=True)
    disk = Store(str(tmp_path / "root"))
    run_small(disk, samples, poison=POISON, adorned=True)
    assert everything(store) == everything(disk)
    assert verify(store, lambda data, suffix: MediaShape(17, 128, 96), decodes=0).findings == []
    store.delete(layout.tar_key(0))
    (wrong,) = verify(store, lambda data, suffix: MediaShape(17, 128, 96), decodes=0).findings
    assert "missing" in wrong.details


def test_a_server_that_ignores_conditions_is_detected(gcs, gcs_store):
    """P1: the probe writes a test object, detects that the condition is ignored, and the user is warned."""
    gcs.ignores_conditions = True
    assert gcs_store.probe() is PutIfAbsent.UNSAFE
