"""Finds and removes what a killed writer leaves in an output root: hidden drafts, probes and unfinished uploads.

These are never read, but they take space. S3 bills the parts of an unfinished multipart upload and shows them in no
object listing. Google Cloud Storage and Azure delete theirs after a week and do not list them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hv_batch.job.storage import local_paths
from hv_batch.job.storage.local_disk import LocalDisk
from hv_batch.job.storage.object_store import Remote

DRAFT = ".draft-"
HIDDEN = (DRAFT, ".probe-")
S3_PROTOCOLS = frozenset({"s3", "s3a"})


@dataclass(frozen=True, slots=True)
class Leftover:
    """One incomplete write.

    `name` is its path below the root, `modified` the time of its last write in seconds since 1970, and `upload` the id
    of an unfinished multipart upload, None for a file.
    """

    name: str
    modified: float
    upload: str | None = None


def find_leftovers(backend: LocalDisk | Remote) -> list[Leftover]:
    if isinstance(backend, LocalDisk):
        return _drafts(backend.root)
    return [*_probes(backend), *_uploads(backend)]


def remove_leftover(backend: LocalDisk | Remote, leftover: Leftover) -> None:
    """Remove it. Does nothing if it no longer exists."""
    if leftover.upload is None:
        backend.delete(leftover.name)
        return
    assert isinstance(backend, Remote)
    bucket, prefix = _bucket_and_prefix(backend)
    try:
        backend.fs.call_s3(
            "abort_multipart_upload", Bucket=bucket, Key=f"{prefix}{leftover.name}", UploadId=leftover.upload
        )
    except FileNotFoundError:  # completed or aborted meanwhile
        return


def remove_drafts(backend: LocalDisk | Remote, folder: str) -> None:
    """Remove the drafts directly in `folder`. Only a local disk has drafts."""
    if not isinstance(backend, LocalDisk):
        return
    with contextlib.suppress(FileNotFoundError), local_paths.opened_folder(backend.root, folder) as descriptor:
        for name in os.listdir(descriptor):
            if name.startswith(DRAFT):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=descriptor)


def _drafts(root: str) -> list[Leftover]:
    found: list[Leftover] = []

    def visit(name: str, read_status: Callable[[], os.stat_result]) -> None:
        if name.rpartition("/")[2].startswith(HIDDEN):
            found.append(Leftover(name, read_status().st_mtime))  # a running writer may rename it during the walk

    with contextlib.suppress(FileNotFoundError):
        local_paths.walk(root, "", visit)
    return found


def _probes(backend: Remote) -> Iterator[Leftover]:
    backend.fs.invalidate_cache()
    try:
        paths = backend.fs.ls(backend.root, detail=False)
    except FileNotFoundError:
        return
    for path in paths:
        name = path.rsplit("/", 1)[-1]
        if name.startswith(HIDDEN):
            yield Leftover(name, backend.modified(name))


def _uploads(backend: Remote) -> Iterator[Leftover]:
    protocols = backend.fs.protocol if isinstance(backend.fs.protocol, tuple) else (backend.fs.protocol,)
    if not S3_PROTOCOLS.intersection(protocols):
        return
    bucket, prefix = _bucket_and_prefix(backend)
    marker: dict[str, str] = {}
    while True:
        page = backend.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        for upload in page.get("Uploads", []):
            name = upload["Key"].removeprefix(prefix)
            yield Leftover(name, upload["Initiated"].timestamp(), upload["UploadId"])
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _bucket_and_prefix(backend: Remote) -> tuple[str, str]:
    bucket, _, inside = backend.root.partition("/")
    return bucket, f"{inside.rstrip('/')}/" if inside else ""
