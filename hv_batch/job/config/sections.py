"""The sections of a run config, one model per top-level key."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hv_batch.job.config.field_rules import find_fault
from hv_batch.job.config.yaml_overrides import CROSS_FIELD
from hv_batch.protocol import DEFAULT_NEGATIVE_PROMPT, Device

Count = Annotated[int, Field(ge=1)]


GpuShare = Annotated[float, Field(ge=0, le=1)]  # an actor never computes on more than one GPU


Cpus = Annotated[float, Field(ge=0)]


PoolSize = Annotated[int | Literal["auto"], BeforeValidator(lambda value: _follow_pool_rule(value))]


Seconds = Annotated[float, Field(gt=0)]


Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]


def follow_row_rule(field: str, value: Any) -> Any:
    allowed = find_fault(field, value)
    if allowed:
        raise ValueError(allowed)
    return value


def _follow_pool_rule(value: Any) -> Any:
    """In one sentence: pydantic would tell a problem for each side of the union."""
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError("a whole number of at least 1, or auto")
    return value


class Section(BaseModel):
    # strict: "720" or true is not a height. NaN is never meant.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    engine: str = "hv_batch.engine.hunyuan:HunyuanVideo"
    """Import path of the engine."""
    options: dict[str, Any] = {}
    """Keyword arguments of the engine's constructor. Opaque here: the engine refuses what it does not know."""

    @field_validator("engine")
    @classmethod
    def _look_like_an_import_path(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
            raise ValueError("an import path, package.module:Name")
        return value


class Defaults(Section):
    """What a manifest row leaves out (spec section 1)."""

    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    """Rendered only where cfg_scale > 1."""
    height: int = 720
    """Pixels, a multiple of 16."""
    width: int = 1280
    """Pixels, a multiple of 16."""
    num_frames: int = 129
    """4n + 1; 1 is an image."""
    num_inference_steps: int = 50
    """Euler steps."""
    num_videos: int = 1
    """Videos of one row; video i is rendered with seed + i."""
    guidance_scale: float = 6.0
    """Embedded guidance: the released weights are guidance-distilled."""
    cfg_scale: float = 1.0
    """Classifier-free guidance; above 1 it doubles the cost of a step."""
    guidance_rescale: float = 0.0
    """Lin et al. 2305.08891, section 3.4; works only together with cfg_scale > 1."""
    flow_shift: float = 7.0
    """Shift of the sigma schedule (spec section 4)."""
    fps: int = 24
    """Frames per second of the mp4."""

    @field_validator("*", mode="before")
    @classmethod
    def _follow_the_rules_of_a_row(cls, value: Any, info: Any) -> Any:
        return follow_row_rule(info.field_name, value)


class ParallelConfig(Section):
    """How one video is spread over ranks. Part of its identity: another plan sums in another order."""

    device: Device = "cuda"
    """What the actors compute on."""
    gpus_per_group: int | Literal["auto"] | None = None
    """Ranks of a group, each on its own GPU: ulysses_degree x ring_degree x cfg_degree. Given, the degrees that are not
    are chosen for it, with as much Ulysses as the heads allow. auto: each shape is rendered by the cheapest group of 1,
    2, 4 or 8 that has the memory for it and keeps to groups.max_sample_minutes, so groups of several sizes may live in
    one run; needs `gpu` and `gpu_memory_gib`. What is chosen stays for all resumes of the run."""
    ulysses_degree: Count | None = None
    """Ranks that share the attention heads; must divide their number. null: 8, or chosen for gpus_per_group."""
    ring_degree: Count | None = None
    """Ranks that share the keys. null: 1, or chosen for gpus_per_group."""
    cfg_degree: Annotated[int, Field(ge=1, le=2)] = 1
    """2: each half of a group computes one branch of classifier-free guidance, which every row must then use."""

    @field_validator("gpus_per_group", mode="before")
    @classmethod
    def _be_a_size(cls, value: Any) -> Any:
        if value in (None, "auto") or (type(value) is int and value >= 1):
            return value
        raise ValueError("a whole number of at least 1, auto, or null")


class GroupsConfig(Section):
    """Denoise groups: groups of ranks that render one sample together."""

    count: Count = 1
    """The most groups that render at the same time. The run begins with the first one that finds room and goes on
    asking for the others, so an autoscaler may bring their nodes; towards the end, idle ones are let go. With groups of
    several sizes (gpus_per_group: auto) it bounds their GPUs: at most count x the GPUs of the largest that is needed,
    so several smaller ones may stand in the place of one."""
    gpus_per_rank: GpuShare = 1.0
    """GPUs that Ray reserves for a rank."""
    cpus_per_rank: Cpus = 1.0
    """CPUs that Ray reserves for a rank."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 10
    """Steps between two step checkpoints of a denoise, from which a lost group or run goes on; the latents are written
    (30 MB at 720p) while the next steps run. 0 writes them only when the run is stopped or a node is taken away."""
    nodes_per_group: Count = 1
    """Nodes that a group stands on, each with an equal part of its ranks. The ring and the guidance branches cross
    them, Ulysses stays inside each: it must divide ring_degree x cfg_degree. Not part of a video's identity."""
    max_sample_minutes: Annotated[float, Field(gt=0)] | None = None
    """What gpus_per_group: auto may let one denoise take, by the cost model and the steps and guidance of `defaults`;
    where no group is as fast, the fastest is taken. null: as long as it takes on the cheapest, which may be an hour
    that a drain, a lost node or the end of the run has to wait for."""


class EncodersConfig(Section):
    """Text-encoder actors. Where they stand changes no embedding."""

    count: PoolSize = 1
    """Actors, each with both text towers; auto: as many as keep the groups from waiting, by how long encodings and
    denoises turn out to take, at most one a group."""
    gpus: GpuShare = 1.0
    """GPUs that Ray reserves for an actor."""
    cpus: Cpus = 1.0
    """CPUs that Ray reserves for an actor."""
    batch_size: Count = 8
    """Prompts of one call. Does not change the embeddings."""
    placement: Literal["pool", "colocated"] = "pool"
    """pool: with GPUs of their own. colocated: on the GPUs of the denoise groups. Each rank leaves the share `gpus` of
    its GPU free, which must be less than half. At most one encoder per GPU of a group is started."""

    @property
    def is_colocated(self) -> bool:
        return self.placement == "colocated"


class DecodersConfig(Section):
    """VAE-decoder actors, which also write and commit the videos. Where they stand changes no byte of these."""

    count: PoolSize = 1
    """Actors, each with one VAE decoder; auto: as many as keep the groups from waiting, by how long decodes and
    denoises turn out to take, at most two a group."""
    gpus: GpuShare = 1.0
    """GPUs that Ray reserves for an actor."""
    cpus: Cpus = 2.0
    """CPUs that Ray reserves for an actor; the H.264 encoder runs on them."""
    placement: Literal["pool", "group"] = "pool"
    """pool: actors with GPUs of their own. group: the ranks of a group hold the VAE beside the DiT and share out the
    tiles of what was denoised; rank 0 writes and commits with the CPUs of groups.cpus_per_rank. There are no actors
    then, and count, gpus and cpus mean nothing."""

    @property
    def is_in_group(self) -> bool:
        return self.placement == "group"


class OutputConfig(Section):
    shard_size: Count = 256
    """Samples of one shard, the unit of layout and metadata. Part of the run's identity: it decides every key."""
    keep_latents: bool = False
    """Keep the final latents beside the videos instead of removing them at commit."""
    webdataset: bool = False
    """Also write every shard as one tar of videos and JSON (webdataset/), when it seals. Part of the run's identity."""
    spool_gib: Annotated[float, Field(ge=0)] = 8.0
    """Finished videos that wait on the disk of the node that decoded them while the output root does not answer: at
    most so much a node, of all runs together. 0: none, and what is denoised waits in Ray's object store."""
    spool_folder: str | None = None
    """Where they wait: a folder that is local to each node. null: the temporary folder (TMPDIR) there."""


class MediaConfig(Section):
    """How frames become files. Part of a video's identity."""

    codec: Literal["h264", "h265", "av1"] = "h264"
    """What every player shows (h264), or smaller files that take several times longer to write (h265, av1)."""
    crf: Annotated[int, Field(ge=0, le=63)] = 18
    """Constant rate factor, on the codec's own scale: 18 is visually clean, 51 the worst (63 with av1)."""
    preset: Preset = "medium"
    """Encoder effort against file size, by x264's names; those of av1 are at about the same places."""
    threads: Count = 2
    """Encoder threads, pinned: an encoder may write other bytes with another number of threads."""
    lossless: bool = False
    """Code the RGB frames as they are: decoding gives them back bit for bit. No crf then; few players show it."""
    poster: bool = False
    """Also write the first frame of every video as a JPEG, under posters/."""

    @model_validator(mode="after")
    def _stay_on_the_scale_of_the_codec(self) -> Self:
        if self.crf > 51 and self.codec != "av1":
            said = f"media.crf = {self.crf} with media.codec = {self.codec}; allowed: at most 51"
            raise PydanticCustomError(CROSS_FIELD, "{said}", {"said": said})
        return self


class RetriesConfig(Section):
    """Tries of a sample, counting the first, for each class of failure."""

    poison: Count = 2
    """Of a sample that fails deterministically."""
    infra: Count = 3
    """Of a sample whose actor, node or collective was lost."""
    oom: Count = 2
    """Of a sample that ran out of GPU memory."""
    preempted: Count = 20
    """Of a sample whose node was reclaimed, which is never the sample's fault."""
    worker: Count = 4
    """Not a sample's: losses in a row, each of another sample, after which a worker slot is given up."""


class TimeoutsConfig(Section):
    start_s: Seconds = 1800.0
    """From when a worker has its place until it has loaded its weights (26 GB from a cold store take a while). Also how
    long a run waits, doing nothing, for nodes without which it cannot go on, at its start or later."""
    stall_s: Seconds = 600.0
    """Without progress (a step, a prompt, some frames) for this long, a worker counts as hung and is rebuilt; a group
    between two steps after five times the slowest step of its denoise and a minute, if that is less."""
    drain_s: Seconds = 600.0
    """After SIGTERM: how long running samples may take to finish."""


ENGINE = "hv_batch.engine.hunyuan:HunyuanVideo"  # the engine that these numbers are of
