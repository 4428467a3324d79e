"""The result of a verification: one `Finding` for each problem, and a report of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from hv_batch.job import layout
from hv_batch.job.documents.reading import InvalidObjectError, unreadable
from hv_batch.job.formatting import plural
from hv_batch.job.inspection.identity_counts import IdentityCount, describe
from hv_batch.job.storage.store import Store

T = TypeVar("T")

MAX_LINES = 100  # findings listed in the text


class Fault(StrEnum):
    """The kind of a problem: of one sample, of the files of a sealed shard, or of the whole run."""

    RECORD = "record"  # cannot be read, or belongs to another sample or run
    TWO_RECORDS = "two records"  # a commit record and a quarantine record
    MISSING = "media missing"
    SIZE = "media size"
    HASH = "media sha256"
    UNDECODABLE = "media does not decode"
    GEOMETRY = "media frames"  # the number of frames or their size differs from the sample's parameters
    POSTER = "poster"  # missing, or its bytes do not have the hash in its name
    TABLE = "metadata"  # cannot be read, or differs from the records
    LINEAGE = "lineage"  # as TABLE
    SUMS = "sums"  # as TABLE: the shard's totals for the summary
    TAR = "tar"  # its members differ from the samples of the table
    PLAN = "plan"  # a part of the checked manifest is missing or damaged
    SUCCESS = "_SUCCESS"  # the run is marked as finished although it is not
    RUN = "run.json"  # contradicts all records, or its config is not valid
    SUMMARY = "summary"  # of a finished run: missing, cannot be read, or differs from the records
    CARD = "card"  # README.md is missing, was edited, or contradicts the run
    TOMBSTONE = "tombstone"  # of a withdrawn sample: cannot be read, or is that of another sample
    WITHDRAWN = "withdrawn sample"  # objects of it are left
    LEASE = "lease"  # cannot be read
    CHOICES = "choices.json"  # cannot be read, so the run cannot continue
    EVENTS = "events"  # a part of a driver's log is damaged; nothing depends on it
    HISTORY = "history"  # the record of a sample that was released for a retry cannot be read
    UNREADABLE = "unreadable"  # the store does not return this object, although it returns others
    FOREIGN = "foreign object"  # belongs to no sample and is counted nowhere


# Faults whose repair does not change a sealed shard. If its table has the row of a withdrawn sample, that is a fault of
# the seal as well.
OUTSIDE_SEAL = frozenset({Fault.TWO_RECORDS, Fault.HISTORY, Fault.FOREIGN, Fault.WITHDRAWN})
# Faults of the files that the run command writes again if they are missing.
REWRITTEN = frozenset({Fault.SUMMARY, Fault.CARD})
# Faults of the files of a seal. A new seal replaces them.
OF_SEAL = frozenset({Fault.TABLE, Fault.LINEAGE, Fault.SUMS, Fault.TAR})


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem. `removes` are the keys that `remove_faults` removes after the seals, in this order.

    `compared_with` is the object that a valid record contradicts (run.json or the index); empty for other faults.
    """

    shard: int | None  # None for the whole run
    key: str | None  # of the sample; None for the shard's tables and tar
    fault: Fault
    details: str
    removes: tuple[str, ...] = ()
    compared_with: str = ""

    @property
    def is_repairable(self) -> bool:
        """Whether the run command repairs the root once `remove_faults` has removed what is faulty."""
        return self.is_removable or self.fault in REWRITTEN

    @property
    def is_removable(self) -> bool:
        """Whether removing what it names repairs the root, after a new render or seal."""
        return bool(self.removes) or self.fault in OF_SEAL

    def render(self) -> str:
        where = "run" if self.shard is None else layout.shard_name(self.shard)
        about = "" if self.key is None else f"{self.key}: "
        return f"{where}  {about}{self.fault.value}: {self.details}"


@dataclass(slots=True)
class Verification:
    """What was checked, and the problems that were found."""

    url: str
    checked: int = 0  # committed samples
    decoded: int = 0
    bytes: int = 0
    tables: int = 0  # sealed shards
    open_shards: int = 0
    compared: bool = False  # whether records were compared with the manifest in plan/
    pending: int = 0
    quarantined: int = 0
    identities: tuple[IdentityCount, ...] = ()  # empty unless the run has continued with changes
    withdrawn: int = 0
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        numbers = {name: value for name, value in asdict(self).items() if name != "findings"}
        if not self.withdrawn:
            del numbers["withdrawn"]
        faults = Counter(finding.fault.value for finding in self.findings)
        findings = [asdict(finding) | {"fault": finding.fault.value} for finding in self.findings]
        return numbers | {"faults": dict(faults), "findings": findings}

    def render(self) -> str:
        gone = f", {self.withdrawn:,} withdrawn" if self.withdrawn else ""
        lines = [
            f"{self.url}: {self.checked:,} committed samples ({self.bytes / 1e9:,.3f} GB), {self.decoded:,} of them "
            f"decoded, and {self.tables:,} sealed shards checked; {self.quarantined:,} samples are quarantined and "
            f"{self.pending:,} pending{gone}",
        ]
        if not self.compared:
            lines.append("the records were not compared with the manifest, which plan/ does not hold")
        lines += describe(self.identities, self.checked)
        lines += [finding.render() for finding in self.findings[:MAX_LINES]]
        if (cut := len(self.findings) - MAX_LINES) > 0:
            lines.append(f"and {cut:,} more; --json lists all")
        lines.append(f"{plural(len(self.findings), 'problem')} found" if self.findings else "no problems found")
        return "\n".join(lines)


def examine(store: Store, key: str, act: Callable[[], T]) -> T | InvalidObjectError:
    """`act()`, which reads the object under `key`, or the reason why this object cannot be used.

    Raises FileNotFoundError if there is none, and the store's error if the store itself does not answer.
    """
    try:
        return act()
    except FileNotFoundError:
        raise
    except InvalidObjectError as error:
        return error
    except OSError as error:
        return unreadable(store, key, error)


def object_finding(
    error: InvalidObjectError, fault: Fault, shard: int | None = None, key: str | None = None, *removes: str
) -> Finding:
    """The finding for an invalid object. An object that could not be read is never removed: it may be intact."""
    details = f"{error.key}: {error.problem}"
    if not error.is_readable:
        return Finding(shard, key, Fault.UNREADABLE, details)
    return Finding(shard, key, fault, details, removes)
