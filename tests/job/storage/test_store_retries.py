"""Requests that fail: what is repeated, and which error remains."""

from __future__ import annotations

import errno
import os
import pickle

import pytest

from hv_batch.job.storage.store import StorageUnavailableError, Store


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
