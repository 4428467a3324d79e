"""An output root on any fsspec URL, with the few operations that the commit protocol needs.

Two kinds of writes guarantee atomicity:

- `put_new` creates an object only if its key is absent. Exactly one of several concurrent writers succeeds, and a
  reader sees a complete object or none (P1). Object stores do this with a conditional PUT. A local disk does it with a
  hidden draft that is hard-linked to its final name once it is complete; `open("x")` would expose a half-written file.
- `put` and `put_file` replace an object atomically.

The batched forms (`put_new_all`, `put_all`, `put_finished`) give the same guarantees for each object. If they return,
all objects are stored; if they raise, any of them may be. A local disk is flushed once for the batch, and an object
store receives many requests at once.

Transient errors are retried here and nowhere else. Errors that remain are FileNotFoundError, or a StorageError that
says whether the store is unavailable, refuses the request or is broken (see `errors`). Credentials come from the
default locations of each store's own tools, and are read again after the store has rejected them as expired. A `Store`
holds only its URL, so it can be pickled and sent to any worker.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from hv_batch.job.formatting import plural
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.errors import CHECKSUM_SETTING, REPEATED, Kind, StorageUnavailableError, kind_of, translate
from hv_batch.job.storage.incomplete_writes import Leftover, find_leftovers, remove_drafts, remove_leftover
from hv_batch.job.storage.local_disk import LocalDisk
from hv_batch.job.storage.local_paths import link_file
from hv_batch.job.storage.object_store import Remote
from hv_batch.job.storage.put_if_absent import PutIfAbsent
from hv_batch.job.thread_map import map_in_threads
from hv_batch.protocol import UserError

__all__ = ["Leftover", "PutIfAbsent", "StorageUnavailableError", "Store"]

# Errors of a hard link to another file system, on a file system without links, or to another user's file.
UNLINKABLE = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP})

A = TypeVar("A")
T = TypeVar("T")

# Pauses between four attempts: enough for a throttled prefix or a dropped connection. The scheduler handles longer
# outages, because it can run other work meanwhile.
PAUSES_S = (0.5, 1.0, 2.0)

MAX_BYTES = 4 << 30  # of an object that is read as a whole

# A store that does not answer takes up to 15 s for each attempt. A user should know what the command waits for; a log
# should not repeat it for every object.
NOTE_EVERY_S = 30.0

logger = logging.getLogger(__name__)
_noted_at = -NOTE_EVERY_S  # monotonic time of the last note of this process


class Store:
    """One output root. Keys are relative POSIX paths below the root.

    Every method raises ValueError if a key is not such a path, UserError if the URL cannot be opened at all, and
    otherwise a StorageError.
    """

    def __init__(self, url: str, role: str = "output root", stopped: threading.Event | None = None) -> None:
        """`role` names the root in messages. Once `stopped` is set, failed requests are not repeated.

        Raises UserError if the URL is blank: "" is the working directory.
        """
        if not url.strip():
            raise UserError(f"The {role} is blank. Give the path of a folder, or a URL such as s3://bucket/run.")
        is_local = get_protocol(url) in ("file", "local")
        # Workers have a different working directory than the driver, so a local root must be absolute.
        self.url: str = url_to_fs(url)[1] if is_local else url
        self._is_local = is_local
        self._role = role
        self._stopped = stopped

    def __reduce__(self) -> tuple[type[Store], tuple[str, str]]:
        return Store, (self.url, self._role)

    def __repr__(self) -> str:
        return f"Store({public_url(self.url)!r})"

    @property
    def readers(self) -> int:
        """The number of threads that read small objects.

        An object store needs about 30 ms for each GET, which 16 threads hide without overloading it. A disk has little
        latency to hide, and Python's interpreter lock limits the gain of more threads.
        """
        return 4 if self._is_local else 16

    def each(self, function: Callable[[A], T], items: Iterable[A]) -> list[T]:
        """`function(item)` for each item, where `function` makes a small request to this store.

        Requests to a remote store run in parallel. No call is running after `each` returns or raises.
        """
        items = list(items)
        if self._is_local or len(items) < 2:
            return [function(item) for item in items]
        return list(map_in_threads(function, items, self.readers))

    @cached_property
    def _backend(self) -> LocalDisk | Remote:
        return LocalDisk(self.url) if self._is_local else Remote(self.url, self._role)

    def put_new(self, key: str, data: bytes) -> bool:
        """Create `key` with `data` unless it exists. Returns whether this call created it.

        It may also return False after a successful write whose acknowledgement was lost. A caller that must distinguish
        the two compares the stored bytes.
        """
        return self.put_new_all({key: data})[0]

    def put_new_all(self, objects: Mapping[str, bytes]) -> list[bool]:
        # The check beforehand saves the upload in the common case. If a server ignores the condition of the write that
        # follows, the check also makes the race less likely.
        data = {_checked(key): content for key, content in objects.items()}
        if not self._is_local:
            return self.each(lambda key: not self.exists(key) and self._create(key, data[key]), data)

        def create(backend: LocalDisk) -> list[bool]:
            absent = {key: content for key, content in data.items() if not backend.exists(key)}
            created = dict(zip(absent, backend.create(absent), strict=True))
            return [created.get(key, False) for key in data]

        return self._write(create, sum(map(len, data.values())))

    def _create(self, key: str, data: bytes) -> bool:
        if self._is_local:
            return self._write(lambda backend: backend.create({key: data})[0], len(data))
        return self._write(lambda backend: backend.create(key, data), len(data))

    def put(self, key: str, data: bytes) -> None:
        self.put_all({key: data})

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        data = {_checked(key): content for key, content in objects.items()}
        if self._is_local:
            self._write(lambda backend: backend.put(data), sum(map(len, data.values())))
        else:
            self.each(lambda key: self._write(lambda backend: backend.put(key, data[key]), len(data[key])), data)

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file of any size. The key should hold a hash of the file, so that a repeated upload is harmless."""
        target = _checked(key)
        self._write(lambda backend: backend.put_file(target, path), path.stat().st_size)

    def put_finished(self, files: Mapping[str, Path]) -> None:
        """As `put_file`, for files that are no longer written to: a local disk may hard-link them and not copy."""
        paths = {_checked(key): path for key, path in files.items()}
        if self._is_local:
            num_bytes = sum(path.stat().st_size for path in paths.values())
            self._write(lambda backend: backend.put_finished(paths), num_bytes)
        else:
            self.each(lambda key: self.put_file(key, paths[key]), paths)

    def get(self, key: str, at_most: int = MAX_BYTES) -> bytes:
        """The object's bytes. Raises FileNotFoundError.

        A local file of more than `at_most` bytes is not read, and raises StorageBrokenError.
        """
        path = _checked(key)
        return self._retry(lambda backend: backend.get(path, at_most))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """The bytes `start` to `end` (exclusive) of the object; fewer if it is shorter. Raises FileNotFoundError."""
        path = _checked(key)
        return self._retry(lambda backend: backend.get_range(path, start, end))

    def get_file(self, key: str, path: Path) -> None:
        """Download an object of any size. Raises FileNotFoundError."""
        source = _checked(key)
        self._retry(lambda backend: backend.get_file(source, path))

    @property
    def folder(self) -> Path | None:
        """The folder of a local root; None for any other store."""
        return Path(self.url) if self._is_local else None

    def link_file(self, key: str, path: Path) -> bool:
        """Make `path` a hard link to the object. Returns False if that is impossible here.

        Raises FileNotFoundError if there is no such object.
        """
        source = _checked(key)
        if not self._is_local:
            return False
        try:
            link_file(self.url, source, str(path.absolute()))
        except OSError as error:
            if error.errno in UNLINKABLE:
                return False
            raise translate(error, self.url) from error
        return True

    def exists(self, key: str) -> bool:
        path = _checked(key)
        return self._retry(lambda backend: backend.exists(path))

    def list(self, prefix: str) -> Iterator[str]:
        """Yields the keys below `prefix` (a folder, as "commits/shard-00017/"), recursively and sorted; none if absent.

        The result never comes from a cache. The whole listing is held in memory, so callers list one shard at a time
        (P7).
        """
        path = _checked(prefix.rstrip("/"))
        yield from filter(_is_visible, sorted(self._retry(lambda backend: backend.list(path))))

    def names(self, prefix: str) -> frozenset[str]:
        """The names of the objects and folders directly below the folder `prefix`; none if it is absent.

        One request for a thousand names, however much lies below them. The result never comes from a cache.
        """
        path = _checked(prefix.rstrip("/"))
        return frozenset(filter(_is_visible, self._retry(lambda backend: backend.names(path))))

    def list_sizes(self, prefix: str) -> dict[str, int]:
        """As `list`, with the size of each object in bytes."""
        path = _checked(prefix.rstrip("/"))
        found = self._retry(lambda backend: backend.list_sizes(path))
        return {key: found[key] for key in sorted(found) if _is_visible(key)}

    def size(self, key: str) -> int:
        """The size of the object in bytes. Raises FileNotFoundError."""
        path = _checked(key)
        return self._retry(lambda backend: backend.size(path))

    def modified(self, key: str) -> float:
        """The time of the last write in seconds since 1970, by the store's clock. Raises FileNotFoundError."""
        path = _checked(key)
        return self._retry(lambda backend: backend.modified(path))

    def leftovers(self) -> Sequence[Leftover]:
        """Incomplete writes of killed writers, which no listing shows: drafts, probes and unfinished uploads."""
        return self._retry(find_leftovers)

    def remove_leftover(self, leftover: Leftover) -> None:
        self._retry(lambda backend: remove_leftover(backend, leftover))

    def remove_drafts(self, folders: Iterable[str]) -> None:
        """Remove the drafts directly in these folders ("" for the root). No process may be writing to them."""
        for folder in folders:
            name = _checked(folder.rstrip("/")) if folder else ""
            self._retry(partial(remove_drafts, folder=name))

    def delete(self, key: str) -> None:
        """Remove the object. Does nothing if it does not exist."""
        path = _checked(key)
        self._retry(lambda backend: backend.delete(path))

    def probe(self) -> PutIfAbsent:
        """Write and remove a test object, to find out how the root implements `put_new`.

        A local folder that this creates is removed again, so that a run that is refused leaves nothing.
        Raises UserError if the root cannot be written.
        """
        key = f".probe-{uuid.uuid4().hex}"
        is_new = self._is_local and not os.path.lexists(self.url)
        try:
            created = self._create(key, b"first")
            created_again = self._create(key, b"second")
            data = self.get(key)
            self.delete(key)
            if is_new:
                with contextlib.suppress(OSError):  # another writer has used the folder meanwhile
                    os.rmdir(self.url)
        except UserError:
            raise
        except Exception as error:  # every driver has its own error classes; the remedy is the same
            if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTDIR):
                raise UserError(
                    f"The {self._role} {public_url(self.url)} is a file, or lies below one ({error}). Choose a folder."
                ) from error
            raise UserError(
                f"The {self._role} {public_url(self.url)} cannot be written: {type(error).__name__}: {error}. Check "
                "that the bucket or folder exists, that this machine has credentials for it, and that they allow "
                "reading, writing, listing and deleting."
            ) from error
        if data not in (b"first", b"second"):
            raise UserError(
                f"The {self._role} {public_url(self.url)} returns other bytes than were written to it. A server that "
                f"does not support uploads with checksums stores their framing (aws-chunked); set {CHECKSUM_SETTING} "
                "in the environment of every process."
            )
        is_exclusive = created and not created_again and data == b"first"
        return self._backend.put_if_absent if is_exclusive else PutIfAbsent.UNSAFE

    def _write(self, operation: Callable[[Any], T], num_bytes: int) -> T:
        return self._retry(operation, num_bytes, writes=True)

    def _retry(self, operation: Callable[[Any], T], num_bytes: int = 0, *, writes: bool = False) -> T:
        """Call `operation` with the backend, and repeat it after transient errors.

        `num_bytes` is the number of bytes that it writes, for the message about a full store.
        """
        never, is_renewed = threading.Event(), False
        for attempt, pause_s in enumerate((*PAUSES_S, None), 1):
            backend = self._backend
            try:
                return operation(backend)
            except Exception as error:
                kind = kind_of(error)
                if pause_s is not None and kind in REPEATED and not self._is_local:
                    self._note(attempt, error)
                # A draft was removed by another process, or its folder.
                is_draft_gone = writes and self._is_local and isinstance(error, FileNotFoundError)
                # Jitter: a store throttles all workers at the same moment, and they must not all retry at once.
                if (
                    pause_s is None
                    or not (kind in REPEATED or is_draft_gone)
                    or (kind is Kind.EXPIRED and is_renewed)
                    or isinstance(error, UserError)
                    or (self._stopped or never).wait(pause_s * random.uniform(0.5, 1.5))
                ):
                    translated = translate(error, self.url, num_bytes=num_bytes, writes=writes)
                    if translated is error:
                        raise
                    raise translated from error
                if kind is Kind.EXPIRED:
                    is_renewed = True
                    self._read_credentials_again(backend)
        raise AssertionError("the last attempt returns or raises")

    def _note(self, attempt: int, error: Exception) -> None:
        global _noted_at
        if time.monotonic() - _noted_at >= NOTE_EVERY_S:
            _noted_at = time.monotonic()
            left = len(PAUSES_S) + 1 - attempt
            logger.warning(
                f"the {self._role} {public_url(self.url)} does not answer ({type(error).__name__}: {error}); "
                f"{plural(left, 'more attempt')}"
            )

    def _read_credentials_again(self, used: LocalDisk | Remote) -> None:
        """Connect anew, because drivers keep the credentials with which they have connected."""
        if isinstance(used, Remote):
            type(used.fs).clear_instance_cache()
        if self.__dict__.get("_backend") is used:
            del self._backend


def _is_visible(key: str) -> bool:
    """Hidden names are drafts of killed writers, or probes."""
    return not key.rpartition("/")[2].startswith(".")


def _checked(key: str) -> str:
    parts = key.split("/")
    if not key or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"not a key below an output root: {key!r}")
    return key
