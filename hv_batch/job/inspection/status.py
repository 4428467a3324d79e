"""The state of an output root, read from storage alone: without Ray or a driver, during a run or years later.

The status is what a resume would find: a sample is committed, quarantined or withdrawn if its record exists, and
pending otherwise. For each shard only counts are kept. The reasons of quarantine records are grouped. Objects that
belong to no sample are not counted; `verify` reports them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.committed import committed_records
from hv_batch.job.dataset.shard_totals import read_totals
from hv_batch.job.documents.reading import InvalidObjectError
from hv_batch.job.formatting import plural
from hv_batch.job.inspection.activity import Activity
from hv_batch.job.inspection.identity_counts import IdentityCount, describe
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.quality import describe_looks, look
from hv_batch.job.records.choices import read_choices
from hv_batch.job.records.commits import find_shards, scan_shard
from hv_batch.job.records.lease_holder import LeaseHolder, is_gone, read_lease
from hv_batch.job.records.quarantine import Reason, group_reasons, read_quarantined
from hv_batch.job.records.run_document import chosen_shards, plan_size, read_run, shard_samples
from hv_batch.job.records.withdrawn import all_withdrawn, read_tombstone
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.job.thread_map import map_in_threads
from hv_batch.job.user_input import shorten

SCANNERS = 16  # listings wait for the store, not for the CPU
MAX_RECORDS = 1000  # that are read for their looks; of a longer run, only sealed shards count
MAX_WITHDRAWALS = 20  # reasons that are read
MAX_SHARDS = 100_000  # of a status; if the run has more, shards without any object are only counted
MAX_LINES = 100  # shards in the text table; if there are more, only those that need attention are listed


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    shard: int
    samples: int
    committed: int
    quarantined: int
    sealed: bool
    withdrawn: int = 0

    @property
    def pending(self) -> int:
        # More records than samples: foreign ones, in a root without an index that would tell them apart.
        return max(0, self.samples - self.committed - self.quarantined - self.withdrawn)

    @property
    def state(self) -> str:
        """`sealed`, `sealed, records missing`, `complete` (terminal but not sealed), `partial` or `untouched`."""
        if self.sealed:
            return "sealed" if self.pending == 0 else "sealed, records missing"
        if self.pending == 0:
            return "complete"
        return "partial" if self.committed or self.quarantined or self.withdrawn else "untouched"

    @property
    def needs_attention(self) -> bool:
        return not self.sealed or self.pending > 0 or self.quarantined > 0

    def to_dict(self) -> dict[str, Any]:
        """The shard as JSON values; `withdrawn` is absent if it is 0."""
        counts = {name: value for name, value in asdict(self).items() if name != "withdrawn" or value}
        return counts | {"pending": self.pending, "state": self.state}

    def render(self) -> str:
        gone = f", {self.withdrawn:,} withdrawn" if self.withdrawn else ""
        return (
            f"{layout.shard_name(self.shard):<14}{self.samples:>9,}{self.committed:>11,}{self.quarantined:>13,}"
            f"{self.pending:>9,}  {self.state}{gone}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """An output root, or some of its shards, at one moment.

    `finished` means that `_SUCCESS` exists: no sample is pending and every shard is sealed. `holder` is the process in
    the lease, which has not released it.
    """

    url: str
    finished: bool
    shards: tuple[ShardStatus, ...]
    reasons: tuple[Reason, ...] = ()
    looks: Mapping[str, int] = field(default_factory=dict)  # `count_looks`
    choices: Mapping[str, str] = field(default_factory=dict)  # of the engine, such as the kernel of `attention: auto`
    matching: int | None = None  # committed samples that satisfy the conditions, if any are given
    identities: tuple[IdentityCount, ...] = ()  # `count_identities`; empty unless the run has continued with changes
    holder: LeaseHolder | None = None
    activity: Activity | None = None  # of the last driver, if it has written events
    withdrawals: tuple[Mapping[str, Any], ...] = ()  # the key and the reason of the first MAX_WITHDRAWALS
    untouched_shards: int = 0  # that are not in `shards`, because the root has no object of them (MAX_SHARDS)
    untouched_samples: int = 0

    @property
    def shard_count(self) -> int:
        return len(self.shards) + self.untouched_shards

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards) + self.untouched_samples

    @property
    def committed(self) -> int:
        return sum(shard.committed for shard in self.shards)

    @property
    def quarantined(self) -> int:
        return sum(shard.quarantined for shard in self.shards)

    @property
    def pending(self) -> int:
        return sum(shard.pending for shard in self.shards) + self.untouched_samples

    @property
    def withdrawn(self) -> int:
        return sum(shard.withdrawn for shard in self.shards)

    @property
    def sealed(self) -> int:
        return sum(shard.sealed for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """The status as JSON values: totals, then every shard."""
        return {
            "url": self.url,
            "finished": self.finished,
            "samples": self.samples,
            "committed": self.committed,
            "quarantined": self.quarantined,
            "pending": self.pending,
            **({"withdrawn": self.withdrawn, "withdrawals": list(self.withdrawals)} if self.withdrawn else {}),
            "shards_sealed": self.sealed,
            "holder": asdict(self.holder) | {"gone": is_gone(self.holder)} if self.holder else None,
            "activity": self.activity.to_dict() if self.activity else None,
            "looks": dict(self.looks),
            **({"identities": [asdict(each) for each in self.identities]} if self.identities else {}),
            **({"choices": dict(self.choices)} if self.choices else {}),
            **({} if self.matching is None else {"matching": self.matching}),
            "reasons": [reason.to_dict() for reason in self.reasons],
            **({"untouched_shards": self.untouched_shards} if self.untouched_shards else {}),
            "shards": [shard.to_dict() for shard in self.shards],
        }

    def render(self) -> str:
        """The status as text: totals, then a table of shards. Of many shards, only those that need attention."""
        listed = self.shards
        if len(listed) > MAX_LINES:
            listed = tuple(shard for shard in self.shards if shard.needs_attention)
        gone = f", {self.withdrawn:,} withdrawn" if self.withdrawn else ""
        lines = [
            f"{self.url}: {'finished' if self.finished else 'not finished'}",
            f"{self.committed:,} of {self.samples:,} samples committed, {self.quarantined:,} quarantined, "
            f"{self.pending:,} pending{gone}; {self.sealed:,} of {self.shard_count:,} shards sealed",
            *([looks] if (looks := describe_looks(self.looks)) else []),
            *describe(self.identities, self.committed),
            *(f"{option}: {choice} (chosen by the first group)" for option, choice in sorted(self.choices.items())),
            *([f"{self.matching:,} committed samples match --where"] if self.matching is not None else []),
            *([_describe_holder(self.holder)] if self.holder else []),
            *(self.activity.render() if self.activity and not self.finished else []),
            "",
            f"{'shard':<14}{'samples':>9}{'committed':>11}{'quarantined':>13}{'pending':>9}  state",
        ]
        lines += [shard.render() for shard in listed[:MAX_LINES]]
        clean, cut = len(self.shards) - len(listed), len(listed) - len(listed[:MAX_LINES])
        if clean:
            lines.append(f"and {clean:,} shards that are sealed and have no quarantined samples")
        if cut:
            lines.append(f"and {cut:,} more shards that are not; --json lists all")
        if self.untouched_shards:
            lines.append(f"and {plural(self.untouched_shards, 'shard')} without any object")
        if self.reasons:
            lines += ["", "quarantined samples by class and message (# is any number):"]
            lines += [reason.render() for reason in self.reasons[:MAX_LINES]]
        if self.withdrawals:
            lines += ["", f"withdrawn samples (the first {len(self.withdrawals):,} of {self.withdrawn:,}):"]
            lines += [f"  {found['key']}: {shorten(found['reason'])}" for found in self.withdrawals]
        return "\n".join(lines)


def read_status(store: Store, shards: Collection[int] | None = None) -> Status:
    """The status of an output root, or of `shards` only, without `looks`, `identities` and `activity`.

    Raises UserError if the root has no run or no such shard.
    """
    run = read_run(store)
    finished = store.exists(layout.SUCCESS)  # before the scan, because a finished run no longer changes
    planned = PlannedKeys(store, run)
    chosen = chosen_shards(run, shards)
    found = dict(_scan_shards(store, run, planned, find_shards(store, chosen)))
    if is_complete := len(chosen) <= MAX_SHARDS:
        scanned = tuple(found.get(shard) or _untouched(run, shard) for shard in chosen)
    else:
        scanned = tuple(found.values())
    samples = sum(map(partial(shard_samples, run), chosen)) if shards is not None else plan_size(run)[0]
    quarantined = read_quarantined(store, [shard.shard for shard in scanned if shard.quarantined], planned=planned)
    return Status(
        url=public_url(store.url),
        finished=finished,
        shards=scanned,
        reasons=tuple(group_reasons(quarantined)),
        choices=_choices(store),
        holder=read_lease(store),
        withdrawals=tuple(islice(_withdrawals(store, planned, scanned), MAX_WITHDRAWALS)),
        untouched_shards=0 if is_complete else len(chosen) - len(scanned),
        untouched_samples=0 if is_complete else samples - sum(shard.samples for shard in scanned),
    )


def _choices(store: Store) -> Mapping[str, str]:
    """The choices of the engine; none if they cannot be read. `verify` reports that."""
    try:
        return read_choices(store)
    except InvalidObjectError:
        return {}


def _withdrawals(store: Store, planned: PlannedKeys, scanned: Sequence[ShardStatus]) -> Iterator[Mapping[str, Any]]:
    """The key and the reason of each withdrawn sample. `verify` reports damaged tombstones."""
    withdrawn = all_withdrawn(store) if any(shard.withdrawn for shard in scanned) else {}
    for shard in (shard.shard for shard in scanned if shard.withdrawn):
        keys = planned.of(shard)
        for key in sorted(withdrawn.get(shard, frozenset())):
            if keys is not None and key not in keys:
                continue
            try:
                reason = read_tombstone(store, shard, key)["reason"]
            except (FileNotFoundError, InvalidObjectError):
                reason = "(unreadable)"
            yield {"key": key, "reason": reason}


def count_looks(store: Store, status: Status) -> Mapping[str, int]:
    """The committed samples by their look: from the totals of sealed shards, and from the records of a few others."""
    looks: Counter[str] = Counter()
    planned = PlannedKeys(store, read_run(store))
    sealed = [shard for shard in status.shards if shard.sealed]
    unread = [shard for shard in status.shards if not shard.sealed and shard.committed]
    stored = map_in_threads(lambda shard: read_totals(store, shard.shard), sealed, SCANNERS)
    for shard, totals in zip(sealed, stored, strict=True):
        if totals is None:
            unread.append(shard)
        else:
            looks.update(totals.looks)
    if sum(shard.committed for shard in unread) <= MAX_RECORDS:
        for record in committed_records(store, planned, [shard.shard for shard in unread], lambda _: None):
            if scores := record.get("scores"):
                looks[look(scores, record["produced"]["num_frames"])] += 1
    return looks


def _describe_holder(holder: LeaseHolder) -> str:
    if is_gone(holder):
        return f"not released by {holder.describe()}, which has ended; the next run takes over"
    return f"held by {holder.describe()}"


def _untouched(run: Mapping[str, Any], shard: int) -> ShardStatus:
    return ShardStatus(shard=shard, samples=shard_samples(run, shard), committed=0, quarantined=0, sealed=False)


def _scan_shards(
    store: Store, run: Mapping[str, Any], planned: PlannedKeys, shards: Sequence[int]
) -> Iterator[tuple[int, ShardStatus]]:
    def scan(shard: int) -> tuple[int, ShardStatus]:
        state = scan_shard(store, shard, keys=planned.of(shard))
        return shard, ShardStatus(
            shard=shard,
            samples=shard_samples(run, shard),
            committed=len(state.committed),
            quarantined=len(state.quarantined),
            sealed=state.sealed,
            withdrawn=len(state.withdrawn),
        )

    return map_in_threads(scan, shards, SCANNERS)
