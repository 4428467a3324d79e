"""The few acts of a store, on a real disk, in memory, and against a real S3 endpoint."""

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

from hv_batch.job.storage import local_disk, object_store, store
from hv_batch.job.storage.store import PutIfAbsent, StorageUnavailableError, Store
from hv_batch.protocol import UserError
from tests.support.repository import ROOT


def at_once(count, act):
    """What `act(i)` returns for i < count, all begun at the same moment."""
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
    """P1: the first writer wins, later ones change nothing."""
    assert any_store.put_new("commits/shard-00000/a.json", b"first")
    assert not any_store.put_new("commits/shard-00000/a.json", b"second")
    assert any_store.get("commits/shard-00000/a.json") == b"first"


def test_put_replaces(any_store):
    """Design 4: summaries and latents are replaced as a whole, also by shorter ones."""
    any_store.put("summary.json", b"a long first version")
    any_store.put("summary.json", b"short")
    assert any_store.get("summary.json") == b"short"


def test_put_file_stores_the_bytes(any_store, tmp_path):
    """Design 4: media are files of any content; writing the same one again is harmless."""
    media, data = tmp_path / "media.mp4", os.urandom(300_000)
    media.write_bytes(data)
    any_store.put_file("data/shard-00000/a-12345678.mp4", media)
    any_store.put_file("data/shard-00000/a-12345678.mp4", media)
    assert any_store.get("data/shard-00000/a-12345678.mp4") == data
    assert list(any_store.list("data")) == ["data/shard-00000/a-12345678.mp4"]


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_stored_file_outlives_its_source(any_store, tmp_path, is_finished):
    """P1: scratch files go as soon as they are stored, and one that is not finished may even be written to again."""
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


def test_a_finished_file_takes_the_place_of_a_damaged_one(tmp_path):
    """P1: a repair renders the same name again; whoever reads sees one or the other, whole."""
    source, store = tmp_path / "media.mp4", Store(str(tmp_path / "root"))
    source.write_bytes(b"bytes")
    store.put("data/a.mp4", b"dam")
    store.put_finished({"data/a.mp4": source})
    assert store.get("data/a.mp4") == b"bytes"
    assert list((tmp_path / "root" / "data").iterdir()) == [tmp_path / "root" / "data" / "a.mp4"], "and no draft"


def test_a_finished_file_of_another_disk_is_copied(tmp_path, monkeypatch):
    """P1: where a file cannot have a second name, the object is a copy of it."""
    source, store = tmp_path / "media.mp4", Store(str(tmp_path / "root"))
    source.write_bytes(b"bytes")
    store.put_finished({"data/linked.mp4": source})
    assert source.stat().st_nlink == 2

    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    store.put_finished({"data/copied.mp4": source})
    assert source.stat().st_nlink == 2, "but not a third name"
    assert store.get("data/linked.mp4") == store.get("data/copied.mp4") == b"bytes"


def test_empty_objects_exist(any_store):
    """Design 4: `_SUCCESS` is empty and still there."""
    any_store.put("_SUCCESS", b"")
    assert any_store.exists("_SUCCESS")
    assert any_store.get("_SUCCESS") == b""


def test_a_missing_object(any_store):
    """Reading says FileNotFoundError, deleting is fine, listing is empty."""
    with pytest.raises(FileNotFoundError):
        any_store.get("run.json")
    assert not any_store.exists("run.json")
    assert list(any_store.list("commits/shard-00000/")) == []
    any_store.delete("run.json")


def test_delete_removes(any_store):
    """A deleted object may be created anew."""
    any_store.put("a/b", b"1")
    any_store.delete("a/b")
    assert not any_store.exists("a/b")
    assert any_store.put_new("a/b", b"2")


def test_a_folder_is_no_object(any_store):
    """Otherwise a shard with records would hide a sample named like its folder."""
    any_store.put("a/b", b"1")
    assert not any_store.exists("a")


def test_list_is_recursive_relative_and_sorted(any_store):
    """Keys come back as they were written, and only those below the folder itself, not of its namesakes."""
    keys = ["commits/shard-00001/b.json", "commits/shard-00001/a.x.json", "commits/shard-00001/deep/er/c.json"]
    for key in [*keys, "commits/shard-000010/d.json", "run.json"]:
        any_store.put(key, b"x")
    assert list(any_store.list("commits/shard-00001/")) == sorted(keys)
    assert list(any_store.list("commits/shard-00001")) == sorted(keys)


def test_nothing_is_answered_from_a_cache(any_store):
    """P2: what another worker wrote or removed since the last look is seen."""
    other = pickle.loads(pickle.dumps(any_store))
    assert list(any_store.list("commits/")) == []
    other.put("commits/a.json", b"1")
    assert list(any_store.list("commits/")) == ["commits/a.json"]
    assert any_store.exists("commits/a.json")
    other.delete("commits/a.json")
    assert not any_store.exists("commits/a.json")
    assert list(any_store.list("commits/")) == []


def test_another_machine_writes_to_s3(s3_store):
    """P2: the same, past every cache of this process."""
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
    """Keys are made from ids that users choose; none may reach another place."""
    with pytest.raises(ValueError, match="not a key"):
        any_store.put(key, b"x")
    with pytest.raises(ValueError, match="not a key"):
        any_store.exists(key)


@settings(deadline=None)
@given(key=st.text(alphabet=st.sampled_from("ab./\\\0 ~"), max_size=12))
def test_a_key_stays_below_the_root(key):
    """The same for any key: refused, or below the root and not the root itself."""
    try:
        checked = store._checked(key)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/root", checked)) == f"/root/{checked}"


def test_a_local_root_is_absolute(tmp_path, monkeypatch):
    """Workers have another working directory than the driver."""
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
    """Credentials come from each machine's own environment and never travel."""
    s3_store.put("a", b"1")
    assert pickle.loads(pickle.dumps(s3_store)).__dict__ == Store(s3_store.url).__dict__


# Races and crashes ----------------------------------------------------------------------------------------------------


def test_of_many_threads_one_creates(any_store):
    """P1: of any number of writers at one moment exactly one wins, and its bytes are what is there."""
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


def test_nothing_changes_under_a_listing_of_memory(monkeypatch, tmp_path):
    """P2: fsspec's memory breaks off a walk when a key comes or goes meanwhile; shards are looked up beside commits."""
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


def test_threads_take_turns_where_no_server_judges(monkeypatch):
    """P1: without a conditional write the look and the write are two acts, and no thread may come between."""
    exists = MemoryFileSystem.exists

    def slow_exists(self, path, **options):  # the driver's own look, just before it writes
        found = exists(self, path, **options)
        time.sleep(0.005)
        return found

    monkeypatch.setattr(MemoryFileSystem, "exists", slow_exists)
    store = Store("memory://turns")
    assert at_once(8, lambda i: store.put_new("a/b", b"%d" % i)).count(True) == 1


def python(script: str, *args: object) -> subprocess.Popen:
    """A fresh interpreter that has `Store` at hand."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys\nfrom hv_batch.job.storage.store import Store\n{script}", *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_of_many_processes_one_creates(tmp_path):
    """P1: the same for processes on a local disk, key by key."""
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
    """P2: whenever a writer is killed, readers see whole objects or none."""
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


def test_list_hides_what_a_killed_writer_left(tmp_path):
    """P2: a draft is no object."""
    store = Store(str(tmp_path))
    store.put("commits/a.json", b"1")
    (tmp_path / "commits" / ".draft-0123").write_bytes(b"hal")
    assert list(store.list("commits/")) == ["commits/a.json"]


def test_a_file_comes_back_as_it_went(any_store, tmp_path):
    """P1: whole, and not at all where there is none."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 2048)
    any_store.put_file("a/b.mp4", source)
    any_store.get_file("a/b.mp4", target)
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        any_store.get_file("a/c.mp4", target)


@pytest.mark.parametrize("act", ["put_new", "put", "put_file"])
def test_a_full_disk_surfaces_and_leaves_nothing(tmp_path, monkeypatch, act):
    """Design 6: a full disk is FATAL, so its errno must arrive; what was half written is gone."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def free_space(_):
        assert files_below(tmp_path / "root") == [], "what was half written would count as taken"
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


def test_a_disk_that_cannot_flush_folders_is_used_all_the_same(tmp_path, monkeypatch):
    """Design 4: CIFS and some FUSE mounts keep folders themselves and refuse the call."""
    fsync = os.fsync

    def picky(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", picky)
    store = Store(str(tmp_path))
    assert store.put_new("a/b", b"1")
    assert store.get("a/b") == b"1"


def test_the_names_of_new_folders_are_flushed_before_what_is_in_them(tmp_path, monkeypatch):
    """P1: a power cut takes no record away that was said to be there, nor the first one of a shard with its folder."""
    flushed = []
    flush = local_disk._flush
    monkeypatch.setattr(
        local_disk, "_flush", lambda path: (flushed.append(os.path.relpath(path, tmp_path)), flush(path))
    )
    store = Store(str(tmp_path / "root"))
    assert store.put_new("commits/shard-00000/a.json", b"{}")
    folders = [".", "root", "root/commits", "root/commits/shard-00000"]
    assert [path for path in flushed if "draft" not in path] == folders
    flushed.clear()
    assert store.put_new("commits/shard-00000/b.json", b"{}")
    assert [path for path in flushed if "draft" not in path] == folders[-1:]


def test_a_link_whose_answer_was_lost_is_ours(tmp_path, monkeypatch):
    """P1 on NFS: a repeated link reports our own success as a conflict."""
    link = os.link

    def link_twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    store = Store(str(tmp_path))
    assert store.put_new("a", b"1")
    assert not store.put_new("a", b"2")


# Probe ----------------------------------------------------------------------------------------------------------------


def test_probe_knows_the_stores(any_store):
    """P1: each kind of store says how it keeps the promise; only the one that cannot comes with a warning."""
    expected = {"s3": PutIfAbsent.CONDITIONAL_PUT, "memory": PutIfAbsent.UNSAFE}
    claim = any_store.probe()
    assert claim is expected.get(any_store.url.split(":")[0], PutIfAbsent.EXCLUSIVE_LINK)
    assert (claim.warning is None) == (claim is not PutIfAbsent.UNSAFE)


def test_probe_leaves_nothing(tmp_path, s3_store):
    """An output root that was only looked at stays empty."""
    Store(str(tmp_path / "root")).probe()
    assert files_below(tmp_path) == []
    s3_store.probe()
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=s3_store.url.split("/")[2])


def test_probe_finds_a_server_that_ignores_the_condition(s3, s3_store):
    """P1: some S3-compatible servers accept every PUT; the user is told."""
    s3.ignores_conditions = True
    assert s3_store.probe() is PutIfAbsent.UNSAFE
    assert s3_store.put_new("a", b"1")
    assert not s3_store.put_new("a", b"2"), "the look beforehand still helps one run at a time"


def test_probe_finds_a_disk_without_hard_links(tmp_path, monkeypatch):
    """P1: FAT and many FUSE mounts have none; the root still works, with a warning."""

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = Store(str(tmp_path / "root"))
    assert store.probe() is PutIfAbsent.UNSAFE
    assert store.put_new("a", b"1")
    assert not store.put_new("a", b"2")
    assert store.get("a") == b"1"
    assert files_below(tmp_path / "root") == ["a"]


def test_probe_refuses_what_cannot_be_written(tmp_path, s3):
    """P6: an unwritable root is found at the start, and the message names it."""
    (tmp_path / "file").write_bytes(b"")
    for url in [str(tmp_path / "file" / "root"), "/proc/nowhere/root", "s3://no-such-bucket/root"]:
        with pytest.raises(UserError, match=r"cannot be written|lies below one") as caught:
            Store(url).probe()
        assert url in str(caught.value)


@pytest.mark.parametrize("url", ["nosuch://bucket/root", "hdfs://host/root"])
def test_probe_refuses_what_cannot_be_opened(url):
    """P6: an unknown protocol, or one whose package is not installed."""
    with pytest.raises(UserError, match=url):
        Store(url).probe()


# Large objects --------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A file of three parts, of the smallest size that S3 takes."""
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * 2**20)
    path = tmp_path / "large.mp4"
    path.write_bytes(os.urandom(2**20) * 11)
    return path


def test_large_objects_go_in_parts(s3, s3_store, large):
    """Design 4: what is too large for one request; a part that fails is repeated by itself."""
    s3.faults, s3.methods = [503], {"PUT"}
    s3_store.put_file("data/a.mp4", large)
    bucket = s3_store.url.split("/")[2]
    found = boto3.client("s3").head_object(Bucket=bucket, Key="some/root/data/a.mp4")
    assert found["ETag"].endswith('-3"'), "S3 tells the number of parts in the tag"
    assert s3_store.get("data/a.mp4") == large.read_bytes()
    assert s3.spoilt == 1


def test_an_upload_in_parts_that_fails_leaves_nothing(s3, s3_store, large):
    """P1: no object, and no parts that are paid for and never seen."""
    s3.faults, s3.methods = [400] * 3, {"PUT"}
    with pytest.raises(OSError, match="spoilt"):
        s3_store.put_file("data/a.mp4", large)
    assert not s3_store.exists("data/a.mp4")
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=s3_store.url.split("/")[2])


# Credentials ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".aws/config", ".config/fsspec/conf.json"])
def test_credentials_come_from_the_usual_places(s3, s3_store, tmp_path, place):
    """Design 4: what the user's other tools find, ours find, the environment first of all (as in all other tests here);
    nothing of it passes through config or URL.
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
    """Design 4: throttling, a server's hiccup and S3's answer to two conditional PUTs at once all pass."""
    s3.faults = [status] * 3
    assert s3_store.put_new("a", b"1")
    assert s3.spoilt == 3
    s3.faults = [status] * 3
    assert s3_store.get("a") == b"1"


def test_a_store_that_stays_away_is_named_as_such(s3, s3_store):
    """P5: after four tries it is a fault of the infrastructure, with a type that says so and survives pickling."""
    s3.faults = [503] * 100
    with pytest.raises(StorageUnavailableError, match=s3_store.url) as caught:
        s3_store.put("a", b"1")
    assert s3.spoilt == 4
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), ConnectionError)


def test_refused_credentials_are_not_retried(s3, s3_store):
    """Design 6: a permission error stops the run at once; its errno tells it from a sample's own error."""
    s3.faults = [403] * 100
    with pytest.raises(PermissionError) as caught:
        s3_store.put("a", b"1")
    assert caught.value.errno == errno.EACCES
    assert s3.spoilt == 1


def test_a_server_that_is_full_is_a_full_disk(s3, s3_store):
    """Design 6: FATAL, as on a local disk."""
    s3.faults = [507] * 100
    with pytest.raises(OSError, match=r"12,345 bytes are needed: .*507") as caught:
        s3_store.put("a", bytes(12_345))
    assert caught.value.errno == errno.ENOSPC


def test_an_error_never_looks_like_a_missing_object(s3, s3_store):
    """P2: if `exists` answered False to an outage, a resume would render what is committed."""
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
