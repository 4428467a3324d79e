"""Quarantined samples: reads their records, groups them by reason, and releases samples for a retry.

A released sample starts with its full retry budget. Its quarantine record is kept under retried/, and the attempts in
it precede the new ones in the sample's next terminal record.

Ten thousand samples usually fail for a few reasons only. Records are therefore grouped by class and by the first line
of their message with every number replaced, and each group keeps a few keys as examples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError, read
from hv_batch.job.documents.schema import RetriedRecord
from hv_batch.job.failure import Failure
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.records.commits import read_quarantine, scan_shard
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

MAX_GROUPS = 100  # of one class; further messages are counted under OTHER_REASONS
MAX_EXAMPLES = 3
MAX_REASON_CHARS = 160
OTHER_REASONS = "(other messages)"
UNREADABLE = "(unreadable)"  # the class reported for a damaged record

# Addresses, counts, row numbers and the like differ from sample to sample and do not describe the cause.
_VARYING = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?", re.I)


@dataclass(frozen=True, slots=True)
class Reason:
    """A group of quarantined samples with the same class and message."""

    kind: str  # a failure class
    message: str
    samples: int
    examples: tuple[str, ...]  # keys

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.kind} | {name: value for name, value in asdict(self).items() if name != "kind"}

    def render(self) -> str:
        return f"{self.samples:>9,}  {self.kind:<9} {self.message}  (as {', '.join(self.examples)})"


def read_quarantined(
    store: Store, shards: Iterable[int], kinds: Collection[str] = (), planned: PlannedKeys | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the quarantine records of `shards` in plan order; only those of the classes `kinds`, if any are given.

    `planned` leaves out records that belong to no sample. The records of one shard are held in memory.
    """
    for shard in shards:
        keys = scan_shard(store, shard, keys=planned.of(shard) if planned else None).quarantined
        records = map_in_threads(partial(read_failed, store, shard), keys, store.readers)
        selected = (record for record in records if record and (not kinds or record["class"] in kinds))
        yield from sorted(selected, key=itemgetter("row", "video_index"))


def read_failed(store: Store, shard: int, key: str) -> dict[str, Any] | None:
    """The quarantine record of a sample, or what stands for a damaged one; None if there is none any more."""
    try:
        return read_quarantine(store, shard, key)
    except FileNotFoundError:  # the sample was committed after the listing
        return None
    except InvalidObjectError as error:
        # The sample is quarantined in any case: it is counted and can be released.
        message = f"its quarantine record cannot be read: {error.problem}"
        unknown = {"row": 0, "video_index": 0, "attempts": 0, "traceback": "", "history": [], "params": {"prompt": ""}}
        return {"shard": shard, "key": key, "id": key, "class": UNREADABLE, "message": message, **unknown}


def group_reasons(records: Iterable[Mapping[str, Any]]) -> list[Reason]:
    """The records by class and message, most samples first."""
    counts: Counter[tuple[str, str]] = Counter()
    groups: Counter[str] = Counter()
    examples: dict[tuple[str, str], list[str]] = {}
    for record in records:
        reason = (record["class"], normalize_message(record["message"]))
        if reason not in counts:
            groups[record["class"]] += 1
            if groups[record["class"]] > MAX_GROUPS:
                reason = (record["class"], OTHER_REASONS)
        counts[reason] += 1
        if len(keys := examples.setdefault(reason, [])) < MAX_EXAMPLES:
            keys.append(record["key"])
    return [Reason(*reason, count, tuple(examples[reason])) for reason, count in counts.most_common()]


def normalize_message(message: str) -> str:
    """The first line of a message without its numbers: equal for samples that failed for the same reason."""
    first_line = message.strip().partition("\n")[0]
    return _VARYING.sub("#", first_line)[:MAX_REASON_CHARS]


def release(store: Store, records: Iterable[Mapping[str, Any]]) -> int:
    """Make the samples of these quarantine records pending again. Returns their number.

    For each shard, the seals are removed first (the run's, then the shard's), then the records; each record is copied
    to retried/ before. A crash in between leaves a root without a seal: the same run command seals complete shards
    again and renders pending samples. In the opposite order, a sealed run could hide a pending sample for ever.
    """
    released = 0
    for shard, members in groupby(records, key=itemgetter("shard")):
        unseal_shard(store, shard)
        for record in members:
            store.put(layout.retried_key(shard, record["key"]), encode(record))
            store.delete(layout.quarantine_key(shard, record["key"]))
            released += 1
    return released


def failed_keys(store: Store, shards: Iterable[int]) -> dict[int, frozenset[str]]:
    """For each shard, the keys of samples that are quarantined, or were released and are not committed yet.

    Shards without such samples are left out. Released samples are included so that a command that was killed after it
    released samples finds them again.
    """

    def of_shard(shard: int) -> frozenset[str]:
        state = scan_shard(store, shard)
        return (state.quarantined | taken_back(store, shard)) - state.committed - state.withdrawn

    numbers = list(shards)
    failed = map_in_threads(of_shard, numbers, store.readers)
    return {shard: keys for shard, keys in zip(numbers, failed, strict=True) if keys}


def taken_back(store: Store, shard: int) -> frozenset[str]:
    """The keys of samples that were quarantined and then released, whatever their state is now."""
    return layout.sample_keys(store.list(layout.retried_dir(shard)))


def earlier_failures(store: Store, shard: int, keys: Iterable[str]) -> dict[str, tuple[Failure, ...]]:
    """The failures in the retried/ records of the samples `keys`, by key."""
    return {key: _read_history(store, layout.retried_key(shard, key)) for key in keys}


def _read_history(store: Store, name: str) -> tuple[Failure, ...]:
    try:
        history = read(store, name, RetriedRecord)["history"]
        return tuple(map(Failure.from_dict, history))
    except (FileNotFoundError, ValueError, TypeError):  # a damaged history must not prevent the retry
        return ()
