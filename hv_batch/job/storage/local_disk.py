"""An output root in a local folder. Each object is either complete and on the disk, or absent.

An object is written to a hidden draft, flushed, and then linked or renamed to its final name; the folder is flushed
afterwards. A sample costs minutes of GPU time and a flush costs milliseconds; without it, a power failure can leave a
commit record that names a file full of zeros.

Objects that are stored together share the cost of a flush. To flush a file is to wait until the file system's journal
is on the disk, and one journal write covers all files whose data blocks have already been sent to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from hv_batch.job.storage.put_if_absent import PutIfAbsent

# Errors of link(2) on file systems without hard links (FAT, many FUSE mounts of object stores).
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

# Errors of fsync(2) for a folder on file systems that do not support it (CIFS, some FUSE mounts), and of open(2) for a
# folder without read permission.
NO_FOLDER_FLUSH = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES})

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class LocalDisk:
    """A folder of a POSIX file system, which may be a network mount."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.put_if_absent = PutIfAbsent.EXCLUSIVE_LINK

    def create(self, objects: Mapping[str, bytes]) -> list[bool]:
        """Create each object unless it exists. Returns for each whether this call created it."""
        with self._drafts(objects, sum(map(len, objects.values()))) as names:
            _write_all(names, objects.values())
            return [self._link(draft, final) for draft, final in names.items()]

    def put(self, objects: Mapping[str, bytes]) -> None:
        with self._drafts(objects, sum(map(len, objects.values()))) as names:
            _write_all(names, objects.values())
            for draft, final in names.items():
                os.replace(draft, final)

    def put_file(self, key: str, path: Path) -> None:
        with self._drafts([key], path.stat().st_size) as names:
            _copy_all([path], names)

    def put_finished(self, files: Mapping[str, Path]) -> None:
        """Store files that are no longer written to: as hard links if possible, else as copies."""
        with self._drafts(files, sum(path.stat().st_size for path in files.values())) as names:
            _flush_all([str(path) for path in files.values()])
            drafts = zip(files.values(), names, strict=True)
            left = {draft: path for path, draft in drafts if not _links(path, names[draft])}
            _copy_all(left.values(), {draft: names[draft] for draft in left})

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
    def _drafts(self, keys: Iterable[str], num_bytes: int) -> Iterator[dict[str, str]]:
        """Yields a mapping of draft paths to final paths, and flushes the folders of the final paths at the end.

        Drafts that still exist are removed. If the disk is full, raises OSError with the `num_bytes` to be written in
        its message.
        """
        finals = [self._path(key) for key in keys]
        names = {os.path.join(os.path.dirname(final), f".draft-{uuid.uuid4().hex}"): final for final in finals}
        folders = dict.fromkeys(map(os.path.dirname, finals))
        try:
            for folder in folders:
                _make_folder(folder)
            yield names
            for folder in folders:
                _flush_folder(folder)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            _remove_all(names)  # first: what this call has written must not count as used space in the message
            free = shutil.disk_usage(self.root).free if os.path.isdir(self.root) else 0
            message = f"{error.strerror}: {num_bytes:,} bytes are needed below {self.root}, where {free:,} are free"
            raise OSError(error.errno, message) from error
        finally:
            _remove_all(names)

    def _link(self, draft: str, final: str) -> bool:
        try:
            os.link(draft, final)
        except FileExistsError:
            # NFS may repeat a link request whose reply was lost, and then reports the first success as a conflict.
            return os.stat(draft).st_nlink == 2
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            self.put_if_absent = PutIfAbsent.UNSAFE
            if os.path.lexists(final):
                return False
            os.replace(draft, final)
        return True


def _write_all(names: Collection[str], contents: Iterable[bytes]) -> None:
    for name, content in zip(names, contents, strict=True):
        with open(name, "xb") as file:
            file.write(content)
    _flush_all(names)


def _copy_all(paths: Iterable[Path], names: Mapping[str, str]) -> None:
    for path, draft in zip(paths, names, strict=True):
        shutil.copyfile(path, draft)
    _flush_all(names)
    for draft, final in names.items():
        os.replace(draft, final)


def _remove_all(paths: Iterable[str]) -> None:
    for path in paths:
        _remove(path)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _links(path: Path, name: str) -> bool:
    """Hard-link `path` to `name`; False if `name` exists or is on another file system."""
    try:
        os.link(path, name)
    except OSError:
        return False
    return True


def _make_folder(folder: str) -> None:
    """Create a folder with its parents. Each parent is flushed, so that the new name survives a power failure."""
    if os.path.isdir(folder):
        return
    above = os.path.dirname(folder)
    _make_folder(above)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):  # otherwise another writer has created it meanwhile
            raise
    _flush_folder(above)


def _flush_folder(folder: str) -> None:
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise


def file_sha256(path: Path) -> str:
    """The hex digest of a local file, which is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_all(paths: Collection[str]) -> None:
    """Flush the contents of files to the disk."""
    if len(paths) > 1 and hasattr(os, "posix_fadvise"):
        # This starts the write-back of all files. Each fsync below then waits for the journal only.
        for path in paths:
            with _opened(path) as descriptor, contextlib.suppress(OSError):  # only a hint
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for path in paths:
        _flush(path)


def _flush(path: str) -> None:
    """Flush the contents of a file, or the names in a folder, to the disk."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
