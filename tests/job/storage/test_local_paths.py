"""Nothing below a local output root is reached through a link, and only regular files are objects."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import contextmanager

import pytest

from hv_batch.job.inspection.garbage import find_garbage, remove
from hv_batch.job.storage import local_paths
from hv_batch.job.storage.errors import StorageBrokenError, StorageError
from hv_batch.job.storage.store import Store
from tests.support.small_runs import run_small, some_samples

ACTS = {
    "put": lambda store, folder: store.put("data/inside/a", b"new"),
    "put_new": lambda store, folder: store.put_new("data/inside/b", b"new"),
    "put_file": lambda store, folder: store.put_file("data/inside/a", folder / "file"),
    "put_finished": lambda store, folder: store.put_finished({"data/inside/a": folder / "file"}),
    "get": lambda store, folder: store.get("data/inside/a"),
    "get_file": lambda store, folder: store.get_file("data/inside/a", folder / "copy"),
    "exists": lambda store, folder: store.exists("data/inside/a"),
    "size": lambda store, folder: store.size("data/inside/a"),
    "list": lambda store, folder: list(store.list("data/inside")),
    "list_sizes": lambda store, folder: store.list_sizes("data/inside/deeper"),
    "modified": lambda store, folder: store.modified("data/inside/a"),
    "delete": lambda store, folder: store.delete("data/inside/a"),
}


@pytest.fixture
def outside(tmp_path):
    """A folder of the operator with a model in it."""
    folder = tmp_path / "models"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a").write_bytes(b"weights")
    (folder / "deeper" / "a").write_bytes(b"weights")
    (tmp_path / "file").write_bytes(b"new")
    return folder


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def at_most(seconds):
    """Ends the test if something blocks."""

    def expire(*_):
        raise AssertionError("it blocks")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("act", ACTS)
def test_no_operation_follows_a_linked_folder(tmp_path, outside, act):
    """Whoever can write to a root must not make us read, write or delete outside it."""
    root = tmp_path / "root"
    (root / "data").mkdir(parents=True)
    (root / "data" / "inside").symlink_to(outside)
    before = files_of(outside)
    with pytest.raises(StorageBrokenError, match=r"data/inside is a symbolic link.*only the root itself"):
        ACTS[act](Store(str(root)), tmp_path)
    assert files_of(outside) == before


@pytest.mark.parametrize("act", ["get", "get_file", "exists"])
def test_no_operation_reads_a_linked_file(tmp_path, outside, act):
    """The same for a link in place of an object."""
    root = tmp_path / "root"
    (root / "data" / "inside").mkdir(parents=True)
    (root / "data" / "inside" / "a").symlink_to(outside / "a")
    with pytest.raises(StorageBrokenError, match=r"data/inside/a is a symbolic link"):
        ACTS[act](Store(str(root)), tmp_path)


@pytest.mark.parametrize("act", ["put", "put_file", "put_finished", "delete"])
def test_a_write_replaces_a_linked_file_and_not_its_target(tmp_path, outside, act):
    """Only the name in the root changes."""
    root = tmp_path / "root"
    (root / "data" / "inside").mkdir(parents=True)
    link = root / "data" / "inside" / "a"
    link.symlink_to(outside / "a")
    before = files_of(outside)
    ACTS[act](Store(str(root)), tmp_path)
    assert not link.is_symlink()
    assert link.exists() == (act != "delete")
    assert files_of(outside) == before


def test_links_are_listed_and_not_entered(tmp_path, outside):
    """A check finds a foreign link, and finds nothing of what is behind it."""
    root = tmp_path / "root"
    store = Store(str(root))
    store.put("data/own", b"1")
    (root / "data" / "folder").symlink_to(outside)
    (root / "data" / "file").symlink_to(outside / "a")
    assert list(store.list("data")) == ["data/file", "data/folder", "data/own"]


def test_the_root_itself_may_be_a_link(tmp_path, outside):
    """Operators name a root by a link to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    store = Store(str(tmp_path / "root"))
    assert store.put_new("a/b", b"1")
    assert list(store.list("a")) == ["a/b"]
    assert (tmp_path / "disk" / "a" / "b").read_bytes() == b"1"


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_folder(path):
    path.mkdir()


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_folder])
@pytest.mark.parametrize("act", ["get", "get_file", "put_new", "list"])
def test_what_is_no_file_does_not_block(tmp_path, outside, act, make, monkeypatch):
    """A FIFO, a socket or a folder in place of an object is an error at once, and only if it is read."""
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    root = tmp_path / "root"
    (root / "data" / "inside").mkdir(parents=True)
    for name in "ab":
        make(os.path.relpath(root / "data" / "inside" / name) if make is make_socket else root / "data/inside" / name)
    with at_most(20):
        if act == "list":
            expected = [] if make is make_folder else ["data/inside/a", "data/inside/b"]
            assert list(Store(str(root)).list("data/inside")) == expected
        elif act == "put_new" and make is make_folder:
            assert not ACTS[act](Store(str(root)), tmp_path), "the name is taken"
        else:
            with pytest.raises(StorageBrokenError, match="but the name of an object"):
                ACTS[act](Store(str(root)), tmp_path)


def test_collecting_garbage_deletes_nothing_outside_the_root(tmp_path, outside):
    """`gc --yes` has deleted a model through a link to its folder."""
    root = tmp_path / "root"
    store = Store(str(root))
    run_small(store, some_samples(4))
    (outside / "s000-01234567.mp4").write_bytes(b"a model with the name of a video")
    before = files_of(outside)
    (root / "latents").mkdir(exist_ok=True)
    for name in ("steps", "posters", "quarantine"):
        (root / name).mkdir(exist_ok=True)
    target = root / "data" / "shard-00000"
    target.rename(tmp_path / "moved")
    target.symlink_to(outside)
    with pytest.raises(StorageError, match="symbolic link"):
        collect_garbage(store)
    assert files_of(outside) == before


def collect_garbage(store):
    for garbage in find_garbage(store, older_than=2**33):
        remove(store, garbage)


def test_a_folder_that_becomes_a_link_during_an_operation_is_not_followed(tmp_path, outside, monkeypatch):
    """The check and the use are one step: each folder is opened relative to the one before it."""
    root = tmp_path / "root"
    store = Store(str(root))
    store.put("data/inside/a", b"own")
    opened = os.open

    def swap(path, flags, *rest, dir_fd=None):
        if path == "inside" and not (root / "data" / "inside").is_symlink():
            (root / "data" / "inside").rename(tmp_path / "moved")
            (root / "data" / "inside").symlink_to(outside)
        return opened(path, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(local_paths.os, "open", swap)
    with pytest.raises(StorageBrokenError, match="symbolic link"):
        store.get("data/inside/a")


def test_the_time_of_a_link_is_its_own(tmp_path, outside):
    """`gc` decides by the age of the name in the root."""
    root = tmp_path / "root"
    store = Store(str(root))
    store.put("data/own", b"1")
    (root / "data" / "old").symlink_to(outside / "a")
    os.utime(outside / "a", (1, 1))
    assert store.modified("data/old") > time.time() - 3600
