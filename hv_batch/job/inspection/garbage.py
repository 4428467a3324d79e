"""What an output root holds and nobody needs: found from listings, removed on demand.

Killed workers leave media and posters that no record names (uploaded, never committed, or by the slower of two),
latents and step checkpoints of samples that are done, tars and tables of a seal that did not come to its end, drafts
and unfinished uploads. None of it harms a run; it costs space.

Nothing is garbage that a living writer may be about to name: everything younger than the caller's `min_age_s` is left
alone, and who removes holds the lease of the root.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hv_batch.job import layout
from hv_batch.job.manifest.index import read_index
from hv_batch.job.records.commits import read_commit
from hv_batch.job.records.run_document import plan_size, read_run
from hv_batch.job.storage.store import Leftover, Store
from hv_batch.job.thread_map import map_in_threads

SCANNERS = 16  # listings wait for the store, not for the CPU

# A media file and what goes with it: the sample's key, eight digits of the file's hash, a suffix. Nothing else in the
# folder is ours to judge.
_MEDIA = re.compile(r"(?P<key>.+)-(?P<hash>[0-9a-f]{8})\.[A-Za-z0-9]+")


class Kind(StrEnum):
    MEDIA = "media"  # no commit record names it
    POSTER = "poster"  # the same of a first frame
    SEAL = "seal"  # what was written for the seal of a shard that is open, and will be again
    PLAN = "plan"  # a part of the checked manifest that the index does not name
    LATENTS = "latents"  # of a sample that is committed or quarantined
    STEPS = "steps"  # the same of a step checkpoint
    DRAFT = "draft"  # hidden, of a writer that was killed
    UPLOAD = "upload"  # parts of an object that was never finished


@dataclass(frozen=True, slots=True)
class Garbage:
    """One thing that nobody needs. `modified` in seconds since 1970."""

    kind: Kind
    name: str
    modified: float
    leftover: Leftover | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind.value, "name": self.name, "modified": self.modified}


def find_garbage(store: Store, *, older_than: float) -> Iterator[Garbage]:
    """Everything last written before `older_than` (seconds since 1970). Raises UserError when the root holds no run."""
    run = read_run(store)
    _, shards = plan_size(run)
    has_posters = bool(run["config"].get("media", {}).get("poster"))
    keeps_latents = bool(run["config"]["output"].get("keep_latents"))

    def scan(shard: int) -> list[tuple[Kind, str]]:
        return list(_of_shard(store, shard, has_posters, keeps_latents))

    for found in map_in_threads(scan, range(shards), SCANNERS):
        yield from _old(store, found, older_than)
    yield from _old(store, [(Kind.PLAN, name) for name in _unnamed_parts(store)], older_than)
    for leftover in store.leftovers():
        if leftover.modified < older_than:
            kind = Kind.DRAFT if leftover.upload is None else Kind.UPLOAD
            yield Garbage(kind, leftover.name, leftover.modified, leftover)


def remove(store: Store, garbage: Garbage) -> None:
    if garbage.leftover is not None:
        store.remove_leftover(garbage.leftover)
    else:
        store.delete(garbage.name)


def _old(store: Store, found: Iterable[tuple[Kind, str]], older_than: float) -> Iterator[Garbage]:
    for kind, name in found:
        try:
            modified = store.modified(name)
        except FileNotFoundError:  # somebody removed it since the listing
            continue
        if modified < older_than:
            yield Garbage(kind, name, modified)


def _of_shard(store: Store, shard: int, has_posters: bool, keeps_latents: bool) -> Iterator[tuple[Kind, str]]:
    # Media first: what is uploaded after this listing is not in it, what is committed after it has its record below.
    media = list(store.list(layout.media_dir(shard)))
    posters = list(store.list(layout.poster_dir(shard))) if has_posters else []
    latents = list(store.list(layout.latent_dir(shard)))
    steps = list(store.list(f"{layout.STEPS}{layout.shard_name(shard)}/"))
    committed = layout.sample_keys(store.list(layout.commit_dir(shard)))
    terminal = committed | layout.sample_keys(store.list(layout.quarantine_dir(shard)))
    for kind, names, named_by in ((Kind.MEDIA, media, "file"), (Kind.POSTER, posters, "poster")):
        for name in _orphans(store, shard, names, committed, named_by):
            yield kind, name
    for kind, names in ((Kind.LATENTS, [] if keeps_latents else latents), (Kind.STEPS, steps)):
        for name in names:
            if layout.sample_key(name) in terminal:
                yield kind, name
    if layout.metadata_key(shard) not in media:
        for name in (layout.tar_key(shard), layout.lineage_key(shard), layout.totals_key(shard)):
            if store.exists(name) and not store.exists(layout.metadata_key(shard)):  # it may have been sealed meanwhile
                yield Kind.SEAL, name


def _orphans(store: Store, shard: int, names: Sequence[str], committed: frozenset[str], named_by: str) -> Iterator[str]:
    """Files of one folder that no record names in its `named_by`.

    A record is read only where more than one version of a sample's file lies there.
    """
    versions: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if match := _MEDIA.fullmatch(name.rpartition("/")[2]):
            versions[match["key"]][match["hash"]].append(name)
    for key, by_hash in versions.items():
        kept = None
        if key in committed:
            if len(by_hash) == 1:
                continue  # the one there is; whether it is the right one is for `verify` to say
            try:
                kept = _version(read_commit(store, shard, key)[named_by])
            except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
                continue  # `verify` tells what is wrong with it
        for version, files in by_hash.items():
            if version != kept:
                yield from files


def _version(name: str) -> str:
    """The hash in the name of a media file or poster. Raises TypeError for a name that has none."""
    match = _MEDIA.fullmatch(name.rpartition("/")[2])
    if match is None:
        raise TypeError(f"{name} holds no hash")
    return match["hash"]


def _unnamed_parts(store: Store) -> list[str]:
    """Parts of the checked manifest from a start that was cut short, or by another version of this program."""
    parts = [name for name in store.list(layout.PLAN) if name != layout.INDEX]  # before the document: it comes last
    try:
        named = {part.name for part in read_index(store).parts}
    except FileNotFoundError:
        named = set()
    except ValueError:  # `verify` tells what is wrong with it
        return []
    return [name for name in parts if name not in named]
