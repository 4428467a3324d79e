"""Finds and removes what a killed writer leaves in an output root: hidden drafts, probes and unfinished uploads.

These are never read, but they take space. S3 bills the parts of an unfinished multipart upload and shows them in no
object listing. Google Cloud Storage and Azure delete theirs after a week and do not list them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hv_batch.job.storage.local_disk import LocalDisk
from hv_batch.job.storage.object_store import Remote

HIDDEN = (".draft-", ".probe-")
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
        return list(_drafts(backend.root))
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


def _drafts(root: str) -> Iterator[Leftover]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            # A running writer may rename its drafts during the walk.
            if name.startswith(HIDDEN) and Path(path).exists():
                yield Leftover(os.path.relpath(path, root), os.path.getmtime(path))


def _probes(backend: Remote) -> Iterator[Leftover]:
    backend.fs.invalidate_cache()
    if not backend.fs.exists(backend.root):
        return
    for path in backend.fs.ls(backend.root, detail=False):
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
