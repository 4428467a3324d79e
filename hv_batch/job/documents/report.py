"""The objects of a report that hv_batch reads back: the digest of a shard, and a few fields of `report.json`.

A digest holds everything that the report of the whole run needs of one shard, so that a later report reads one small
object instead of the shard's records.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PlainValidator

from hv_batch.job.documents.fields import (
    Count,
    Document,
    FailureName,
    Fps,
    Hex64,
    Key,
    Name,
    Samples,
    Seconds,
    Text,
    Time,
    check_text,
)
from hv_batch.job.documents.schema import ShapeName, StageFacts, TableRow

DIGEST_SCHEMA = "hv_batch/report_digest/1"
REPORT_SCHEMA = "hv_batch/report/1"
PART_SCHEMA = "hv_batch/report_part/1"

MAX_FACETS = 64
MAX_VALUES = 64  # of one facet in a digest; the rest is counted as "other"
MAX_CAUSES = 100
MAX_SHAPES = 64
MAX_SPANS = 2000
MAX_NAME_CHARS = 80  # of a facet's name or value

Label = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Facets = Annotated[
    dict[Label, Annotated[dict[Label, Count], Field(max_length=MAX_VALUES + 1)]], Field(max_length=MAX_FACETS)
]
Size = Annotated[int, Field(ge=1, le=2**31)]
Price = Annotated[float, Field(ge=0, le=1e6)]
Number = Annotated[int, Field(ge=-(2**63), le=2**63)] | Annotated[float, Field(ge=-1e18, le=1e18)]
ShortText = Annotated[str, PlainValidator(partial(check_text, 4000))]
Times = Annotated[list[Annotated[int, Field(ge=0, le=10**11)]], Field(max_length=10**6)]


class Example(Document):
    id: Text
    key: Name
    shard: Samples
    prompt: Text


class Cause(Document):
    """Quarantined samples with the same class and message."""

    kind: FailureName | Literal["(unreadable)"] = Field(alias="class")
    message: Text
    count: Count
    examples: Annotated[list[Example], Field(max_length=3)]
    traceback: Text


Millis = Annotated[int, Field(ge=0, le=10**14)]


class WorkerSpans(Document):
    """When one worker processed samples, from their records: (start, end, samples), the times in unix milliseconds."""

    worker: Name
    stage: Label
    node: Name
    gpus: Annotated[float, Field(ge=0, le=1e6)]
    spans: Annotated[
        list[Annotated[list[Millis], Field(min_length=3, max_length=3)]], Field(min_length=1, max_length=MAX_SPANS)
    ]


class DigestDocument(Document):
    """`stage_ms` has the milliseconds of every committed sample by shape and stage. `gpu_seconds` is by stage.

    `committed_at` and `quarantined_at` are the unix times of the records.
    """

    schema_: Literal["hv_batch/report_digest/1"] = Field(alias="schema")
    shard: Samples
    state: Hex64  # of the objects that were read
    sealed: bool
    samples: Samples
    committed: Samples
    quarantined: Samples
    withdrawn: Samples
    pending: Samples
    part_bytes: Count
    media_bytes: Count
    frames: Count
    media_seconds: Seconds
    facets: Facets
    causes: Annotated[list[Cause], Field(max_length=MAX_CAUSES + 1)]
    stage_ms: Annotated[
        dict[ShapeName | Literal["other"], Annotated[dict[Label, list[Millis]], Field(max_length=16)]],
        Field(max_length=MAX_SHAPES + 1),
    ]
    gpu_seconds: Annotated[dict[Label, Annotated[float, Field(ge=0, le=1e12)]], Field(max_length=16)]
    committed_at: Times
    quarantined_at: Times
    work: Annotated[list[WorkerSpans], Field(max_length=MAX_SPANS)]
    fingerprints: Annotated[dict[Hex64, Count], Field(max_length=10_000)]


class PartSample(Document):
    """A sample in a part (`job.report.samples`)."""

    model_config = ConfigDict(extra="forbid")

    id: ShortText
    key: Key
    row: Annotated[str, Field(pattern=r"\A[0-9]{1,16}\z")]
    video: Annotated[int, Field(ge=0, le=1_000_000)]
    state: Literal["committed", "quarantined", "withdrawn", "pending"]
    prompt: ShortText
    file: Name | None
    poster: Name | None
    size: Count | None = Field(alias="bytes")
    width: Number | None
    height: Number | None
    frames: Number | None
    fps: Number | None
    steps: Number | None
    seed: Number | None
    guidance: Number | None
    cfg: Number | None
    flags: Annotated[list[Label], Field(max_length=16)]
    facets: Annotated[dict[Label, Label], Field(max_length=MAX_FACETS)]
    kind: Label | None = Field(alias="class")
    message: ShortText | None
    seconds: Annotated[dict[Name, Seconds], Field(max_length=16)]


class PartDocument(Document):
    schema_: Literal["hv_batch/report_part/1"] = Field(alias="schema")
    shard: Samples
    samples: Annotated[list[PartSample], Field(max_length=10**6)]


class Totals(Document):
    price_per_gpu_hour: Price | None = None


class ReportDocument(Document):
    """The fields of the last report that the next one takes over."""

    schema_: Literal["hv_batch/report/1"] = Field(alias="schema")
    totals: Totals


class SealedRow(TableRow):
    """A row of a sealed shard's table, as far as a report shows it."""

    prompt: Text
    height: Size
    width: Size
    fps: Fps
    num_inference_steps: Size
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    guidance_scale: float
    cfg_scale: float
    fingerprint: Hex64


class LineageRow(Document):
    """A row of a sealed shard's lineage table, whose JSON texts are parsed, as far as a report shows it."""

    key: Key
    committed_at: Time
    stages: Annotated[dict[Name, Seconds], Field(max_length=16)]
    places: Annotated[dict[Name, StageFacts], Field(max_length=16)]
