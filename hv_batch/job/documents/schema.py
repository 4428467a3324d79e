"""The schema of everything that is read back from an output root: one model for each kind of object.

Whoever can write to a bucket can write these objects, so nothing is used that its model has not accepted. The models
check types, bounds and lengths; `reading` compares paths in an object with those that its own key determines.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, RootModel, model_validator

from hv_batch.job import layout
from hv_batch.job.documents.fields import (
    MAX_SHARD_SAMPLES,
    Count,
    Document,
    Extra,
    FailureName,
    Fps,
    Hex64,
    Key,
    LongText,
    Name,
    Params,
    Samples,
    Seconds,
    Text,
    Time,
    Versions,
)
from hv_batch.sampling_params import MAX_STEPS

Number = Annotated[int, Field(ge=1)]
LicenceId = Annotated[str, Field(pattern=r"\A[a-z0-9][a-z0-9.+-]{0,63}\z")]
ShapeName = Annotated[str, Field(pattern=r"\A[0-9]{1,5}x[0-9]{1,5}x[0-9]{1,5}\z")]  # height x width x frames


class FailedAttempt(Document):
    kind: FailureName
    message: LongText
    traceback: LongText = ""
    where: Name = ""
    begin_anew: bool = False


History = Annotated[list[FailedAttempt], Field(max_length=100_000)]


class StageFacts(Document):
    """Where and how a stage processed a sample. Engines add facts of their own."""

    node: Name = ""
    worker: Name = ""
    ranks: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    computed_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None  # that ran the model; absent: all
    encoded: Count = 0
    recalled: Count = 0


class StageReport(StageFacts):
    seconds: Seconds


class StoredStages(RootModel[Annotated[dict[Name, StageReport], Field(max_length=16)]]):
    """The reports of the stages before the latents, in the header of their file."""

    model_config = ConfigDict(strict=True)


class TensorHeader(Document):
    """The header of a safetensors file. The library checks the rest of it."""

    metadata: Annotated[dict[Name, LongText], Field(max_length=100)] = Field(alias="__metadata__")


class Produced(Document):
    num_frames: Number
    height: Number
    width: Number


Luma = Annotated[float, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, le=1)]


class Scores(Document):
    """The scores of a video's frames (`hv_batch.job.quality`)."""

    luma_mean: Luma
    luma_spread: Luma
    clipped_share: Share
    still_share: Share
    motion_energy: Annotated[float, Field(ge=0, le=255**2)]


class SampleRecord(Document):
    """The fields that commit records and quarantine records share."""

    key: Key
    id: Text
    row: Annotated[int, Field(ge=1, le=2**53)]
    video_index: Annotated[int, Field(ge=0, le=1_000_000)]
    shard: Samples
    attempts: Count
    history: History


class CommitRecord(SampleRecord):
    schema_: Literal["hv_batch/commit/1"] = Field(alias="schema")
    params: Params
    fps: Fps
    extra: Extra
    file: Name
    sha256: Hex64
    num_bytes: Count = Field(alias="bytes")
    poster: Name | None
    frames_sha256: Hex64
    produced: Produced
    scores: Scores | None = None  # absent in records of version 0.1
    hook: Extra | None = None  # the answer of the sample hook
    stages: Annotated[dict[Name, Seconds], Field(max_length=16)]
    places: Annotated[dict[Name, StageFacts], Field(max_length=16)]
    versions: Versions
    fingerprint: Hex64
    licence: Name
    created_at: Time

    @model_validator(mode="after")
    def _check_paths(self) -> Self:
        """Paths follow from shard, key and hash. Any other path is that of another sample, or outside the shard."""
        expected = layout.media_dir(self.shard) + layout.media_name(self.key, self.sha256, self.params["num_frames"])
        if self.file != expected:
            raise ValueError(f"its file is {self.file!r}, not {expected!r}")
        if self.poster is not None and not layout.is_poster_of(self.poster, self.shard, self.key):
            raise ValueError(f"its poster is {self.poster!r}, not that of its sample")
        return self


class QuarantineRecord(SampleRecord):
    schema_: Literal["hv_batch/quarantine/1"] = Field(alias="schema")
    params: Params
    kind: FailureName = Field(alias="class")
    message: LongText
    traceback: LongText
    fingerprint: Hex64 | None = None  # of the run; a root of an early version may lack it


class RetriedRecord(Document):
    """A quarantine record of a released sample. Only its history is used."""

    history: History


class WithdrawnRecord(Document):
    """The tombstone of a sample that was withdrawn for good."""

    schema_: Literal["hv_batch/withdrawn/1"] = Field(alias="schema")
    key: Key
    id: Text
    row: Annotated[int, Field(ge=1, le=2**53)]
    video_index: Annotated[int, Field(ge=0, le=1_000_000)]
    shard: Samples
    reason: Text
    sha256: Hex64 | None  # of the media that was removed; None if the sample was not committed
    withdrawn_at: Time
    version: Name  # of hv_batch


class Degrees(Document):
    model_config = ConfigDict(extra="forbid")  # they become the arguments of ParallelPlan

    ulysses_degree: Annotated[int, Field(ge=1, le=100_000)] = 1
    ring_degree: Annotated[int, Field(ge=1, le=100_000)] = 1
    cfg_degree: Annotated[int, Field(ge=1, le=2)] = 1


class ParallelIdentity(Document):
    device: Literal["cpu", "cuda"]
    ulysses_degree: Annotated[int, Field(ge=1, le=100_000)] = 1
    ring_degree: Annotated[int, Field(ge=1, le=100_000)] = 1
    cfg_degree: Annotated[int, Field(ge=1, le=2)] = 1
    plans: dict[Annotated[str, Field(pattern=r"\A[0-9]{1,5}x[0-9]{1,5}x[0-9]{1,5}\z")], Degrees] = Field(
        default_factory=dict
    )


class Identity(Document):
    revision: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    parallel: ParallelIdentity
    manifest: Name = ""
    manifest_options: dict[Name, Any] = Field(default_factory=dict)


class RecordedOutput(Document):
    shard_size: Annotated[int, Field(ge=1)]
    webdataset: bool = False
    keep_latents: bool = False


class RecordedMedia(Document):
    poster: bool = False


class RecordedModel(Document):
    engine: Name = ""


class RecordedConfig(Document):
    """The keys of the config that are read without `RunConfig`, which checks all of them before a render."""

    seed: int = 0
    model: RecordedModel = RecordedModel()
    output: RecordedOutput
    media: RecordedMedia = RecordedMedia()


class RecordedManifest(Document):
    url: Text | Annotated[list[Text], Field(max_length=100_000)]
    rows: Samples
    samples: Samples


class EarlierIdentity(Document):
    """A former identity of the root, and what changed when the next one replaced it."""

    identity: Identity
    fingerprint: Hex64
    manifest: RecordedManifest
    replaced_at: Time
    changed: Annotated[list[Text], Field(max_length=10_000)]  # dotted paths in the identity


class RunDocument(Document):
    schema_: Literal["hv_batch/run/1"] = Field(alias="schema")
    dataset: Literal["hv_batch/dataset/1", "hv_batch/dataset/2"] = "hv_batch/dataset/1"
    identity: Identity
    fingerprint: Hex64
    config: RecordedConfig
    manifest: RecordedManifest
    licence: Text
    licence_id: LicenceId = ""
    card: Name = ""  # the schema of the dataset card; empty for a root of a version without cards
    versions: Versions
    earlier: Annotated[list[EarlierIdentity], Field(max_length=10_000)] = Field(default_factory=list)  # oldest first

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if (size := min(self.manifest.samples, self.config.output.shard_size)) > MAX_SHARD_SAMPLES:
            raise ValueError(f"its shards have {size:,} samples; allowed: at most {MAX_SHARD_SAMPLES:,}")
        return self


class ChoicesDocument(Document):
    """The values of the engine's open options that the first group of the run has chosen."""

    schema_: Literal["hv_batch/choices/1"] = Field(alias="schema")
    choices: Annotated[dict[Name, Name], Field(min_length=1, max_length=16)]
    worker: Name
    node: Name
    chosen_at: Time


class LeaseDocument(Document):
    token: Name
    purpose: Name
    host: Name
    machine: Name | None
    pid: Annotated[int, Field(ge=1, le=2**31)]
    process: Name | None
    job: Name | None
    since: Name
    beats: Count
    beat_at: Name


class IndexPartEntry(Document):
    model_config = ConfigDict(extra="forbid")  # they become the arguments of IndexPart

    name: Name
    sha256: Hex64
    rows: Samples
    samples: Samples


class DroppedRow(Document):
    row: Annotated[int, Field(ge=1, le=2**53)]
    id: Text
    reason: Text


class PromptHookResults(Document):
    sha256: Hex64  # of all answers
    rewritten: Samples
    dropped: Samples
    drops: Annotated[list[DroppedRow], Field(max_length=1000)]


class IndexSummary(Document):
    model_config = ConfigDict(extra="forbid")  # they become the arguments of ManifestSummary

    digest: Name
    rows: Samples
    samples: Samples
    shards: Samples
    shapes: list[Annotated[list[Number], Field(min_length=4, max_length=4)]]
    extra_kinds: dict[Any, Literal["null", "bool", "int", "long", "float", "text", "json"]]
    warnings: list[LongText]
    prompt_hook: PromptHookResults | None = None


class IndexDocument(Document):
    schema_: Literal["hv_batch/plan/1"] = Field(alias="schema")
    key: Name
    files: list[dict[Any, Any]]
    summary: IndexSummary
    parts: list[IndexPartEntry]

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        for number, part in enumerate(self.parts):
            if part.name != (expected := layout.index_part(number, part.sha256)):
                raise ValueError(f"its part {number} is {part.name!r}, not {expected!r}")
        if (total := sum(part.samples for part in self.parts)) != self.summary.samples:
            raise ValueError(f"its parts have {total:,} samples, its summary {self.summary.samples:,}")
        return self


Counts = Annotated[dict[Name, Count], Field(max_length=10_000)]


class TotalsDocument(Document):
    model_config = ConfigDict(extra="forbid")  # they become the arguments of ShardTotals

    schema_: Literal["hv_batch/sums/1"] = Field(alias="schema")
    committed: Samples
    num_bytes: Count = Field(alias="bytes")
    frames: Count
    stage_ms: Counts
    denoise_ms: dict[Annotated[str, Field(pattern=r"\A[0-9]{0,7}\z")], Count]
    timed: Counts
    embeddings: Counts
    retries: Counts
    looks: Counts = Field(default_factory=dict)  # absent if no sample has scores
    frames_by_fps: dict[Annotated[str, Field(pattern=r"\A[1-9][0-9]{0,2}\z")], Count]

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        if untimed := sorted(stage for stage in self.stage_ms if not self.timed.get(stage)):
            raise ValueError(f"it has a time of the stage {untimed[0]!r}, and no sample with that stage")
        if (total := sum(self.frames_by_fps.values())) > self.frames:
            raise ValueError(f"its videos have {total:,} frames, all its media {self.frames:,}")
        return self


class MediaTotals(Document):
    num_bytes: Count = Field(alias="bytes")
    frames: Count
    images: Count = 0
    seconds: Seconds


class SummaryDocument(Document):
    schema_: Literal["hv_batch/summary/1"] = Field(alias="schema")
    fingerprint: Hex64
    samples: Samples
    committed: Samples
    quarantined: Samples
    pending: Samples
    withdrawn: Samples = 0  # absent if there are none
    shards: Samples
    shards_sealed: Samples
    media: MediaTotals | None = None


class TableRow(Document):
    """A row of a sealed shard's table: the columns of hv_batch."""

    file_name: Name
    id: Text
    key: Key
    row: Annotated[int, Field(ge=1, le=2**53)]
    video_index: Annotated[int, Field(ge=0, le=1_000_000)]
    num_frames: Number
    num_bytes: Count = Field(alias="bytes")
    sha256: Hex64
    frames_sha256: Hex64

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.file_name != (expected := layout.media_name(self.key, self.sha256, self.num_frames)):
            raise ValueError(f"its file_name is {self.file_name!r}, not {expected!r}")
        return self
