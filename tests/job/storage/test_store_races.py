"""Concurrent and killed writers of a store, and disks that are full or lack an operation."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hv_batch.job import layout
from hv_batch.job.storage import store as store_module
from hv_batch.job.storage.store import Store
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
