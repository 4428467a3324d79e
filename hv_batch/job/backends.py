"""The two kinds of place an output root can be: a folder of this machine, and everything else that fsspec reaches.

Both do the same few acts (`create`, `put`, `put_file`, `get`, `get_file`, `exists`, `list`, `delete`) once, on keys
that have been checked. `Store` puts the checks, the retries and the probe around them.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

from hv_batch.job.inputs import public_url
from hv_batch.job.store_errors import http_status
from hv_batch.protocol import UserError

# Stores whose fsspec driver turns mode="create" into a conditional write that the server judges.
CONDITIONAL_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})

# What link(2) says on file systems that have no hard links (FAT, many FUSE mounts of object stores).
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


# What fsync(2) says of a folder on file systems that look after folders themselves (CIFS, some FUSE mounts), and
# open(2) of one that may be written to and not read.
NO_FOLDER_FLUSH = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES})

# What s3fs sends of a large object at a time: at most 64 MiB of a worker's memory, and a dropped connection repeats one
# part. Ordinary videos stay below two parts and go in one request.
PART_BYTES = 16 * 2**20
PARTS_AT_ONCE = 4
MAX_PARTS = 10_000  # of one S3 object

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

# Where nobody judges the condition, at least the threads of one process take turns. fsspec's memory needs that of every
# act that changes what a listing walks over.
_TURN = threading.RLock()


class PutIfAbsent(enum.Enum):
    """How a store keeps the promise of `Store.put_new`, as found by trying."""

    EXCLUSIVE_LINK = "exclusive hard link"
    CONDITIONAL_PUT = "conditional put"
    UNSAFE = "check, then write"

    @property
    def warning(self) -> str | None:
        """What to tell the user, or None when the promise holds."""
        if self is not PutIfAbsent.UNSAFE:
            return None
        return (
            "This output root cannot create an object only if it is absent, so two runs that write to it at the same "
            "time could both commit the same sample. One run at a time is safe. To be safe in every case use a local "
            "disk with hard links, or S3, Google Cloud Storage or Azure Blob Storage."
        )


class LocalDisk:
    """A folder of a POSIX file system, which may be a network mount.

    Everything is flushed to the disk before it gets its name, and so is the name: a sample costs minutes of GPU time, a
    flush costs milliseconds, and without it a power cut can leave a commit record that names a file full of zeros.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.claim = PutIfAbsent.EXCLUSIVE_LINK

    def create(self, key: str, data: bytes) -> bool:
        final = self._path(key)
        with self._draft(final, len(data)) as draft:
            _write(draft, data)
            return self._link(draft, final)

    def put(self, key: str, data: bytes) -> None:
        final = self._path(key)
        with self._draft(final, len(data)) as draft:
            _write(draft, data)
            os.replace(draft, final)

    def put_file(self, key: str, path: Path, *, is_final: bool) -> None:
        final = self._path(key)
        with self._draft(final, path.stat().st_size) as draft:
            if is_final and _becomes(path, final):
                return
            shutil.copyfile(path, draft)
            _flush(draft)
            os.replace(draft, final)

    def get(self, key: str) -> bytes:
        return Path(self._path(key)).read_bytes()

    def get_file(self, key: str, path: Path) -> None:
        shutil.copyfile(self._path(key), path)

    def exists(self, key: str) -> bool:
        return os.path.isfile(self._path(key))

    def list(self, prefix: str) -> list[str]:
        keys = []
        for folder, _, names in os.walk(self._path(prefix), onerror=_raise_unless_missing):
            inside = os.path.relpath(folder, self.root)
            keys += [f"{inside}/{name}" for name in names]
        return keys

    def modified(self, key: str) -> float:
        return os.path.getmtime(self._path(key))

    def delete(self, key: str) -> None:
        _remove(self._path(key))

    def _path(self, key: str) -> str:
        return os.path.join(self.root, key)

    @contextlib.contextmanager
    def _draft(self, final: str, num_bytes: int) -> Iterator[str]:
        """A hidden name beside `final`, gone afterwards; what was given its final name meanwhile is made durable.

        A full disk is told with the `num_bytes` that were to be written.
        """
        folder = os.path.dirname(final)
        draft = os.path.join(folder, f".draft-{uuid.uuid4().hex}")
        try:
            _make_folder(folder)
            yield draft
            _names_in(folder).flush()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            _remove(draft)  # the half that was written is not what others have taken
            free = shutil.disk_usage(self.root).free if os.path.isdir(self.root) else 0
            said = f"{error.strerror}: {num_bytes:,} bytes are needed below {self.root}, where {free:,} are free"
            raise OSError(error.errno, said) from error
        finally:
            _remove(draft)

    def _link(self, draft: str, final: str) -> bool:
        try:
            os.link(draft, final)
        except FileExistsError:
            # NFS may repeat a link whose answer was lost, and then reports our own success as a conflict.
            return os.stat(draft).st_nlink == 2
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            self.claim = PutIfAbsent.UNSAFE
            if os.path.lexists(final):
                return False
            os.replace(draft, final)
        return True


class Remote:
    """Any other fsspec file system."""

    def __init__(self, url: str, role: str) -> None:
        protocol = get_protocol(url)
        self.is_conditional = protocol in CONDITIONAL_PROTOCOLS
        self.is_s3 = protocol in ("s3", "s3a")
        self.claim = PutIfAbsent.CONDITIONAL_PUT if self.is_conditional else PutIfAbsent.UNSAFE
        # Listings change under us from other machines. Drivers outside the list may not know the option, so there the
        # cache is emptied before every look.
        options: dict[str, Any] = {"use_listings_cache": False} if self.is_conditional else {}
        try:
            self.fs, self.root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"The {role} {public_url(url)} cannot be opened: {error}. Local paths and every URL that fsspec knows "
                "are allowed; s3://, gs:// and az:// need the extra of that store: pip install 'hv_batch[s3]', [gcs] "
                "or [azure]."
            ) from error
        self.turn: Any = contextlib.nullcontext() if self.is_conditional else _TURN
        self.memory_turn: Any = _TURN if protocol == "memory" else contextlib.nullcontext()

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with self.turn:
            try:
                if not self.is_conditional:
                    self._make_folder(path)
                    if self.exists(key):
                        return False
                self.fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # Servers other than AWS word the refusal in their own way; its number is the same.
                if http_status(error) == 412:
                    return False
                raise
        return True

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self.memory_turn:
            self._make_folder(path)
            self.fs.pipe_file(path, data)

    def put_file(self, key: str, path: Path, *, is_final: bool) -> None:
        target = self._path(key)
        options: dict[str, Any] = {}
        if self.is_s3:
            part_bytes = max(PART_BYTES, -(-path.stat().st_size // MAX_PARTS))
            options = {"chunksize": part_bytes, "max_concurrency": PARTS_AT_ONCE}
        with self.memory_turn:
            self._make_folder(target)
            self.fs.put_file(str(path), target, **options)

    def get(self, key: str) -> bytes:
        return bytes(self.fs.cat_file(self._path(key)))

    def get_file(self, key: str, path: Path) -> None:
        self.fs.get_file(self._path(key), str(path))

    def exists(self, key: str) -> bool:
        self._forget_listings()
        # Not fs.exists: drivers answer False there to any error, which would look like a sample that is not committed.
        try:
            return bool(self.fs.info(self._path(key))["type"] == "file")
        except FileNotFoundError:
            return False

    def list(self, prefix: str) -> list[str]:
        self._forget_listings()
        # The generic walk leaves out folders it cannot read unless told otherwise; the stores' own never do.
        options = {} if self.is_conditional else {"on_error": "raise"}
        try:
            with self.memory_turn:
                paths = self.fs.find(self._path(prefix), **options)
        except FileNotFoundError:
            return []
        return [path.removeprefix(self.root).lstrip("/") for path in paths]

    def modified(self, key: str) -> float:
        self._forget_listings()
        written: float = self.fs.modified(self._path(key)).timestamp()
        return written

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), self.memory_turn:
            self.fs.rm_file(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}"

    def _forget_listings(self) -> None:
        if not self.is_conditional:
            self.fs.invalidate_cache()

    def _make_folder(self, path: str) -> None:
        if not self.is_conditional:  # object stores have no folders, and s3fs would try to create the bucket
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def _write(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _becomes(path: Path, final: str) -> bool:
    """Whether the file has a second name now; it has not where that is taken, or on another disk. Spares a copy, and on
    ext4 a removed file, for each of which every new one is slower for minutes.
    """
    _flush(str(path))
    try:
        os.link(path, final)
    except OSError:
        return False
    return True


def _make_folder(folder: str) -> None:
    """With those above it; a name in a folder survives a power cut only if the folder's own name does."""
    if os.path.isdir(folder):
        return
    above = os.path.dirname(folder)
    _make_folder(above)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):  # else another writer was faster
            raise
    _flush_folder(above)


class _Names:
    """Those in one folder, which threads make durable together: whoever comes while the folder is being flushed waits
    for that to end, and then one flush does for all who waited.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._turn = threading.Lock()
        self._ticket = count()
        self._flushed = 0  # all with a ticket below

    def flush(self) -> None:
        """Return when every name that was given before this call is on the disk."""
        ticket = next(self._ticket)
        with self._turn:
            if ticket < self._flushed:
                return
            begun = next(self._ticket)
            _flush_folder(self._folder)
            self._flushed = begun


@lru_cache(1024)  # folders in use; one that is forgotten meanwhile is flushed once more than it must be
def _names_in(folder: str) -> _Names:
    return _Names(folder)


def _flush_folder(folder: str) -> None:
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise


def _flush(path: str) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
