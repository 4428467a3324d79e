"""The result of a verification: one `Finding` for each problem, and a report of all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from hv_batch.job import layout
from hv_batch.job.formatting import plural

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


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem. `removes` are the keys that `remove_faults` removes after the seals, in this order."""

    shard: int | None  # None for the whole run
    key: str | None  # of the sample; None for the shard's tables and tar
    fault: Fault
    details: str
    removes: tuple[str, ...] = ()

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
    pending: int = 0
    quarantined: int = 0
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        numbers = {name: value for name, value in asdict(self).items() if name != "findings"}
        faults = Counter(finding.fault.value for finding in self.findings)
        findings = [asdict(finding) | {"fault": finding.fault.value} for finding in self.findings]
        return numbers | {"faults": dict(faults), "findings": findings}

    def render(self) -> str:
        lines = [
            f"{self.url}: {self.checked:,} committed samples ({self.bytes / 1e9:,.3f} GB), {self.decoded:,} of them "
            f"decoded, and {self.tables:,} sealed shards checked; {self.quarantined:,} samples are quarantined and "
            f"{self.pending:,} pending",
        ]
        lines += [finding.render() for finding in self.findings[:MAX_LINES]]
        if (cut := len(self.findings) - MAX_LINES) > 0:
            lines.append(f"and {cut:,} more; --json lists all")
        lines.append(f"{plural(len(self.findings), 'problem')} found" if self.findings else "no problems found")
        return "\n".join(lines)
