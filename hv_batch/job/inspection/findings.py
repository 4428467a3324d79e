"""What a verification has found: one `Finding` a thing that is wrong, and all of them as a report."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from hv_batch.job import layout

MAX_LINES = 100  # of findings in the text


class Fault(StrEnum):
    """What is wrong with one sample, with what a shard was sealed with, or with the run as a whole."""

    RECORD = "record"  # cannot be read, or is of another sample or run
    TWO_RECORDS = "two records"  # a quarantine record beside the commit record
    MISSING = "media missing"
    SIZE = "media size"
    HASH = "media sha256"
    UNDECODABLE = "media does not decode"
    GEOMETRY = "media frames"  # another number of frames, or another size, than the sample's
    POSTER = "poster"  # not there, or not the bytes that its name tells
    TABLE = "metadata"  # cannot be read, or says other than the records
    LINEAGE = "lineage"  # the same
    SUMS = "sums"  # the same; what the summary is added up from
    TAR = "tar"  # other members than the samples of the table
    PLAN = "plan"  # a part of the checked manifest that is not what was written
    SUCCESS = "_SUCCESS"  # a run that counts as finished and is not


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `removes` are the keys that `remove_faults` removes after the seals, in this order."""

    shard: int | None  # None for the run as a whole
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
    """What was looked at, and what was found wrong."""

    url: str
    checked: int = 0  # committed samples
    decoded: int = 0
    bytes: int = 0
    tables: int = 0  # sealed shards, each with all that it was sealed with
    pending: int = 0
    quarantined: int = 0
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        numbers = {name: value for name, value in asdict(self).items() if name != "findings"}
        faults = Counter(finding.fault.value for finding in self.findings)
        found = [asdict(finding) | {"fault": finding.fault.value} for finding in self.findings]
        return numbers | {"faults": dict(faults), "findings": found}

    def render(self) -> str:
        lines = [
            f"{self.url}: {self.checked:,} committed samples ({self.bytes / 1e9:,.3f} GB), {self.decoded:,} of them "
            f"decoded, and {self.tables:,} sealed shards checked; {self.quarantined:,} samples are quarantined and "
            f"{self.pending:,} pending",
        ]
        lines += [finding.render() for finding in self.findings[:MAX_LINES]]
        if (cut := len(self.findings) - MAX_LINES) > 0:
            lines.append(f"and {cut:,} more; --json lists all")
        lines.append(f"{len(self.findings):,} things are wrong" if self.findings else "nothing is wrong")
        return "\n".join(lines)
