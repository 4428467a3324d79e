"""An output root on any fsspec URL, reduced to the few acts that the commit protocol needs.

Two of them carry the promises (design.md section 4):

- `put_new` creates an object only if nothing has its name, in one atomic act: of any number of writers exactly one
  wins, and a reader sees a whole object or none (P1). Object stores do it with a conditional PUT; a local disk does it
  with a hidden file that is hard-linked to its name once it is complete, because `open("x")` shows a half-written file.
- `put` and `put_file` replace atomically.

Their forms for many at a time (`put_new_all`, `put_all`, `put_finished`) keep the same promises, object by object: when
they return all are stored, and when they raise any of them may be. A disk is flushed once for all, and an object store
is sent many requests at once.

Transient errors are retried here and nowhere else. What is left surfaces as the built-in exception that says it: no
space, no permission, not found, or StorageUnavailableError when the retries did not help. Credentials come from where
each store's own tools look for them; a `Store` holds nothing but its URL, so it can be pickled to any worker.
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

# Pauses between four tries: they ride out a throttled prefix or a dropped connection. A longer outage is left to the
# scheduler, which has a budget a sample and other work to do meanwhile.
PAUSES_S = (0.5, 1.0, 2.0)


class Store:
    """One output root. Keys are relative, posix, and never leave the root.

    Every method raises ValueError for a key that is no such thing, PermissionError, StorageUnavailableError, UserError
    when the URL cannot be opened at all, and otherwise the store's own error.
    """

    def __init__(self, url: str, role: str = "output root") -> None:
        """`role` is what the user calls it, for messages."""
        is_local = get_protocol(url) in ("file", "local")
        # Workers have another working directory than the driver: a local root is made absolute before it travels.
        self.url: str = url_to_fs(url)[1] if is_local else url
        self._is_local = is_local
        self._role = role

    def __reduce__(self) -> tuple[type[Store], tuple[str, str]]:
        return Store, (self.url, self._role)

    def __repr__(self) -> str:
        return f"Store({public_url(self.url)!r})"

    @property
    def readers(self) -> int:
        """Threads that read small objects at once: enough to hide an object store's ~30 ms a GET, few enough to be
        polite to it. A disk has hardly any latency to hide, and threads take turns in Python.
        """
        return 4 if self._is_local else 16

    def each(self, act: Callable[[A], T], items: Iterable[A]) -> list[T]:
        """What `act`, which asks this store something small, makes of each item: side by side where an answer takes
        long. Nothing is under way any more when it returns or raises.
        """
        items = list(items)
        if self._is_local or len(items) < 2:
            return [act(item) for item in items]
        return list(map_in_threads(act, items, self.readers))

    @cached_property
    def _backend(self) -> LocalDisk | Remote:
        return LocalDisk(self.url) if self._is_local else Remote(self.url, self._role)

    def put_new(self, key: str, data: bytes) -> bool:
        """Create `key` with `data` unless it exists; whether this call created it.

        False may also follow a write of ours whose acknowledgement was lost. Who must know compares what is stored.
        """
        return self.put_new_all({key: data})[0]

    def put_new_all(self, objects: Mapping[str, bytes]) -> list[bool]:
        # The look beforehand saves the upload in the common case, and narrows the race where a server ignores the
        # condition of the write that follows.
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
        """Upload a file of any size. The name should hold a hash of its bytes: then writing it twice is harmless."""
        target = _checked(key)
        self._retry(lambda: self._backend.put_file(target, path), path.stat().st_size)

    def put_finished(self, files: Mapping[str, Path]) -> None:
        """As `put_file`, of files to which nobody writes any more: they may become the objects, with a second name."""
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
        """Keys below `prefix` (a folder: "commits/shard-00017/"), recursive and sorted; none when it is missing.

        Never answered from a cache. The whole listing is held in memory, so ask for a shard at a time (P7).
        """
        path = _checked(prefix.rstrip("/"))
        for key in sorted(self._retry(lambda: self._backend.list(path))):
            # Hidden names are files that a killed writer left behind, or a probe.
            if not key.rsplit("/", 1)[-1].startswith("."):
                yield key

    def modified(self, key: str) -> float:
        """When the object was last written, in seconds since 1970 by the store's clock. Raises FileNotFoundError."""
        path = _checked(key)
        return self._retry(lambda: self._backend.modified(path))

    def leftovers(self) -> Sequence[Leftover]:
        """What killed writers left below the root that no listing shows: drafts, probes, unfinished uploads."""
        return self._retry(lambda: find_leftovers(self._backend))

    def remove_leftover(self, leftover: Leftover) -> None:
        self._retry(lambda: remove_leftover(self._backend, leftover))

    def delete(self, key: str) -> None:
        """Remove the object; a missing one is fine."""
        path = _checked(key)
        self._retry(lambda: self._backend.delete(path))

    def probe(self) -> PutIfAbsent:
        """Find out by trying whether the root can be written, and how it keeps `put_new`'s promise.

        Raises UserError when it cannot be written.
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
        except Exception as error:  # every driver has errors of its own; all mean the same to the user
            raise UserError(
                f"The {self._role} {public_url(self.url)} cannot be written: {type(error).__name__}: {error}. Check "
                "that the bucket or folder exists, that its credentials are set up on this machine, and that they "
                "allow to read, write, list and delete."
            ) from error
        is_exclusive = created and not created_again and kept
        return self._backend.claim if is_exclusive else PutIfAbsent.UNSAFE

    def _retry(self, act: Callable[[], T], num_bytes: int = 0) -> T:
        """`num_bytes` are those it writes, for the message about a store that is full."""
        for pause_s in (*PAUSES_S, None):
            try:
                return act()
            except Exception as error:  # noqa: BLE001  (judged in the next line, and raised unless it is transient)
                if pause_s is None or not is_transient(error):
                    raise_translated(error, self.url, num_bytes)
            # Jitter: a whole cluster is throttled at the same moment and must not come back at the same moment.
            time.sleep(pause_s * random.uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")


def _checked(key: str) -> str:
    parts = key.split("/")
    if not key or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"not a key below an output root: {key!r}")
    return key
