"""An output root on any fsspec URL, with the few operations that the commit protocol needs.

Two kinds of writes guarantee atomicity:

- `put_new` creates an object only if its key is absent. Exactly one of several concurrent writers succeeds, and a
  reader sees a complete object or none (P1). Object stores do this with a conditional PUT. A local disk does it with a
  hidden draft that is hard-linked to its final name once it is complete; `open("x")` would expose a half-written file.
- `put` and `put_file` replace an object atomically.

The batched forms (`put_new_all`, `put_all`, `put_finished`) give the same guarantees for each object. If they return,
all objects are stored; if they raise, any of them may be. A local disk is flushed once for the batch, and an object
store receives many requests at once.

Transient errors are retried here and nowhere else. Errors that remain are raised as built-in exceptions: no space, no
permission, not found, or StorageUnavailableError if the retries failed. Credentials come from the default locations of
each store's own tools. A `Store` holds only its URL, so it can be pickled and sent to any worker.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from hv_batch.job.redaction import public_url
from hv_batch.job.storage.errors import StorageUnavailableError, is_transient, raise_translated
from hv_batch.job.storage.incomplete_writes import Leftover, find_leftovers, remove_leftover
from hv_batch.job.storage.local_disk import LocalDisk
from hv_batch.job.storage.object_store import Remote
from hv_batch.job.storage.put_if_absent import PutIfAbsent
from hv_batch.job.thread_map import map_in_threads
from hv_batch.protocol import UserError

__all__ = ["Leftover", "PutIfAbsent", "StorageUnavailableError", "Store"]

A = TypeVar("A")
T = TypeVar("T")

# Pauses between four attempts: enough for a throttled prefix or a dropped connection. The scheduler handles longer
# outages, because it can run other work meanwhile.
PAUSES_S = (0.5, 1.0, 2.0)


class Store:
    """One output root. Keys are relative POSIX paths below the root.

    Every method raises ValueError if a key is not such a path, PermissionError if the credentials are refused,
    StorageUnavailableError if the store is unreachable, UserError if the URL cannot be opened at all, and otherwise the
    store's own error.
    """

    def __init__(self, url: str, role: str = "output root") -> None:
        """`role` names the root in messages. Raises UserError if the URL is blank: "" is the working directory."""
        if not url.strip():
            raise UserError(f"The {role} is blank. Give the path of a folder, or a URL such as s3://bucket/run.")
        is_local = get_protocol(url) in ("file", "local")
        # Workers have a different working directory than the driver, so a local root must be absolute.
        self.url: str = url_to_fs(url)[1] if is_local else url
        self._is_local = is_local
        self._role = role

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
        backend, data = self._backend, {_checked(key): content for key, content in objects.items()}
        if isinstance(backend, Remote):
            return self.each(lambda key: not self.exists(key) and self._create(key, data[key]), data)

        def create() -> list[bool]:
            absent = {key: content for key, content in data.items() if not backend.exists(key)}
            created = dict(zip(absent, backend.create(absent), strict=True))
            return [created.get(key, False) for key in data]

        return self._retry(create, sum(map(len, data.values())))

    def _create(self, key: str, data: bytes) -> bool:
        backend = self._backend
        if isinstance(backend, Remote):
            return self._retry(lambda: backend.create(key, data), len(data))
        return self._retry(lambda: backend.create({key: data})[0], len(data))

    def put(self, key: str, data: bytes) -> None:
        self.put_all({key: data})

    def put_all(self, objects: Mapping[str, bytes]) -> None:
        backend, data = self._backend, {_checked(key): content for key, content in objects.items()}
        if isinstance(backend, Remote):
            self.each(lambda key: self._retry(lambda: backend.put(key, data[key]), len(data[key])), data)
        else:
            self._retry(lambda: backend.put(data), sum(map(len, data.values())))

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file of any size. The key should hold a hash of the file, so that a repeated upload is harmless."""
        target = _checked(key)
        self._retry(lambda: self._backend.put_file(target, path), path.stat().st_size)

    def put_finished(self, files: Mapping[str, Path]) -> None:
        """As `put_file`, for files that are no longer written to: a local disk may hard-link them and not copy."""
        backend, paths = self._backend, {_checked(key): path for key, path in files.items()}
        if isinstance(backend, Remote):
            self.each(lambda key: self.put_file(key, paths[key]), paths)
        else:
            self._retry(lambda: backend.put_finished(paths), sum(path.stat().st_size for path in paths.values()))

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        path = _checked(key)
        return self._retry(lambda: self._backend.get(path))

    def get_file(self, key: str, path: Path) -> None:
        """Download an object of any size. Raises FileNotFoundError."""
        source = _checked(key)
        self._retry(lambda: self._backend.get_file(source, path))

    def exists(self, key: str) -> bool:
        path = _checked(key)
        return self._retry(lambda: self._backend.exists(path))

    def list(self, prefix: str) -> Iterator[str]:
        """Yields the keys below `prefix` (a folder, as "commits/shard-00017/"), recursively and sorted; none if absent.

        The result never comes from a cache. The whole listing is held in memory, so callers list one shard at a time
        (P7).
        """
        path = _checked(prefix.rstrip("/"))
        for key in sorted(self._retry(lambda: self._backend.list(path))):
            # Hidden names are drafts of killed writers, or probes.
            if not key.rsplit("/", 1)[-1].startswith("."):
                yield key

    def modified(self, key: str) -> float:
        """The time of the last write in seconds since 1970, by the store's clock. Raises FileNotFoundError."""
        path = _checked(key)
        return self._retry(lambda: self._backend.modified(path))

    def leftovers(self) -> Sequence[Leftover]:
        """Incomplete writes of killed writers, which no listing shows: drafts, probes and unfinished uploads."""
        return self._retry(lambda: find_leftovers(self._backend))

    def remove_leftover(self, leftover: Leftover) -> None:
        self._retry(lambda: remove_leftover(self._backend, leftover))

    def delete(self, key: str) -> None:
        """Remove the object. Does nothing if it does not exist."""
        path = _checked(key)
        self._retry(lambda: self._backend.delete(path))

    def probe(self) -> PutIfAbsent:
        """Write and remove a test object, to find out how the root implements `put_new`.

        Raises UserError if the root cannot be written.
        """
        key = f".probe-{uuid.uuid4().hex}"
        try:
            created = self._create(key, b"first")
            created_again = self._create(key, b"second")
            kept = self.get(key) == b"first"
            self.delete(key)
        except UserError:
            raise
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"The {self._role} {public_url(self.url)} is a file, or lies below one ({error.filename or error}). "
                "Choose a folder."
            ) from error
        except Exception as error:  # every driver has its own error classes; the remedy is the same
            raise UserError(
                f"The {self._role} {public_url(self.url)} cannot be written: {type(error).__name__}: {error}. Check "
                "that the bucket or folder exists, that this machine has credentials for it, and that they allow "
                "reading, writing, listing and deleting."
            ) from error
        is_exclusive = created and not created_again and kept
        return self._backend.put_if_absent if is_exclusive else PutIfAbsent.UNSAFE

    def _retry(self, operation: Callable[[], T], num_bytes: int = 0) -> T:
        """Call `operation`, and repeat it after transient errors.

        `num_bytes` is the number of bytes that it writes, for the message about a full store.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                return operation()
            except Exception as error:  # noqa: BLE001  (raised by the next statement unless it is transient)
                if pause_s is None or not is_transient(error):
                    raise_translated(error, self.url, num_bytes)
            # Jitter: a store throttles all workers at the same moment, and they must not all retry at the same moment.
            time.sleep(pause_s * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")


def _checked(key: str) -> str:
    parts = key.split("/")
    if not key or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"not a key below an output root: {key!r}")
    return key
