"""Where finished videos wait while the output root does not answer: on the disk of the node that decoded them.

A spool is an output root in small: media and posters under the names that they are going to have, and then the commit
record. What was cut short is no entry; what is an entry can be committed by whoever comes to this node, the run that
made it or its resume. It is trusted as far as it proves itself: a record of this run, and files of the hashes it names.

    <folder>/hv_batch_spool-<user>/<run>/{data,posters,commits}/shard-00017/...
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
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
from hv_batch.job.records import commits
from hv_batch.job.records.latents import drop_intermediates
from hv_batch.job.storage.canonical_json import decode, encode
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.local_disk import file_sha256
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

UPLOADS_AT_ONCE = 4  # of a node: a store that has just come back is asked by all nodes of a cluster
KEPT_FREE = 2**30  # bytes of the disk that are left to others
STALE_S = 7 * 86400.0  # longer than anybody takes to resume a run that gave up


@dataclass(frozen=True, slots=True)
class DrainResult:
    """What became of a spool."""

    committed: tuple[str, ...]  # keys of samples that have a record in the output root now, this one or an earlier
    outage: str = ""  # what was said when the output root did not answer; the rest is still in the spool


class Spool:
    """That of one run on this node: of the run with this `fingerprint` at `root`. Touches nothing before it is used."""

    def __init__(self, output: OutputConfig, root: Store, fingerprint: str) -> None:
        self._cap_bytes = int(output.spool_gib * 2**30)
        self._keeps_latents = output.keep_latents
        self._root = root
        self._fingerprint = fingerprint
        self._base = Path(output.spool_folder or tempfile.gettempdir()) / f"hv_batch_spool-{os.getuid()}"
        run = hashlib.sha256(f"{fingerprint}\0{root.url}".encode()).hexdigest()[:16]
        self._folder = self._base / run
        self._local = Store(str(self._folder), "spool")
        self._largest = 0  # bytes of a video that came here: the next may be as large

    def has_room(self, num_bytes: int) -> bool:
        """Whether a video of about so many bytes may come."""
        expected = max(num_bytes, self._largest)
        return self._cap_bytes > 0 and self._is_ours() and expected <= self._room()

    def add(self, record: Mapping[str, Any], files: Mapping[str, Path]) -> bool:
        """Take over a video: its commit record, and by their keys in the output root the files that belong to it.

        False when there is no room for it, or the disk does not take it for another reason.
        """
        size = sum(path.stat().st_size for path in files.values())
        self._largest = max(self._largest, size)
        if not self.has_room(size):
            return False
        try:
            with self._turn():
                if size > self._room():
                    return False
                for name, path in files.items():
                    self._local.put_file(name, path)
                self._local.put(layout.commit_key(record["shard"], record["key"]), encode(record))
        except OSError:
            return False
        return True

    def drain(self) -> DrainResult:
        """Commit what waits here, a few at a time, until the output root does not answer.

        What does not prove itself is removed. Raises PermissionError, or OSError of a root that is full.
        """
        said: list[str] = []

        def publish(name: str) -> str | None:
            try:
                return None if said else self._publish(name)
            except StorageUnavailableError as error:
                said.append(str(error))
                return None

        names = list(self._local.list(layout.COMMITS)) if self._is_ours() else []
        committed = tuple(key for key in map_in_threads(publish, names, UPLOADS_AT_ONCE) if key)
        return DrainResult(committed, "".join(said[:1]))

    def remove_stale(self) -> None:
        """Remove the spools of all runs to which nothing has happened for a week."""
        for folder in self._base.iterdir() if self._is_ours() else ():
            last_change = max((found.st_mtime for found in _look(folder)), default=math.inf)
            if last_change < time.time() - STALE_S:
                shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, name: str) -> str | None:
        """Commit one entry; its key, or None for one that is not to be trusted."""
        record = self._proven(name)
        if record is None:
            self._local.delete(name)
            return None
        shard, key = record["shard"], record["key"]
        files = _files(record)
        if not self._root.exists(layout.commit_key(shard, key)):
            for file in files:
                self._root.put_file(file, self._folder / file)
            commits.commit(self._root, commits.dated(record))
        drop_intermediates(self._root, shard, key, keep_latents=self._keeps_latents)
        self._local.delete(name)  # first: without a record the rest is no entry
        for file in files:
            self._local.delete(file)
        return str(key)

    def _proven(self, name: str) -> dict[str, Any] | None:
        try:
            record = decode(self._local.get(name))
            is_ours = record["schema"] == commits.COMMIT_SCHEMA and record["fingerprint"] == self._fingerprint
            is_ours &= name == layout.commit_key(record["shard"], record["key"])
            digests = {file: file_sha256(self._folder / file) for file in _files(record)}
            is_whole = digests[record["file"]] == record["sha256"]
            is_whole &= all(f"-{digest[:8]}." in file for file, digest in digests.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if is_ours and is_whole else None

    def _room(self) -> int:
        """Bytes that may still come; none where the disk does not tell."""
        used = sum(found.st_size for found in _look(self._base) if stat.S_ISREG(found.st_mode))
        with suppress(OSError):
            return min(self._cap_bytes - used, shutil.disk_usage(self._base).free - KEPT_FREE)
        return -1

    def _is_ours(self) -> bool:
        """Whether nobody else can write there: others may know the name of a folder in a place that all share."""
        with suppress(OSError):
            self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._base.lstat()
            return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        return False

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The decoders of a node look for room one after the other."""
        with (self._base / ".turn").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _files(record: Mapping[str, Any]) -> list[str]:
    return [file for file in (record["file"], record["poster"]) if file]


def _look(folder: Path) -> Iterator[os.stat_result]:
    """Of the folders and files in it, and itself, but what goes while we look."""
    for place, _, names in os.walk(folder):
        for name in (".", *names):
            with suppress(OSError):
                yield os.lstat(os.path.join(place, name))
