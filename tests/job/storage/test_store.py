"""The operations of a store, on a local disk, in memory, and on an S3 endpoint."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.storage import object_store, store
from hv_batch.job.storage.errors import StorageBrokenError
from hv_batch.job.storage.store import Store
from tests.support.repository import ROOT


def test_put_new_creates_once(any_store):
    """P1: the first writer succeeds, later writers change nothing."""
    assert any_store.put_new("commits/shard-00000/a.json", b"first")
    assert not any_store.put_new("commits/shard-00000/a.json", b"second")
    assert any_store.get("commits/shard-00000/a.json") == b"first"


def test_put_replaces(any_store):
    """P1: summaries and latents are replaced as a whole, also by shorter objects."""
    any_store.put("summary.json", b"a long first version")
    any_store.put("summary.json", b"short")
    assert any_store.get("summary.json") == b"short"


def test_put_file_stores_the_bytes(any_store, tmp_path):
    """P1: a media file may hold any bytes; a second upload of the same file is harmless."""
    media, data = tmp_path / "media.mp4", os.urandom(300_000)
    media.write_bytes(data)
    any_store.put_file("data/shard-00000/a-12345678.mp4", media)
    any_store.put_file("data/shard-00000/a-12345678.mp4", media)
    assert any_store.get("data/shard-00000/a-12345678.mp4") == data
    assert list(any_store.list("data")) == ["data/shard-00000/a-12345678.mp4"]


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_stored_file_outlives_its_source(any_store, tmp_path, is_finished):
    """P1: the source file is removed after the upload; a file that is not finished may even be written to again."""
    source = tmp_path / "media.mp4"
    source.write_bytes(b"first")
    if is_finished:
        any_store.put_finished({"data/a.mp4": source})
    else:
        any_store.put_file("data/a.mp4", source)
        source.write_bytes(b"again")
    source.unlink()
    assert any_store.get("data/a.mp4") == b"first"
    assert list(any_store.list("data")) == ["data/a.mp4"]


def test_a_finished_file_replaces_a_damaged_one(tmp_path):
    """P1: a repair renders the same name again; a reader sees one of the two files, complete."""
    source, store = tmp_path / "media.mp4", Store(str(tmp_path / "root"))
    source.write_bytes(b"bytes")
    store.put("data/a.mp4", b"dam")
    store.put_finished({"data/a.mp4": source})
    assert store.get("data/a.mp4") == b"bytes"
    assert list((tmp_path / "root" / "data").iterdir()) == [tmp_path / "root" / "data" / "a.mp4"], "and no draft"


def test_a_finished_file_of_another_disk_is_copied(tmp_path, monkeypatch):
    """P1: if a file cannot be hard-linked, the object is a copy."""
    source, store = tmp_path / "media.mp4", Store(str(tmp_path / "root"))
    source.write_bytes(b"bytes")
    store.put_finished({"data/linked.mp4": source})
    assert source.stat().st_nlink == 2

    def refuse(*_, **__):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    store.put_finished({"data/copied.mp4": source})
    assert source.stat().st_nlink == 2, "but not a third name"
    assert store.get("data/linked.mp4") == store.get("data/copied.mp4") == b"bytes"


def test_empty_objects_exist(any_store):
    """P2: `_SUCCESS` is empty and exists."""
    any_store.put("_SUCCESS", b"")
    assert any_store.exists("_SUCCESS")
    assert any_store.get("_SUCCESS") == b""


def test_a_missing_object(any_store):
    """Reads raise FileNotFoundError, a delete does nothing, a listing is empty."""
    with pytest.raises(FileNotFoundError):
        any_store.get("run.json")
    assert not any_store.exists("run.json")
    assert list(any_store.list("commits/shard-00000/")) == []
    any_store.delete("run.json")


def test_delete_removes(any_store):
    """A deleted object can be created again."""
    any_store.put("a/b", b"1")
    any_store.delete("a/b")
    assert not any_store.exists("a/b")
    assert any_store.put_new("a/b", b"2")


def test_a_folder_is_no_object(any_store):
    """A shard's folder must not look like the record of a sample with the same name."""
    any_store.put("a/b", b"1")
    assert not any_store.exists("a")


def test_there_is_no_object_below_an_object(any_store):
    """P4: a file where a folder of step checkpoints should be must not end a run."""
    any_store.put("steps/shard-00000", b"1")
    assert not any_store.exists("steps/shard-00000/s001.safetensors")


def test_list_is_recursive_relative_and_sorted(any_store):
    """Keys are returned as they were written, and only those below the folder, not those with the same prefix."""
    keys = ["commits/shard-00001/b.json", "commits/shard-00001/a.x.json", "commits/shard-00001/deep/er/c.json"]
    for key in [*keys, "commits/shard-000010/d.json", "run.json"]:
        any_store.put(key, b"x")
    assert list(any_store.list("commits/shard-00001/")) == sorted(keys)
    assert list(any_store.list("commits/shard-00001")) == sorted(keys)


def test_nothing_comes_from_a_cache(any_store):
    """P2: objects that another worker has written or removed are seen."""
    other = pickle.loads(pickle.dumps(any_store))
    assert list(any_store.list("commits/")) == []
    other.put("commits/a.json", b"1")
    assert list(any_store.list("commits/")) == ["commits/a.json"]
    assert any_store.exists("commits/a.json")
    other.delete("commits/a.json")
    assert not any_store.exists("commits/a.json")
    assert list(any_store.list("commits/")) == []


def test_another_machine_writes_to_s3(s3_store):
    """P2: the same for another machine; this process must not cache listings."""
    bucket = s3_store.url.split("/")[2]
    assert list(s3_store.list("commits/")) == []
    assert not s3_store.exists("commits/a.json")
    boto3.client("s3").put_object(Bucket=bucket, Key="some/root/commits/a.json", Body=b"1")
    assert s3_store.exists("commits/a.json")
    assert list(s3_store.list("commits/")) == ["commits/a.json"]
    boto3.client("s3").delete_object(Bucket=bucket, Key="some/root/commits/a.json")
    assert list(s3_store.list("commits/")) == []
    assert not s3_store.exists("commits/a.json")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../a", "a/../b", "a//b", "a/", ".", "./a", "a\\b", "a\0b"])
def test_keys_that_leave_the_root_are_refused(any_store, key):
    """Keys are made from ids that users choose; no key may lead outside the root."""
    with pytest.raises(ValueError, match="not a key"):
        any_store.put(key, b"x")
    with pytest.raises(ValueError, match="not a key"):
        any_store.exists(key)


@settings(deadline=None)
@given(key=st.text(alphabet=st.sampled_from("ab./\\\0 ~"), max_size=12))
def test_a_key_stays_below_the_root(key):
    """Any key is either refused or leads to a path below the root."""
    try:
        checked = store._checked(key)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/root", checked)) == f"/root/{checked}"


def test_a_local_root_is_absolute(tmp_path, monkeypatch):
    """Workers have a different working directory than the driver."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    store = Store("out")
    store.put("a", b"1")
    message = pickle.dumps(store)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(message).get("a") == b"1"
    assert store.url == str(tmp_path / "out")
    assert Store(f"file://{tmp_path}/out").get("a") == b"1"


def test_a_pickled_store_holds_its_url_only(s3_store):
    """Credentials come from the environment of each machine and are never sent."""
    s3_store.put("a", b"1")
    assert pickle.loads(pickle.dumps(s3_store)).__dict__ == Store(s3_store.url).__dict__


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A file of three parts, each of the smallest size that S3 allows."""
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * 2**20)
    path = tmp_path / "large.mp4"
    path.write_bytes(os.urandom(2**20) * 11)
    return path


def test_large_objects_are_uploaded_in_parts(s3, s3_store, large):
    """P1: an object that is too large for one request; a failed part is repeated alone."""
    s3.faults, s3.methods = [503], {"PUT"}
    s3_store.put_file("data/a.mp4", large)
    bucket = s3_store.url.split("/")[2]
    found = boto3.client("s3").head_object(Bucket=bucket, Key="some/root/data/a.mp4")
    assert found["ETag"].endswith('-3"'), "the ETag holds the number of parts"
    assert s3_store.get("data/a.mp4") == large.read_bytes()
    assert s3.failed_requests == 1


def test_an_upload_in_parts_that_fails_leaves_nothing(s3, s3_store, large):
    """P1: a failed upload leaves no object and no parts, which S3 would bill."""
    s3.faults, s3.methods = [400] * 3, {"PUT"}
    with pytest.raises(OSError, match="injected fault"):
        s3_store.put_file("data/a.mp4", large)
    assert not s3_store.exists("data/a.mp4")
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=s3_store.url.split("/")[2])


@pytest.mark.parametrize("place", [".aws/config", ".config/fsspec/conf.json"])
def test_credentials_come_from_the_default_locations(s3, s3_store, tmp_path, place):
    """A store finds the credentials that the user's other tools find (the other tests use the environment); no
    credential is in the config or the URL.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    aws = f"[default]\naws_access_key_id = test\naws_secret_access_key = test\nendpoint_url = {s3.endpoint}\n"
    fsspec = json.dumps({"s3": {"key": "test", "secret": "test", "endpoint_url": s3.endpoint}})
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(aws if "aws" in place else fsspec)
    script = "import sys; from hv_batch.job.storage.store import Store; print(Store(sys.argv[1]).put_new('a', b'1'))"
    done = subprocess.run(
        [sys.executable, "-c", script, s3_store.url],
        env=environment | {"HOME": str(tmp_path), "AWS_DEFAULT_REGION": "us-east-1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr


def test_names_are_those_directly_below_a_folder(any_store):
    """P7: one request, whatever lies below. Nothing is there for a missing folder, or for one with the same prefix."""
    for key in ("commits/shard-00001/a.json", "commits/shard-00001/b/c.json", "commits/d.json", "commits2/x/y.json"):
        any_store.put(key, b"x")
    assert any_store.names("commits/") == {"shard-00001", "d.json"}
    assert any_store.names("commits/shard-00001") == {"a.json", "b"}
    assert any_store.names("quarantine/") == frozenset()


def test_a_sparse_file_is_not_read(tmp_path):
    """P7: a file of a terabyte that takes no space on the disk is an error, and not a terabyte of memory."""
    root = Store(str(tmp_path))
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StorageBrokenError, match="1,099,511,627,776 bytes; allowed: at most"):
        root.get("run.json")
    with pytest.raises(StorageBrokenError, match="allowed: at most 10"):
        root.get("run.json", 10)


def test_folders_that_are_nested_without_end_are_not_walked(tmp_path):
    """P7: a listing ends at a depth that no object has, and raises no RecursionError."""
    root = Store(str(tmp_path))
    root.put("data/shard-00000/a.mp4", b"x")
    descriptor = os.open(tmp_path / "data", os.O_DIRECTORY)
    for _ in range(3000):  # a path of this length cannot be named
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    try:
        assert list(root.list("data/")) == ["data/shard-00000/a.mp4"]
        assert root.leftovers() == []
    finally:
        subprocess.run(["rm", "-r", tmp_path / "data"], check=True)  # Python's rmtree is recursive
