"""What an output root holds and nobody needs: found from listings, removed on demand.

Killed workers leave media that no record names (uploaded, never committed, or by the slower of two), latents and step
checkpoints of samples that are done, drafts and unfinished uploads. None of it harms a run; it costs space.

Nothing is garbage that a living writer may be about to name: everything younger than the caller's `min_age_s` is left
alone, and who removes holds the lease of the root.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hv_batch.job import layout
from hv_batch.job.commits import read_commit
from hv_batch.job.runs import read_run
from hv_batch.job.status import plan_size
from hv_batch.job.storage import Leftover, Store

SCANNERS = 16  # listings wait for the store, not for the CPU
WINDOW = 1024  # shards queued at once

# A media file and what goes with it: the sample's key, eight digits of the file's hash, a suffix. Nothing else in the
# folder is ours to judge.
_MEDIA = re.compile(r"(?P<key>.+)-(?P<hash>[0-9a-f]{8})\.[A-Za-z0-9]+")


class Kind(StrEnum):
    MEDIA = "media"  # no commit record names it
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
    keeps_latents = bool(run["config"]["output"].get("keep_latents"))
    with ThreadPoolExecutor(SCANNERS, thread_name_prefix="garbage") as pool:
        for first in range(0, shards, WINDOW):
            window = range(first, min(first + WINDOW, shards))
            for found in pool.map(lambda shard: list(_of_shard(store, shard, keeps_latents)), window):
                for kind, name in found:
                    try:
                        modified = store.modified(name)
                    except FileNotFoundError:  # somebody removed it since the listing
                        continue
                    if modified < older_than:
                        yield Garbage(kind, name, modified)
    for leftover in store.leftovers():
        if leftover.modified < older_than:
            kind = Kind.DRAFT if leftover.upload is None else Kind.UPLOAD
            yield Garbage(kind, leftover.name, leftover.modified, leftover)


def remove(store: Store, garbage: Garbage) -> None:
    if garbage.leftover is not None:
        store.remove_leftover(garbage.leftover)
    else:
        store.delete(garbage.name)


def _of_shard(store: Store, shard: int, keeps_latents: bool) -> Iterator[tuple[Kind, str]]:
    # Media first: what is uploaded after this listing is not in it, what is committed after it has its record below.
    media = list(store.list(layout.media_dir(shard)))
    latents = list(store.list(layout.latent_dir(shard)))
    steps = list(store.list(f"{layout.STEPS}{layout.shard_name(shard)}/"))
    committed = frozenset(map(layout.sample_key, store.list(layout.commit_dir(shard))))
    terminal = committed | frozenset(map(layout.sample_key, store.list(layout.quarantine_dir(shard))))
    for name in _orphans(store, shard, media, committed):
        yield Kind.MEDIA, name
    for kind, names in ((Kind.LATENTS, [] if keeps_latents else latents), (Kind.STEPS, steps)):
        for name in names:
            if layout.sample_key(name) in terminal:
                yield kind, name


def _orphans(store: Store, shard: int, media: list[str], committed: frozenset[str]) -> Iterator[str]:
    """Media that no record names. A record is read only where more than one version of a sample's media lies there."""
    versions: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in media:
        if match := _MEDIA.fullmatch(name.removeprefix(layout.media_dir(shard))):
            versions[match["key"]][match["hash"]].append(name)
    for key, by_hash in versions.items():
        kept = None
        if key in committed:
            if len(by_hash) == 1:
                continue  # the one there is; whether it is the right one is for `verify` to say
            try:
                kept = read_commit(store, shard, key)["sha256"][:8]
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue  # `verify` tells what is wrong with it
        for version, names in by_hash.items():
            if version != kept:
                yield from names
