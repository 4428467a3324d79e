"""The committed samples of a root by the identity under which they were rendered (`hv_batch.job.records.continuation`).

Only a root that continued with a grown manifest or an allowed change has more than one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hv_batch.job.dataset.committed import committed_records
from hv_batch.job.dataset.seal import read_table
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.records.commits import scan_shard
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads

SCANNERS = 16  # tables are read while the store is waited for
MAX_LINES = 20  # identities in a text
MAX_NAMED = 5  # changed paths in a line


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityCount:
    """One identity of a root. The last one has neither `replaced_at` nor `changed`."""

    fingerprint: str
    committed: int
    replaced_at: str | None = None  # ISO 8601
    changed: tuple[str, ...] = ()  # what the next identity changed, as dotted paths

    def render(self) -> str:
        then = f"until {self.replaced_at}, then changed: {name_paths(self.changed)}" if self.replaced_at else "now"
        return f"{self.committed:>9,}  {self.fingerprint[:8]}  {then}"


def name_paths(changed: Sequence[str]) -> str:
    more = len(changed) - MAX_NAMED
    return ", ".join(changed[:MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def with_history(run: Mapping[str, Any], counts: Mapping[str, int]) -> tuple[IdentityCount, ...]:
    """The identities of a run (its run.json), oldest first, with the committed samples of each by fingerprint; empty if
    the run has had only one. An identity to which the run went back is counted where it is named last.
    """
    steps = [(each["fingerprint"], each["replaced_at"], tuple(each["changed"])) for each in run.get("earlier", ())]
    if not steps:
        return ()
    steps.append((run["fingerprint"], None, ()))
    last = {fingerprint: at for at, (fingerprint, _, _) in enumerate(steps)}
    return tuple(
        IdentityCount(
            fingerprint=fingerprint,
            committed=counts.get(fingerprint, 0) if last[fingerprint] == at else 0,
            replaced_at=replaced_at,
            changed=changed,
        )
        for at, (fingerprint, replaced_at, changed) in enumerate(steps)
    )


def count_identities(
    store: Store, run: Mapping[str, Any], sealed: Mapping[int, bool], max_records: float = math.inf
) -> tuple[IdentityCount, ...]:
    """The committed samples of some shards by identity; empty as `with_history`.

    `sealed` says of each shard whether it is sealed. Its table is read then, otherwise its records, unless all shards
    together have more than `max_records` of these.
    """
    if not run.get("earlier"):
        return ()
    planned, counts = PlannedKeys(store, run), Counter[str]()
    tables = map_in_threads(lambda shard: _of_table(store, shard) if sealed[shard] else None, sealed, SCANNERS)
    unread = []
    for shard, named in zip(sealed, tables, strict=True):
        if named is None:
            unread.append(shard)
        else:
            counts.update(named)
    if sum(map_in_threads(lambda shard: len(scan_shard(store, shard).committed), unread, SCANNERS)) <= max_records:
        counts.update(record["fingerprint"] for record in committed_records(store, planned, unread, lambda _: None))
    return with_history(run, counts)


def describe(identities: Sequence[IdentityCount], committed: int) -> list[str]:
    """Lines for a text; none if there is only one identity. `committed` is the number of committed samples."""
    if not identities:
        return []
    lines = ["this run has continued with changes; committed samples by the identity that rendered them:"]
    lines += [each.render() for each in identities[-MAX_LINES:]]
    if (others := committed - sum(each.committed for each in identities[-MAX_LINES:])) > 0:
        lines.append(f"{others:>9,}  under older identities, or not counted")
    return lines


def _of_table(store: Store, shard: int) -> list[str] | None:
    """The fingerprints of the rows of a sealed shard; None if its table cannot be read."""
    try:
        column = read_table(store, shard, ["fingerprint"]).to_pydict()["fingerprint"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return [name for name in column if isinstance(name, str)]
