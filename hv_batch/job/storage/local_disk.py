"""An output root in a folder of this machine: any number of objects at a time, each whole and on the disk or absent.

Everything is flushed to the disk before it gets its name, and so is the name: a sample costs minutes of GPU time, a
flush costs milliseconds, and without it a power cut can leave a commit record that names a file full of zeros.

Objects that are stored together share these milliseconds. A file system keeps a journal of what happens to names and
sizes, and to flush is to wait until the journal is on the disk: once for all files whose bytes are on their way.
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

# What link(2) says on file systems that have no hard links (FAT, many FUSE mounts of object stores).
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

# What fsync(2) says of a folder on file systems that look after folders themselves (CIFS, some FUSE mounts), and
# open(2) of one that may be written to and not read.
NO_FOLDER_FLUSH = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES})

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class LocalDisk:
    """A folder of a POSIX file system, which may be a network mount."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.claim = PutIfAbsent.EXCLUSIVE_LINK

    def create(self, objects: Mapping[str, bytes]) -> list[bool]:
        """Of each, whether this call created it; those that exist stay as they are."""
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
        """Store finished files, which get a second name where they can: that spares a copy."""
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
        """Hidden names, gone afterwards, each with the final name beside it; what was given its final name meanwhile is
        made durable.

        A full disk is told with the `num_bytes` that were to be written.
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
            _remove_all(names)  # the half that was written is not what others have taken
            free = shutil.disk_usage(self.root).free if os.path.isdir(self.root) else 0
            said = f"{error.strerror}: {num_bytes:,} bytes are needed below {self.root}, where {free:,} are free"
            raise OSError(error.errno, said) from error
        finally:
            _remove_all(names)

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
    """Whether the file has a second name now; it has not where that is taken, or on another disk."""
    try:
        os.link(path, name)
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


def _flush_folder(folder: str) -> None:
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise


def file_sha256(path: Path) -> str:
    """Hex digest of a local file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_all(paths: Collection[str]) -> None:
    """Make the bytes of files survive a power cut."""
    if len(paths) > 1 and hasattr(os, "posix_fadvise"):
        # Sets all of them off. Each flush below then finds its bytes written, and waits for the journal alone.
        for path in paths:
            with _opened(path) as descriptor, contextlib.suppress(OSError):  # no more than a hint
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for path in paths:
        _flush(path)


def _flush(path: str) -> None:
    """Make a file's bytes, or the names in a folder, survive a power cut."""
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
