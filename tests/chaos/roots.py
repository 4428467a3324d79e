"""Output roots that fail: a bucket behind a faulty endpoint, and a folder on a disk that can fill up."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3

from tests.chaos.faults import small_disks
from tests.chaos.faults.storage_faults import FaultyS3
from tests.chaos.schedule import FORGETTABLE, Event
from tests.support.s3_server import S3Server

BUCKET = "chaos"
DISK_BYTES = 24 * 2**20


class Bucket:
    """An output root in an S3 bucket."""

    kind = "s3"

    def __init__(self, name: str, server: FaultyS3, quiet: S3Server) -> None:
        """`quiet` is an endpoint of the same bucket without faults: moto holds the objects for the whole process."""
        self.url = f"s3://{BUCKET}/{name}"
        self.layer = server.layer
        self._prefix = f"{name}/"
        self._client: Any = boto3.client("s3", endpoint_url=quiet.endpoint)
        with suppress(self._client.exceptions.BucketAlreadyOwnedByYou, self._client.exceptions.BucketAlreadyExists):
            self._client.create_bucket(Bucket=BUCKET)

    def begin_fault(self, event: Event) -> bool:
        fault = event.kind.removeprefix("s3-")
        self.layer.switch_on(fault, event.pick(FORGETTABLE) if fault == "forgotten" else "")
        return True

    def end_fault(self, event: Event) -> None:
        if (fault := event.kind.removeprefix("s3-")) != "forgotten":  # which ends when it has forgotten an upload
            self.layer.switch_off(fault)

    def end_faults(self) -> None:
        self.layer.switch_all_off()

    def keys(self, folder: str = "") -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self._prefix + folder)
        return [found["Key"].removeprefix(self._prefix) for page in pages for found in page.get("Contents", [])]

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=self._prefix + key)

    def unfinished_uploads(self) -> int:
        found = self._client.list_multipart_uploads(Bucket=BUCKET, Prefix=self._prefix)
        return len(found.get("Uploads", ()))

    def download(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        for key in self.keys():
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._client.get_object(Bucket=BUCKET, Key=self._prefix + key)["Body"].read())
        return folder

    def close(self) -> None:
        self.layer.switch_all_off()
        for key in self.keys():
            self.delete(key)


class SmallDisk:
    """An output root on a file system of its own, if this process may mount one."""

    kind = "disk"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.url = str(folder / "out")
        self._folder = folder
        self._mounted = small_disks.mount(folder, DISK_BYTES)

    def begin_fault(self, event: Event) -> bool:
        """Fill the disk but for a few bytes. Without a file system of its own nothing is done."""
        return self._mounted and small_disks.fill(self._folder)

    def end_fault(self, event: Event) -> None:
        small_disks.empty(self._folder)

    def end_faults(self) -> None:
        small_disks.empty(self._folder)

    def keys(self, folder: str = "") -> list[str]:
        root = Path(self.url)
        return sorted(str(path.relative_to(root)) for path in (root / folder).rglob("*") if path.is_file())

    def delete(self, key: str) -> None:
        (Path(self.url) / key).unlink(missing_ok=True)

    def unfinished_uploads(self) -> int:
        return 0

    def download(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.url, folder))

    def close(self) -> None:
        if self._mounted:
            small_disks.unmount(self._folder)
            self._mounted = False
