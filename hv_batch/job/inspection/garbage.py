"""Finds files in an output root that are no longer needed, from listings, and removes them on request.

Killed workers leave media and posters that no record names (uploaded but not committed, or by the slower of two
workers), latents and step checkpoints of terminal samples, tars and tables of an interrupted seal, drafts and
unfinished uploads. These files do not affect a run, but they take space.

A running writer may be about to name a new file in a record. Callers must therefore pass an age limit (`older_than`),
and must hold the lease of the root while they remove files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hv_batch.job import layout
from hv_batch.job.event_log.reader import list_parts
from hv_batch.job.manifest.index import read_index
from hv_batch.job.records.commits import find_shards, read_commit
from hv_batch.job.records.run_document import plan_size, read_run
from hv_batch.job.records.run_identity import recorded_poster
from hv_batch.job.records.withdrawn import withdrawn_keys
from hv_batch.job.storage.store import Leftover, Store
from hv_batch.job.thread_map import map_in_threads

SCANNERS = 16  # listings wait for the store, not for the CPU

# The name of a media file or poster: the sample's key, eight digits of the file's hash, a suffix. Other files in the
# folder are ignored.
_MEDIA = re.compile(r"(?P<key>.+)-(?P<hash>[0-9a-f]{8})\.[A-Za-z0-9]+")


class Kind(StrEnum):
    MEDIA = "media"  # no commit record names it
    POSTER = "poster"  # no commit record names it
    SEAL = "seal"  # a table or tar of a shard that is not sealed; the next seal writes it again
    PLAN = "plan"  # a part of the checked manifest that the index does not name
    EVENTS = "events"  # of a driver that is older than those whose events are read
    LATENTS = "latents"  # of a committed, quarantined or withdrawn sample
    STEPS = "steps"  # as LATENTS: a step checkpoint
    DRAFT = "draft"  # a hidden file of a killed writer
    UPLOAD = "upload"  # the parts of an unfinished multipart upload


@dataclass(frozen=True, slots=True)
class Garbage:
    """One file or upload that is not needed. `modified` is the time of its last write in seconds since 1970."""

    kind: Kind
    name: str
    modified: float
    leftover: Leftover | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind.value, "name": self.name, "modified": self.modified}


def find_garbage(store: Store, *, older_than: float) -> Iterator[Garbage]:
    """Yields all garbage last written before `older_than` (seconds since 1970). Raises UserError if there is no run."""
    run = read_run(store)
    shards = find_shards(store, range(plan_size(run)[1]), (*layout.SHARD_FOLDERS, *layout.SEAL_FOLDERS))
    has_posters = recorded_poster(run["identity"]) is not False
    keeps_latents = bool(run["config"]["output"].get("keep_latents"))

    def scan(shard: int) -> list[tuple[Kind, str]]:
        return list(_of_shard(store, shard, has_posters, keeps_latents))

    for candidates in map_in_threads(scan, shards, SCANNERS):
        yield from _old(store, candidates, older_than)
    yield from _old(store, [(Kind.PLAN, name) for name in _unnamed_parts(store)], older_than)
    yield from _old(store, [(Kind.EVENTS, name) for name in _unread_events(store)], older_than)
    for leftover in store.leftovers():
        if leftover.modified < older_than:
            kind = Kind.DRAFT if leftover.upload is None else Kind.UPLOAD
            yield Garbage(kind, leftover.name, leftover.modified, leftover)


def remove(store: Store, garbage: Garbage) -> None:
    if garbage.leftover is not None:
        store.remove_leftover(garbage.leftover)
    else:
        store.delete(garbage.name)


def _old(store: Store, candidates: Iterable[tuple[Kind, str]], older_than: float) -> Iterator[Garbage]:
    for kind, name in candidates:
        try:
            modified = store.modified(name)
        except FileNotFoundError:  # removed after the listing
            continue
        if modified < older_than:
            yield Garbage(kind, name, modified)


def _of_shard(store: Store, shard: int, has_posters: bool, keeps_latents: bool) -> Iterator[tuple[Kind, str]]:
    # Media must be listed before records. A file that is uploaded later is then not in the list, and a file that is
    # committed later has its record in the listing of records.
    media = list(store.list(layout.media_dir(shard)))
    posters = list(store.list(layout.poster_dir(shard))) if has_posters else []
    latents = list(store.list(layout.latent_dir(shard)))
    steps = list(store.list(f"{layout.STEPS}{layout.shard_name(shard)}/"))
    committed = layout.sample_keys(store.list(layout.commit_dir(shard)))
    withdrawn = withdrawn_keys(store, shard)
    committed -= withdrawn
    terminal = committed | withdrawn | layout.sample_keys(store.list(layout.quarantine_dir(shard)))
    for kind, names, named_by in ((Kind.MEDIA, media, "file"), (Kind.POSTER, posters, "poster")):
        for name in _orphans(store, shard, names, committed, named_by):
            yield kind, name
    finished = withdrawn if keeps_latents else terminal
    for kind, names, owners in ((Kind.LATENTS, latents, finished), (Kind.STEPS, steps, terminal)):
        for name in names:
            if layout.sample_key(name) in owners:
                yield kind, name
    if layout.metadata_key(shard) not in media:
        for name in (layout.tar_key(shard), layout.lineage_key(shard), layout.totals_key(shard)):
            if store.exists(name) and not store.exists(layout.metadata_key(shard)):  # sealed meanwhile?
                yield Kind.SEAL, name


def _orphans(store: Store, shard: int, names: Sequence[str], committed: frozenset[str], named_by: str) -> Iterator[str]:
    """Yields the files of one folder that no commit record names in its field `named_by`.

    A record is read only if the folder holds more than one version of a sample's file.
    """
    versions: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if match := _MEDIA.fullmatch(name.rpartition("/")[2]):
            versions[match["key"]][match["hash"]].append(name)
    for key, by_hash in versions.items():
        kept = None
        if key in committed:
            if len(by_hash) == 1:
                continue  # the only version; `verify` checks whether it is the recorded one
            try:
                kept = _version(read_commit(store, shard, key)[named_by])
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                continue  # `verify` reports the damaged record
        for version, files in by_hash.items():
            if version != kept:
                yield from files


def _version(name: str) -> str:
    """The hash in the name of a media file or poster. Raises TypeError if there is none."""
    match = _MEDIA.fullmatch(name.rpartition("/")[2])
    if match is None:
        raise TypeError(f"{name} contains no hash")
    return match["hash"]


def _unnamed_parts(store: Store) -> list[str]:
    """Parts of the checked manifest from an interrupted start, or from another version of this program."""
    # The parts must be listed before the index document is read, because the document is written last.
    parts = [name for name in store.list(layout.PLAN) if name != layout.INDEX]
    try:
        named = {part.name for part in read_index(store).parts}
    except FileNotFoundError:
        named = set()
    except ValueError:  # `verify` reports the damaged index
        return []
    return [name for name in parts if name not in named]


def _unread_events(store: Store) -> list[str]:
    """Parts of events that nothing reads, because there are too many newer ones."""
    read = set(list_parts(store))
    return [name for name in store.list(layout.EVENTS) if layout.event_driver(name) and name not in read]
