"""The probe of an output root: how it implements `put_new`, and roots that cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import boto3
import pytest

from hv_batch.job.storage.store import PutIfAbsent, Store
from hv_batch.protocol import UserError


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


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
