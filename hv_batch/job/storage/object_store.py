"""An output root on any other fsspec file system: object stores, and the memory of this process."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from hv_batch.job.redaction import public_url, refuse_credentials
from hv_batch.job.storage.driver_retries import disable_retries
from hv_batch.job.storage.errors import Kind, error_codes, http_status, kind_of
from hv_batch.job.storage.put_if_absent import PutIfAbsent
from hv_batch.protocol import UserError

# Stores whose fsspec driver implements mode="create" as a conditional write that the server checks.
CONDITIONAL_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})

# s3fs uploads a large object in parts of this size: a worker holds at most 64 MiB, and a dropped connection repeats one
# part. Most videos are smaller than two parts and are uploaded in one request.
PART_BYTES = 16 * 2**20
PARTS_AT_ONCE = 4
MAX_PARTS = 10_000  # of one S3 object

# If no server checks the condition of a write, this lock at least serializes the threads of one process. fsspec's
# memory file system also needs it for every operation that changes what a listing iterates over.
_LOCK = threading.RLock()


class Remote:
    """An fsspec file system that is not the local disk."""

    def __init__(self, url: str, role: str) -> None:
        refuse_credentials(role, url)
        protocol = get_protocol(url)
        self.is_conditional = protocol in CONDITIONAL_PROTOCOLS
        self.is_s3 = protocol in ("s3", "s3a")
        self.put_if_absent = PutIfAbsent.CONDITIONAL_PUT if self.is_conditional else PutIfAbsent.UNSAFE
        # Other machines change the listings, so they must not be cached. Drivers of other protocols may not accept the
        # option; for them `_forget_listings` clears the cache before every query.
        options: dict[str, Any] = {"use_listings_cache": False} if self.is_conditional else {}
        try:
            self.fs, self.root = url_to_fs(url, **options)
            disable_retries(self.fs)
            if self.is_s3:  # otherwise s3fs sends a HEAD request before each GET, to read large objects in parts
                self.fs.max_concurrency = 1
        except (ImportError, ValueError) as error:
            raise UserError(
                f"The {role} {public_url(url)} cannot be opened: {error}. Local paths and every URL that fsspec knows "
                "are allowed; s3://, gs:// and az:// need the extra of that store: pip install 'hv_batch[s3]', [gcs] "
                "or [azure]."
            ) from error
        self.create_lock: Any = contextlib.nullcontext() if self.is_conditional else _LOCK
        self.memory_lock: Any = _LOCK if protocol == "memory" else contextlib.nullcontext()

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self.create_lock:
            try:
                if not self.is_conditional:
                    self._make_folder(path)
                    if self.exists(key):
                        return False
                self.fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # The error class differs between S3-compatible servers; the status is the same.
                if http_status(error) == 412:
                    return False
                raise
        return True

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self.memory_lock:
            self._make_folder(path)
            self.fs.pipe_file(path, data)

    def put_file(self, key: str, path: Path) -> None:
        target = self._path(key)
        options: dict[str, Any] = {}
        if self.is_s3:
            part_bytes = max(PART_BYTES, -(-path.stat().st_size // MAX_PARTS))
            options = {"chunksize": part_bytes, "max_concurrency": PARTS_AT_ONCE}
        with self.memory_lock:
            self._make_folder(target)
            self.fs.put_file(str(path), target, **options)

    def get(self, key: str, at_most: int) -> bytes:
        """The bytes of an object. Its size is that of what was uploaded, so it is not compared with `at_most`."""
        return bytes(self.fs.cat_file(self._path(key)))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self._path(key), start=start, end=end))

    def get_file(self, key: str, path: Path) -> None:
        self.fs.get_file(self._path(key), str(path))

    def exists(self, key: str) -> bool:
        self._forget_listings()
        # Not fs.exists: drivers return False for any error, and the sample would look as if it were not committed.
        try:
            return bool(self._info(key)["type"] == "file")
        except FileNotFoundError as error:
            self._raise_if_no_bucket(error)
            return False

    def size(self, key: str) -> int:
        self._forget_listings()
        return int(self._info(key)["size"])

    def list(self, prefix: str) -> list[str]:
        return list(self.list_sizes(prefix))

    def names(self, prefix: str) -> Sequence[str]:
        """The names directly below a folder. The marker of a folder has the path of the folder itself."""
        self._forget_listings()
        above = self._path(prefix)
        try:
            with self.memory_lock:
                paths = self.fs.ls(above, detail=False)
        except FileNotFoundError as error:
            self._raise_if_no_bucket(error)
            return []
        keys = (path.rstrip("/").removeprefix(self.root).lstrip("/") for path in paths)
        return [key.removeprefix(f"{prefix}/") for key in keys if key.startswith(f"{prefix}/")]

    def list_sizes(self, prefix: str) -> dict[str, int]:
        """The size of each object by its key.

        The markers that consoles create for empty folders are not objects: their names end with a slash, or some
        drivers list them as the folder itself.
        """
        self._forget_listings()
        # The generic walk skips folders that it cannot read unless on_error is "raise". The listings of object stores
        # raise in any case.
        options = {} if self.is_conditional else {"on_error": "raise"}
        try:
            with self.memory_lock:
                found = self.fs.find(self._path(prefix), detail=True, **options)
        except FileNotFoundError as error:
            self._raise_if_no_bucket(error)
            return {}
        sizes = {}
        for path, details in found.items():
            key = path.removeprefix(self.root).lstrip("/")
            if details["type"] == "file" and not key.endswith("/") and key.startswith(f"{prefix}/"):
                sizes[key] = int(details["size"] or 0)
        return sizes

    def modified(self, key: str) -> float:
        self._forget_listings()
        if self.is_s3:
            details = self._info(key)
            if details["type"] != "file":
                raise FileNotFoundError(errno.ENOENT, "a folder is not an object", key)
            return float(details["LastModified"].timestamp())
        return float(self.fs.modified(self._path(key)).timestamp())

    def delete(self, key: str) -> None:
        try:
            with self.memory_lock:
                self.fs.rm_file(self._path(key))
        except FileNotFoundError as error:
            self._raise_if_no_bucket(error)

    def _info(self, key: str) -> dict[str, Any]:
        path = self._path(key)
        try:
            details: dict[str, Any] = self.fs.info(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            # The reply to a HEAD request has no body, so S3 does not say why it refuses one. It does for a GET.
            if self.is_s3 and any(map(str.isdigit, error_codes(error))) and kind_of(error) is not Kind.TRANSIENT:
                self.fs.cat_file(path, start=0, end=1)
            raise
        return details

    def _raise_if_no_bucket(self, error: FileNotFoundError) -> None:
        """A missing bucket is not a missing object: everything would look as if it had to be rendered again."""
        if {"NoSuchBucket", "ContainerNotFound"}.intersection(error_codes(error)):
            raise error

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}"

    def _forget_listings(self) -> None:
        if not self.is_conditional:
            self.fs.invalidate_cache()

    def _make_folder(self, path: str) -> None:
        if not self.is_conditional:  # object stores have no folders, and s3fs would try to create a bucket
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
