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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from hv_batch.job.storage import local_paths
from hv_batch.job.storage.put_if_absent import PutIfAbsent

# Errors of link(2) on file systems without hard links (FAT, many FUSE mounts of object stores).
NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

# Errors of fsync(2) for a folder on file systems that do not support it (CIFS, some FUSE mounts).
NO_FOLDER_FLUSH = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES})

COPY_BYTES = 2**20

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, slots=True)
class _Draft:
    """A file that is complete before it gets its final name. Both names are in the folder with descriptor `folder`."""

    folder: int
    name: str
    final: str

    def open(self) -> IO[bytes]:
        return open(os.open(self.name, local_paths.NEW_FILE, 0o666, dir_fd=self.folder), "wb")

    def replace_final(self) -> None:
        os.replace(self.name, self.final, src_dir_fd=self.folder, dst_dir_fd=self.folder)

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.folder)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        descriptor = os.open(self.name, local_paths.FILE, dir_fd=self.folder)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class LocalDisk:
    """A folder of a POSIX file system, which may be a network mount.

    Nothing below it is reached through a link (see `local_paths`).
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.put_if_absent = PutIfAbsent.EXCLUSIVE_LINK

    def create(self, objects: Mapping[str, bytes]) -> list[bool]:
        """Create each object unless it exists. Returns for each whether this call created it."""
        with self._drafts(objects, sum(map(len, objects.values()))) as drafts:
            _write_all(drafts, objects.values())
            return [self._link(draft) for draft in drafts]

    def put(self, objects: Mapping[str, bytes]) -> None:
        with self._drafts(objects, sum(map(len, objects.values()))) as drafts:
            _write_all(drafts, objects.values())
            for draft in drafts:
                draft.replace_final()

    def put_file(self, key: str, path: Path) -> None:
        with self._drafts([key], path.stat().st_size) as drafts:
            _copy_all([path], drafts)

    def put_finished(self, files: Mapping[str, Path]) -> None:
        """Store files that are no longer written to: as hard links if possible, else as copies."""
        with self._drafts(files, sum(path.stat().st_size for path in files.values())) as drafts:
            _flush_all([partial(_opened, path) for path in files.values()])
            left = []
            for path, draft in zip(files.values(), drafts, strict=True):
                if _links(path, draft):
                    draft.replace_final()
                    draft.remove()  # it is still there if the final name was a link to the same file
                else:
                    left.append((path, draft))
            _copy_all([path for path, _ in left], [draft for _, draft in left])

    def get(self, key: str, at_most: int) -> bytes:
        """The bytes of an object. Raises OSError with EFBIG if it has more than `at_most` of them.

        A sparse file may have any size without taking any space.
        """
        with local_paths.opened_file(self.root, key) as descriptor, open(descriptor, "rb", closefd=False) as file:
            if (size := os.fstat(descriptor).st_size) > at_most:
                path = os.path.join(self.root, key)
                raise OSError(errno.EFBIG, f"{path} has {size:,} bytes; allowed: at most {at_most:,}")
            return file.read()

    def get_range(self, key: str, start: int, end: int) -> bytes:
        with local_paths.opened_file(self.root, key) as descriptor:
            return os.pread(descriptor, end - start, start)

    def get_file(self, key: str, path: Path) -> None:
        with (
            local_paths.opened_file(self.root, key) as descriptor,
            open(descriptor, "rb", closefd=False) as source,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, COPY_BYTES)

    def exists(self, key: str) -> bool:
        """Whether there is an object. A folder is none, and there is none below a file.

        A link in its place is an error, because it is not followed.
        """
        try:
            status = local_paths.read_status(self.root, key)
            local_paths.refuse_irregular(status, os.path.join(self.root, key))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return False
        return True

    def size(self, key: str) -> int:
        return local_paths.read_status(self.root, key).st_size

    def list(self, prefix: str) -> list[str]:
        keys: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            local_paths.walk(self.root, prefix, lambda key, _: keys.append(key))
        return keys

    def names(self, prefix: str) -> Sequence[str]:
        with contextlib.suppress(FileNotFoundError), local_paths.opened_folder(self.root, prefix) as folder:
            return os.listdir(folder)
        return []

    def list_sizes(self, prefix: str) -> dict[str, int]:
        sizes: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError):
            local_paths.walk(self.root, prefix, lambda key, read_status: sizes.update({key: read_status().st_size}))
        return sizes

    def modified(self, key: str) -> float:
        return local_paths.read_status(self.root, key).st_mtime

    def delete(self, key: str) -> None:
        """Remove the name, of a link and not of its target."""
        above, _, name = key.rpartition("/")
        with contextlib.suppress(FileNotFoundError), local_paths.opened_folder(self.root, above) as folder:
            os.unlink(name, dir_fd=folder)

    @contextlib.contextmanager
    def _drafts(self, keys: Iterable[str], num_bytes: int) -> Iterator[Sequence[_Draft]]:
        """Yields a draft for each key, and flushes the folders of their final names at the end.

        Drafts that still exist are removed. If the disk is full, raises OSError with the `num_bytes` to be written in
        its message.
        """
        names = [key.rpartition("/")[::2] for key in keys]
        drafts: list[_Draft] = []
        with contextlib.ExitStack() as stack:
            try:
                folders = {}
                for above in dict.fromkeys(above for above, _ in names):
                    local_paths.make_folder(self.root, above, _flush_folder)
                    folders[above] = stack.enter_context(local_paths.opened_folder(self.root, above))
                drafts += [_Draft(folders[above], f".draft-{uuid.uuid4().hex}", name) for above, name in names]
                yield drafts
                for folder in folders.values():
                    _flush_folder(folder)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                _remove_all(drafts)  # first: what this call has written must not count as used space in the message
                free = shutil.disk_usage(self.root).free if os.path.isdir(self.root) else 0
                message = f"{error.strerror}: {num_bytes:,} bytes are needed below {self.root}, where {free:,} are free"
                raise OSError(error.errno, message) from error
            finally:
                _remove_all(drafts)

    def _link(self, draft: _Draft) -> bool:
        try:
            os.link(draft.name, draft.final, src_dir_fd=draft.folder, dst_dir_fd=draft.folder, follow_symlinks=False)
        except FileExistsError:
            # NFS may repeat a link request whose reply was lost, and then reports the first success as a conflict.
            return os.stat(draft.name, dir_fd=draft.folder, follow_symlinks=False).st_nlink == 2
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            self.put_if_absent = PutIfAbsent.UNSAFE
            with contextlib.suppress(FileNotFoundError):
                os.stat(draft.final, dir_fd=draft.folder, follow_symlinks=False)
                return False
            draft.replace_final()
        return True


def _write_all(drafts: Sequence[_Draft], contents: Iterable[bytes]) -> None:
    for draft, content in zip(drafts, contents, strict=True):
        with draft.open() as file:
            file.write(content)
    _flush_all([draft.opened for draft in drafts])


def _copy_all(paths: Iterable[Path], drafts: Sequence[_Draft]) -> None:
    for path, draft in zip(paths, drafts, strict=True):
        with path.open("rb") as source, draft.open() as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
    _flush_all([draft.opened for draft in drafts])
    for draft in drafts:
        draft.replace_final()


def _remove_all(drafts: Iterable[_Draft]) -> None:
    for draft in drafts:
        draft.remove()


def _links(path: Path, draft: _Draft) -> bool:
    """Hard-link `path` to the draft; False if `path` is on another file system."""
    try:
        os.link(path, draft.name, dst_dir_fd=draft.folder)
    except OSError:
        return False
    return True


def _flush_folder(folder: int) -> None:
    """Flush the names in the folder with descriptor `folder` to the disk."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise


def file_sha256(path: Path) -> str:
    """The hex digest of a local file, which is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_all(files: Collection[Callable[[], AbstractContextManager[int]]]) -> None:
    """Flush the contents of files, which each of `files` opens, to the disk."""
    if len(files) > 1 and hasattr(os, "posix_fadvise"):
        # This starts the write-back of all files. Each fsync below then waits for the journal only.
        for opened in files:
            with opened() as descriptor, contextlib.suppress(OSError):  # only a hint
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for opened in files:
        with opened() as descriptor:
            os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
