"""The samples that were given up: why, in groups that a person can read, and taking them back.

A sample that is taken back begins with its full budget, but what it had failed of is not forgotten: its quarantine
record is kept under retried/, and the tries in it stand before the new ones in the record that the sample ends with.

Ten thousand samples are given up for three reasons, not for ten thousand: messages are grouped by class and by their
first line with every number replaced, and each group keeps a few keys to look at.
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
from hv_batch.job.failure import Failure
from hv_batch.job.records.commits import read_quarantine, scan_shard
from hv_batch.job.records.seals import unseal_shard
from hv_batch.job.storage.canonical_json import decode, encode
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

MAX_GROUPS = 100  # of one class; what does not fit is counted together
MAX_EXAMPLES = 3
MAX_REASON_CHARS = 160
OTHER_REASONS = "(other messages)"
UNREADABLE = "(unreadable)"  # the class of a record that somebody else has damaged

_NEEDED = {
    "id": str,
    "row": int,
    "video_index": int,
    "class": str,
    "message": str,
    "traceback": str,
    "attempts": int,
    "history": list,
    "params": dict,
}

# Addresses, counts, row numbers and the like differ from sample to sample and say nothing about the cause.
_VARYING = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?", re.I)


@dataclass(frozen=True, slots=True)
class Reason:
    """Quarantined samples that failed alike."""

    kind: str  # a failure class
    message: str
    samples: int
    examples: tuple[str, ...]  # keys

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.kind} | {name: value for name, value in asdict(self).items() if name != "kind"}

    def render(self) -> str:
        return f"{self.samples:>9,}  {self.kind:<9} {self.message}  (as {', '.join(self.examples)})"


def read_quarantined(store: Store, shards: Iterable[int], kinds: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Quarantine records of `shards` in plan order, of all classes or those of `kinds`; one shard in memory."""
    for shard in shards:
        keys = scan_shard(store, shard).quarantined
        found = map_in_threads(partial(_read, store, shard), keys, store.readers)
        wanted = (record for record in found if record and (not kinds or record["class"] in kinds))
        yield from sorted(wanted, key=itemgetter("row", "video_index"))


def _read(store: Store, shard: int, key: str) -> dict[str, Any] | None:
    try:
        record = read_quarantine(store, shard, key)
        if wrong := [name for name, kind in _NEEDED.items() if not isinstance(record[name], kind)]:
            raise ValueError(f"{', '.join(wrong)} of it are no such thing")
        return record | {"shard": shard, "key": key}
    except FileNotFoundError:  # committed since the listing
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # The sample is given up all the same: it is counted, and can be taken back.
        message = f"its quarantine record cannot be read: {type(error).__name__}: {error}"
        unknown = {"row": 0, "video_index": 0, "attempts": 0, "traceback": "", "history": [], "params": {"prompt": ""}}
        return {"shard": shard, "key": key, "id": key, "class": UNREADABLE, "message": message, **unknown}


def group_reasons(records: Iterable[Mapping[str, Any]]) -> list[Reason]:
    """The records by class and message, most samples first."""
    counts: Counter[tuple[str, str]] = Counter()
    groups: Counter[str] = Counter()
    examples: dict[tuple[str, str], list[str]] = {}
    for record in records:
        reason = (record["class"], _shape(record["message"]))
        if reason not in counts:
            groups[record["class"]] += 1
            if groups[record["class"]] > MAX_GROUPS:
                reason = (record["class"], OTHER_REASONS)
        counts[reason] += 1
        if len(keys := examples.setdefault(reason, [])) < MAX_EXAMPLES:
            keys.append(record["key"])
    return [Reason(*reason, count, tuple(examples[reason])) for reason, count in counts.most_common()]


def _shape(message: str) -> str:
    first_line = message.strip().partition("\n")[0]
    return _VARYING.sub("#", first_line)[:MAX_REASON_CHARS]


def release(store: Store, records: Iterable[Mapping[str, Any]]) -> int:
    """Make the samples of these quarantine records pending again; how many.

    Shard by shard, first the seals (the run's, then the shard's), then the records, each kept under retried/ before it
    goes. A crash in between leaves a root that claims less than it holds: the same run command seals again what is
    complete and renders what is pending. The other way round, a sealed run would hide a pending sample for ever.
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
    """The samples that are quarantined, or were and have not been committed since; of every shard that has any.

    So a command that was killed after it had taken samples back finds them again.
    """

    def of_shard(shard: int) -> frozenset[str]:
        state = scan_shard(store, shard)
        return (state.quarantined | taken_back(store, shard)) - state.committed

    numbers = list(shards)
    found = map_in_threads(of_shard, numbers, store.readers)
    return {shard: keys for shard, keys in zip(numbers, found, strict=True) if keys}


def taken_back(store: Store, shard: int) -> frozenset[str]:
    """The samples that were given up once and then taken back, whatever became of them since."""
    return layout.sample_keys(store.list(layout.retried_dir(shard)))


def earlier_failures(store: Store, shard: int, keys: Iterable[str]) -> dict[str, tuple[Failure, ...]]:
    """What those samples had failed of that were taken back, by key."""
    return {key: _read_history(store, layout.retried_key(shard, key)) for key in keys}


def _read_history(store: Store, name: str) -> tuple[Failure, ...]:
    try:
        return tuple(map(Failure.from_dict, decode(store.get(name))["history"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # no reason not to render it
        return ()
