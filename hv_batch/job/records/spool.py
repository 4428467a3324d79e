"""The spool: keeps finished videos on the disk of the node that decoded them while the output root is unreachable.

A spool is a small output root. It holds media and posters under their final keys, and then the commit record, which is
written last; without a record, files are not an entry. Any process on the node can commit an entry: the run that wrote
it, or its resume. An entry is validated before: its record must belong to this run, and its files must have the hashes
that the record names.

    <folder>/hv_batch_spool-<user>/<run>/{data,posters,commits}/shard-00017/...
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hv_batch.job import layout
from hv_batch.job.config.sections import OutputConfig
from hv_batch.job.documents.reading import parse
from hv_batch.job.documents.schema import CommitRecord
from hv_batch.job.records import commits
from hv_batch.job.records.latents import drop_intermediates
from hv_batch.job.records.withdrawn import delete_remnants, is_withdrawn
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.local_disk import file_sha256
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

UPLOADS_AT_ONCE = 4  # of one node; after an outage all nodes of a cluster upload at the same time
KEPT_FREE = 2**30  # bytes of the disk that a spool never uses
STALE_S = 7 * 86400.0  # a run that has not been resumed for a week is considered abandoned


@dataclass(frozen=True, slots=True)
class DrainResult:
    """The result of `Spool.drain`."""

    committed: tuple[str, ...]  # keys of samples that are committed (by this drain or earlier) or withdrawn
    outage: str = ""  # the error if the output root was unreachable; the other entries are still in the spool


def spool_base(folder: str | None) -> Path:
    """The folder of this user's spools in `folder`, the config's `output.spool_folder`."""
    return Path(folder or tempfile.gettempdir()) / f"hv_batch_spool-{os.getuid()}"


class Spool:
    """The spool on this node of the run with `fingerprint` at `root`. Its folder is created on first use."""

    def __init__(self, output: OutputConfig, root: Store, fingerprint: str) -> None:
        self._cap_bytes = int(output.spool_gib * 2**30)
        self._keeps_latents = output.keep_latents
        self._root = root
        self._fingerprint = fingerprint
        self._base = spool_base(output.spool_folder)
        run = hashlib.sha256(f"{fingerprint}\0{root.url}".encode()).hexdigest()[:16]
        self._folder = self._base / run
        self._local = Store(str(self._folder), "spool")
        self._largest = 0  # bytes of the largest video so far, as an estimate for the next one

    def exists(self) -> bool:
        """Whether a process of this node has written to this spool."""
        return self._folder.is_dir()

    def problem(self) -> str:
        """Why videos cannot be spooled on this node, with the remedy; empty if they can, or if no spool is wanted."""
        reason = self._refusal() if self._cap_bytes > 0 else ""
        if not reason:
            return ""
        return (
            f"The spool folder {self._base} cannot be used: {reason}. Without it, finished videos cannot wait on this "
            "node while the output root does not answer. Remove the folder, or name another place in "
            "output.spool_folder, or set output.spool_gib: 0 if you need no spool"
        )

    def has_room(self, num_bytes: int) -> bool:
        """Whether the spool has room for a video of about `num_bytes` bytes."""
        expected = max(num_bytes, self._largest)
        return self._cap_bytes > 0 and self._is_ours() and expected <= self._room()

    def add(self, record: Mapping[str, Any], files: Mapping[str, Path]) -> bool:
        """Store a video: its commit record, and its files by their keys in the output root.

        Returns False if there is no room for it, or if the disk refuses it for another reason.
        """
        size = sum(path.stat().st_size for path in files.values())
        self._largest = max(self._largest, size)
        if not self.has_room(size):
            return False
        try:
            with self._lock():
                self._remove_drafts()
                if size > self._room():
                    return False
                for name, path in files.items():
                    self._local.put_file(name, path)
                self._local.put(layout.commit_key(record["shard"], record["key"]), encode(record))
        except OSError:
            return False
        return True

    def drain(self) -> DrainResult:
        """Commit all entries, a few at a time. Stops if the output root is unreachable.

        Invalid entries are removed. Raises PermissionError if the root refuses the credentials, and OSError if it is
        full.
        """
        outages: list[str] = []

        def publish(name: str) -> str | None:
            try:
                return None if outages else self._publish(name)
            except StorageUnavailableError as error:
                outages.append(str(error))
                return None

        if self._is_ours():
            with self._lock():
                self._remove_drafts()
        names = list(self._local.list(layout.COMMITS)) if self._is_ours() else []
        committed = tuple(key for key in map_in_threads(publish, names, UPLOADS_AT_ONCE) if key)
        return DrainResult(committed, "".join(outages[:1]))

    def discard(self, shard: int, key: str) -> int:
        """Remove what this node holds of a sample. Creates nothing. Returns the number of files."""
        if not self._folder.is_dir() or not self._is_ours():
            return 0
        with self._lock():
            return len(delete_remnants(self._local, shard, {key}))

    def remove_stale(self) -> None:
        """Remove the spools of all runs that have not changed for STALE_S."""
        for folder in self._base.iterdir() if self._is_ours() else ():
            last_change = max((status.st_mtime for status in _walk_status(folder)), default=math.inf)
            if last_change < time.time() - STALE_S:
                shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, name: str) -> str | None:
        """Commit one entry. Returns its sample's key, or None if the entry is invalid."""
        record = self._valid_record(name)
        if record is None:
            self._local.delete(name)
            return None
        shard, key = record["shard"], record["key"]
        files = _files(record)
        is_done = self._root.exists(layout.commit_key(shard, key)) or is_withdrawn(self._root, shard, key)
        if not is_done:
            for file in files:
                self._root.put_file(file, self._folder / file)
            commits.commit(self._root, commits.with_current_time(record))
        drop_intermediates(self._root, shard, key, keep_latents=self._keeps_latents)
        self._local.delete(name)  # first: without its record, the rest is no longer an entry
        for file in files:
            self._local.delete(file)
        return str(key)

    def _valid_record(self, name: str) -> dict[str, Any] | None:
        try:
            record = parse(CommitRecord, self._local.get(name))
            is_ours = record["fingerprint"] == self._fingerprint
            is_ours &= name == layout.commit_key(record["shard"], record["key"])
            digests = {file: file_sha256(self._folder / file) for file in _files(record)}
        except (OSError, ValueError):
            return None
        is_whole = digests[record["file"]] == record["sha256"]
        is_whole &= all(f"-{digest[:8]}." in file for file, digest in digests.items())
        return record if is_ours and is_whole else None

    def _room(self) -> int:
        """The number of free bytes of the spool; negative if the disk does not report its free space."""
        used = sum(status.st_size for status in _walk_status(self._base) if stat.S_ISREG(status.st_mode))
        with suppress(OSError):
            return min(self._cap_bytes - used, shutil.disk_usage(self._base).free - KEPT_FREE)
        return -1

    def _is_ours(self) -> bool:
        return not self._refusal()

    def _refusal(self) -> str:
        """Why the folder is not one to which only this user can write; empty if it is. It is created if it is missing.

        In a shared place, another user may have created it.
        """
        try:
            if not self._base.is_symlink():
                self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self._base.lstat()
        except OSError as error:
            return f"it cannot be created ({error.strerror or error})"
        if not stat.S_ISDIR(status.st_mode):
            return "it is a link or a file, and not a folder"
        if status.st_uid != os.getuid():
            return f"it belongs to the user {_user_name(status.st_uid)}; this process runs as {_user_name(os.getuid())}"
        return "other users can write to it; its mode should be 0700" if status.st_mode & 0o022 else ""

    def _remove_drafts(self) -> None:
        """Remove what killed decoders have left. All that write here hold the lock, so no draft is in use."""
        for leftover in self._local.leftovers():
            self._local.remove_leftover(leftover)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Serializes the check for room and the write among the decoders of a node."""
        with (self._base / ".turn").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _user_name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:  # containers often run as a user without a name
        return str(uid)


def _files(record: Mapping[str, Any]) -> list[str]:
    return [file for file in (record["file"], record["poster"]) if file]


def _walk_status(folder: Path) -> Iterator[os.stat_result]:
    """The status of `folder` and of all folders and files in it, without those that are removed during the walk."""
    for parent, _, names in os.walk(folder):
        for name in (".", *names):
            with suppress(OSError):
                yield os.lstat(os.path.join(parent, name))
