"""Opens files and folders below a local root without following links.

Whoever can write to an output root must not make this program read, write or delete anything outside it. Each component
of a path is therefore opened relative to the folder before it and without following a symbolic link, so a link that is
put in place at the same moment is not followed either. Only the root itself may be a link, because the operator names
it. Objects are regular files: a FIFO or a device in the place of one is refused, and opening it does not block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
MAX_DEPTH = 32  # of the folders that are walked
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def opened_folder(root: str, key: str) -> Iterator[int]:
    """A descriptor of the folder `key` below `root`; of the root if `key` is empty.

    Raises FileNotFoundError if it does not exist, and NotADirectoryError or OSError with ELOOP if a component is
    something else.
    """
    descriptor = os.open(root, FOLDER & ~os.O_NOFOLLOW)
    try:
        for number, name in enumerate(_components(key), 1):
            try:
                below = os.open(name, FOLDER, dir_fd=descriptor)
            except OSError as error:
                raise _explained(error, descriptor, name, os.path.join(root, *_components(key)[:number])) from error
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def make_folder(root: str, key: str, flush: Callable[[int], None]) -> None:
    """Create the folder `key` below `root`, and the root, with all parents.

    `flush` is called with a descriptor of each folder that gets a new name: the name must survive a power failure.
    """
    with contextlib.suppress(FileNotFoundError), opened_folder(root, key):
        return
    _make_root(root, flush)
    components = _components(key)
    for number, name in enumerate(components):
        above = "/".join(components[:number])
        # If there is something else than a folder, the next open reports it.
        with opened_folder(root, above) as descriptor, contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=descriptor)
            flush(descriptor)


@contextlib.contextmanager
def opened_file(root: str, key: str) -> Iterator[int]:
    """A descriptor of the object `key` below `root`, for reading.

    Raises as `opened_folder`, and OSError if it is not a regular file.
    """
    above, _, name = key.rpartition("/")
    with opened_folder(root, above) as folder:
        try:
            descriptor = os.open(name, FILE, dir_fd=folder)
        except OSError as error:
            raise _explained(error, folder, name, os.path.join(root, key)) from error
    try:
        refuse_irregular(os.fstat(descriptor), os.path.join(root, key))
        yield descriptor
    finally:
        os.close(descriptor)


def link_file(root: str, key: str, target: str) -> None:
    """Make `target`, outside the root, a hard link to the object `key`. Raises as `opened_file`, and as `os.link`."""
    above, _, name = key.rpartition("/")
    with opened_folder(root, above) as folder:
        os.link(name, target, src_dir_fd=folder, follow_symlinks=False)
    try:
        refuse_irregular(os.lstat(target), os.path.join(root, key))
    except OSError:
        os.unlink(target)
        raise


def read_status(root: str, key: str) -> os.stat_result:
    """The status of the name `key` below `root`, of a link itself. Raises as `opened_folder`."""
    above, _, name = key.rpartition("/")
    with opened_folder(root, above) as folder:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)


def refuse_irregular(status: os.stat_result, path: str) -> None:
    """Raises IsADirectoryError, or OSError with ELOOP or ENXIO, unless `status` is that of a regular file."""
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder, but the name of an object")
    if stat.S_ISLNK(status.st_mode):
        raise _link_error(path)
    raise OSError(errno.ENXIO, f"{path} is a FIFO, socket or device, but the name of an object; remove it")


def walk(root: str, key: str, visit: Callable[[str, Callable[[], os.stat_result]], None]) -> None:
    """Visit everything below the folder `key` that is no folder, with its key and a function that reads its status.

    Links are reported and not followed. What is removed during the walk is skipped, and so are folders more than
    MAX_DEPTH below the root, which no object is in. Raises as `opened_folder`.
    """
    below = []
    with opened_folder(root, key) as descriptor, os.scandir(descriptor) as entries:
        for entry in entries:
            path = f"{key}/{entry.name}" if key else entry.name
            if entry.is_dir(follow_symlinks=False):
                below.append(path)
                continue
            with contextlib.suppress(FileNotFoundError):
                visit(path, partial(os.stat, entry.name, dir_fd=descriptor, follow_symlinks=False))
    for path in below if len(_components(key)) < MAX_DEPTH else ():
        with contextlib.suppress(FileNotFoundError):
            walk(root, path, visit)


def _components(key: str) -> list[str]:
    return key.split("/") if key else []


def _make_root(root: str, flush: Callable[[int], None]) -> None:
    if os.path.isdir(root):
        return
    above = os.path.dirname(root)
    _make_root(above, flush)
    try:
        os.mkdir(root)
    except FileExistsError:
        if not os.path.isdir(root):  # otherwise another writer has created it meanwhile
            raise
    with contextlib.suppress(PermissionError), opened_folder(above, "") as descriptor:
        flush(descriptor)


def _explained(error: OSError, folder: int, name: str, path: str) -> OSError:
    """`error` of an open, or a clearer one. The number of the error for a link differs between systems."""
    if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):
        with contextlib.suppress(OSError):
            if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                return _link_error(path)
    if error.errno == errno.ENXIO:
        return OSError(errno.ENXIO, f"{path} is a socket or device, but the name of an object; remove it")
    error.filename = path
    return error


def _link_error(path: str) -> OSError:
    return OSError(
        errno.ELOOP,
        f"{path} is a symbolic link. Links below an output root are not followed; only the root itself may be one. "
        "Replace it by what it points to",
    )
