"""The operations of a store, on a local disk, in memory, and on an S3 endpoint."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.storage import object_store, store
from hv_batch.job.storage import store as store_module
from hv_batch.job.storage.store import PutIfAbsent, StorageUnavailableError, Store
from hv_batch.protocol import UserError
from tests.support.repository import ROOT
from tests.support.small_runs import run_small, some_samples


def at_once(count, act):
    """The results of `act(i)` for i < count, all started at the same moment."""
    results, barrier = [None] * count, threading.Barrier(count)

    def run(i):
        barrier.wait()
        results[i] = act(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# What a store does ----------------------------------------------------------------------------------------------------


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


# Races and crashes ----------------------------------------------------------------------------------------------------


def test_of_many_threads_one_creates(any_store):
    """P1: exactly one of several concurrent writers succeeds, and its bytes are stored."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places inside the act, not only between two acts
    try:
        for turn in range(8):
            key = f"commits/shard-00000/{turn}.json"
            wins = at_once(8, lambda i, key=key: any_store.put_new(key, f"writer {i}".encode()))
            assert wins.count(True) == 1
            assert any_store.get(key) == f"writer {wins.index(True)}".encode()
    finally:
        sys.setswitchinterval(usual)


def test_nothing_changes_during_a_listing_of_memory(monkeypatch, tmp_path):
    """P2: a walk of fsspec's memory file system fails if keys change; shards are scanned during commits."""
    find = MemoryFileSystem.find

    def slow_find(self, path, **options):
        before = list(self.store)
        time.sleep(0.01)
        assert list(self.store) == before
        return find(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "find", slow_find)
    store = Store("memory://listed")
    (tmp_path / "file").write_bytes(b"")
    acts = (
        lambda key: store.put(key, b""),
        lambda key: store.put_new(key, b""),
        lambda key: store.put_file(key, tmp_path / "file"),
        store.delete,
        lambda key: list(store.list("data")),
    )
    assert (
        at_once(10, lambda i: [acts[(i + turn) % 5](f"data/{turn}") for turn in range(10)] and True).count(True) == 10
    )


def test_threads_are_serialized_without_a_conditional_write(monkeypatch):
    """P1: without a conditional write, no thread may write between another thread's check and its write."""
    exists = MemoryFileSystem.exists

    def slow_exists(self, path, **options):  # the driver's own look, just before it writes
        found = exists(self, path, **options)
        time.sleep(0.005)
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", slow_exists)
    store = Store("memory://turns")
    assert at_once(8, lambda i: store.put_new("a/b", b"%d" % i)).count(True) == 1


def python(script: str, *args: object) -> subprocess.Popen:
    """A new interpreter that has imported `Store`."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys\nfrom hv_batch.job.storage.store import Store\n{script}", *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_of_many_processes_one_creates(tmp_path):
    """P1: exactly one process on a local disk creates each key."""
    script = """
store, me = Store(sys.argv[1]), sys.argv[2].encode() * 1000
for key in sys.stdin:
    print(int(store.put_new(f"commits/{key.strip()}.json", me)), flush=True)
"""
    writers = [python(script, tmp_path / "root", i) for i in range(4)]
    store = Store(str(tmp_path / "root"))
    for key in range(60):
        for writer in writers:
            writer.stdin.write(f"{key}\n")
        for writer in writers:
            writer.stdin.flush()
        wins = [int(writer.stdout.readline()) for writer in writers]
        assert sum(wins) == 1
        assert store.get(f"commits/{key}.json") == str(wins.index(1)).encode() * 1000
    for writer in writers:
        writer.communicate()


def test_a_killed_writer_leaves_no_partial_object(tmp_path):
    """P2: whenever a writer is killed, readers see complete objects or none."""
    size = 3_000_000
    script = """
store, size, media = Store(sys.argv[1]), int(sys.argv[2]), __import__("pathlib").Path(sys.argv[3])
media.write_bytes(b"m" * size)
print("begun", flush=True)
for i in range(10**6):
    store.put_new(f"commits/{sys.argv[4]}-{i}", bytes([65 + i % 26]) * size)
    store.put("latents/one", bytes([65 + i % 26]) * size)
    store.put_file(f"data/{i % 3}", media)
    store.delete(f"commits/{sys.argv[4]}-{i - 2}")
"""
    store = Store(str(tmp_path / "root"))
    seen = 0
    for turn in range(4):
        writer = python(script, tmp_path / "root", size, tmp_path / "media", turn)
        assert writer.stdout.readline() == "begun\n"
        deadline = time.monotonic() + 0.15 + 0.11 * turn
        while time.monotonic() < deadline:
            seen += _check_whole(store, size)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        seen += _check_whole(store, size)
    assert seen > 10


def _check_whole(store: Store, size: int) -> int:
    seen = 0
    for folder in ("commits", "latents", "data"):
        for key in store.list(folder):
            try:
                data = store.get(key)
            except FileNotFoundError:  # deleted meanwhile
                continue
            assert len(data) == size, f"{key} is partial"
            assert data == data[:1] * size, f"{key} is mixed"
            seen += 1
    return seen


def test_list_hides_drafts(tmp_path):
    """P2: a draft of a killed writer is not an object."""
    store = Store(str(tmp_path))
    store.put("commits/a.json", b"1")
    (tmp_path / "commits" / ".draft-0123").write_bytes(b"hal")
    assert list(store.list("commits/")) == ["commits/a.json"]


def test_drafts_of_the_given_folders_are_removed(tmp_path):
    """A run that ends leaves no drafts of killed workers; objects and other hidden files stay."""
    store = Store(str(tmp_path))
    for folder in layout.folders([3]):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / ".draft-0123").write_bytes(b"half")
    store.put("commits/shard-00003/a.json", b"1")
    (tmp_path / ".hidden").write_bytes(b"of the operator")
    store.remove_drafts([*layout.folders([3]), *layout.folders([4])])
    assert files_below(tmp_path) == [".hidden", "a.json"]
    Store("memory://drafts").remove_drafts(layout.folders([3]))


def test_every_folder_of_a_run_is_searched_for_drafts(tmp_path):
    """`layout.folders` names each folder to which a run writes."""
    store = Store(str(tmp_path))
    run_small(store, some_samples(4), poison={"s003"}, adorned=True)
    written = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    searched = {folder.rstrip("/") or "." for folder in layout.folders([0])}
    assert written <= searched


def test_a_draft_that_another_process_removes_is_written_again(tmp_path, monkeypatch):
    """P1: the end of an earlier run may remove it."""
    monkeypatch.setattr(store_module, "PAUSES_S", (0.0,))
    link, lost = os.link, []

    def lose_once(source, target, *, src_dir_fd, **options):
        if not lost:
            lost.append(source)
            os.unlink(source, dir_fd=src_dir_fd)
        link(source, target, src_dir_fd=src_dir_fd, **options)

    monkeypatch.setattr(os, "link", lose_once)
    store = Store(str(tmp_path))
    assert store.put_new("commits/a", b"1")
    assert store.get("commits/a") == b"1"
    assert lost


def test_a_file_is_downloaded_as_it_was_uploaded(any_store, tmp_path):
    """P1: a file is downloaded complete; a missing one raises FileNotFoundError."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 2048)
    any_store.put_file("a/b.mp4", source)
    any_store.get_file("a/b.mp4", target)
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        any_store.get_file("a/c.mp4", target)


@pytest.mark.parametrize("act", ["put_new", "put", "put_file"])
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch, act):
    """A full disk is FATAL, so its errno must be kept; partially written files are removed."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def free_space(_):
        assert files_below(tmp_path / "root") == [], "partial files would count as used space"
        return SimpleNamespace(free=900)

    media = tmp_path / "media"
    media.write_bytes(b"x" * 1000)
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "disk_usage", free_space)
    with pytest.raises(
        OSError, match=r"No space left on device: 1,000 bytes are needed below /.*, where 900 are free"
    ) as caught:
        getattr(Store(str(tmp_path / "root")), act)("a/b", media if act == "put_file" else b"x" * 1000)
    assert caught.value.errno == errno.ENOSPC
    assert files_below(tmp_path / "root") == []


def test_a_disk_that_cannot_flush_folders_is_used(tmp_path, monkeypatch):
    """CIFS and some FUSE mounts refuse to flush a folder; the store still works."""
    fsync = os.fsync

    def picky(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    store = Store(str(tmp_path))
    assert store.put_new("a/b", b"1")
    assert store.get("a/b") == b"1"


def test_new_folders_are_flushed_before_their_contents(tmp_path, monkeypatch):
    """P1: a power failure must not remove a stored record, nor the first record of a shard together with its folder."""
    flushed = []
    fsync = os.fsync

    def flush(descriptor):
        flushed.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    store = Store(str(tmp_path / "root"))
    assert store.put_new("commits/shard-00000/a.json", b"{}")
    folders = [".", "root", "root/commits", "root/commits/shard-00000"]
    assert [path for path in flushed if "draft" not in path] == folders
    flushed.clear()
    assert store.put_new("commits/shard-00000/b.json", b"{}")
    assert [path for path in flushed if "draft" not in path] == folders[-1:]


def test_a_link_whose_reply_was_lost_counts_as_created(tmp_path, monkeypatch):
    """P1: NFS repeats a link request and then reports the first success as a conflict."""
    link = os.link

    def link_twice(source, target, **folders):
        link(source, target, **folders)
        link(source, target, **folders)

    monkeypatch.setattr(os, "link", link_twice)
    store = Store(str(tmp_path))
    assert store.put_new("a", b"1")
    assert not store.put_new("a", b"2")


# Probe ----------------------------------------------------------------------------------------------------------------


def test_probe_reports_the_mechanism_of_each_store(any_store):
    """P1: the probe names the put-if-absent mechanism; only a store without one has a warning."""
    expected = {"s3": PutIfAbsent.CONDITIONAL_PUT, "memory": PutIfAbsent.UNSAFE}
    claim = any_store.probe()
    assert claim is expected.get(any_store.url.split(":")[0], PutIfAbsent.EXCLUSIVE_LINK)
    assert (claim.warning is None) == (claim is not PutIfAbsent.UNSAFE)


def test_probe_leaves_nothing(tmp_path, s3_store):
    """A root that was only probed stays as it was: absent, or empty."""
    root = tmp_path / "root"
    Store(str(root)).probe()
    assert not root.exists()
    root.mkdir()
    Store(str(root)).probe()
    assert list(root.iterdir()) == []
    s3_store.probe()
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=s3_store.url.split("/")[2])


def test_probe_finds_a_server_that_ignores_the_condition(s3, s3_store):
    """P1: some S3-compatible servers accept every PUT; the user is warned."""
    s3.ignores_conditions = True
    assert s3_store.probe() is PutIfAbsent.UNSAFE
    assert s3_store.put_new("a", b"1")
    assert not s3_store.put_new("a", b"2"), "the check beforehand still protects one run at a time"


def test_probe_finds_a_disk_without_hard_links(tmp_path, monkeypatch):
    """P1: FAT and many FUSE mounts have no hard links; the root works, with a warning."""

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(str(tmp_path / "root"))
    assert store.probe() is PutIfAbsent.UNSAFE
    assert store.put_new("a", b"1")
    assert not store.put_new("a", b"2")
    assert store.get("a") == b"1"
    assert files_below(tmp_path / "root") == ["a"]


def test_probe_refuses_a_root_that_cannot_be_written(tmp_path, s3):
    """P6: a root that cannot be written is found at the start, and the message names it."""
    (tmp_path / "file").write_bytes(b"")
    for url in [str(tmp_path / "file" / "root"), "/proc/nowhere/root", "s3://no-such-bucket/root"]:
        with pytest.raises(UserError, match=r"cannot be written|lies below one") as caught:
            Store(url).probe()
        assert url in str(caught.value)


@pytest.mark.parametrize("url", ["nosuch://bucket/root", "hdfs://host/root"])
def test_probe_refuses_a_url_that_cannot_be_opened(url):
    """P6: an unknown protocol, or one whose package is not installed."""
    with pytest.raises(UserError, match=url):
        Store(url).probe()


# Large objects --------------------------------------------------------------------------------------------------------


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


# Credentials ----------------------------------------------------------------------------------------------------------


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


# Retries --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 503, 429, 409])
def test_transient_errors_are_retried(s3, s3_store, status):
    """P5: throttling, server errors and S3's reply to concurrent conditional PUTs are retried."""
    s3.faults = [status] * 3
    assert s3_store.put_new("a", b"1")
    assert s3.failed_requests == 3
    s3.faults = [status] * 3
    assert s3_store.get("a") == b"1"


def test_an_unreachable_store_raises_storage_unavailable(s3, s3_store):
    """P5: after four attempts, an infrastructure failure with its own type, which can be pickled."""
    s3.faults = [503] * 100
    with pytest.raises(StorageUnavailableError, match=s3_store.url) as caught:
        s3_store.put("a", b"1")
    assert s3.failed_requests == 4
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), ConnectionError)


def test_refused_credentials_are_not_retried(s3, s3_store):
    """A permission error stops the run at once; its errno distinguishes it from an error of the sample."""
    s3.faults = [403] * 100
    with pytest.raises(PermissionError) as caught:
        s3_store.put("a", b"1")
    assert caught.value.errno == errno.EACCES
    assert s3.failed_requests == 1


def test_a_server_that_is_full_is_a_full_disk(s3, s3_store):
    """A full server is FATAL, as a full local disk."""
    s3.faults = [507] * 100
    with pytest.raises(OSError, match=r"12,345 bytes are needed: .*507") as caught:
        s3_store.put("a", bytes(12_345))
    assert caught.value.errno == errno.ENOSPC


def test_an_error_never_looks_like_a_missing_object(s3, s3_store):
    """P2: if `exists` returned False during an outage, a resume would render committed samples again."""
    s3_store.put("commits/a.json", b"1")
    s3.faults, s3.methods = [503] * 100, {"GET", "HEAD"}
    with pytest.raises(StorageUnavailableError):
        list(s3_store.list("commits/"))
    with pytest.raises(StorageUnavailableError):
        s3_store.exists("commits/a.json")


def test_an_unreadable_folder_is_not_an_empty_one(tmp_path, monkeypatch):
    """P2: the same on a local disk."""

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    store = Store(str(tmp_path))
    store.put("commits/a.json", b"1")
    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(store.list("commits/"))
