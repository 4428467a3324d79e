"""The sections of a run config, one model per top-level key.

The docstrings of the classes and keys are user documentation: `hv_batch.job.config.reference` prints them as
configs/README.md.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hv_batch.job.config.field_rules import KNOWN_COLUMNS, find_fault
from hv_batch.job.config.yaml_overrides import CROSS_FIELD
from hv_batch.job.hooks.hook import parse_hook
from hv_batch.protocol import Device
from hv_batch.sampling_params import DEFAULT_NEGATIVE_PROMPT, LORA_NAME, MAX_LORA_STRENGTH, NO_LORA, canonical_lora

ENGINE = "hv_batch.engine.hunyuan:HunyuanVideo"  # the engine that the cost model describes

MAX_COUNT = 10**9  # a larger number is a mistake, and no float holds a much larger one
MAX_RANKS = 10_000  # of a group along one dimension
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Ranks = Annotated[int, Field(ge=1, le=MAX_RANKS)]
GpuShare = Annotated[float, Field(ge=0, le=1)]  # an actor never computes on more than one GPU
Cpus = Annotated[float, Field(ge=0)]
PoolSize = Annotated[int | Literal["auto"], BeforeValidator(lambda value: _check_pool_size(value))]
Seconds = Annotated[float, Field(gt=0)]
ColumnName = Annotated[str, Field(max_length=1000)]
QuarantineLimit = Annotated[int | float, BeforeValidator(lambda value: _check_quarantine_limit(value))]
Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]


def check_row_rule(field: str, value: Any) -> Any:
    """`value`, if a manifest row may have it in this field; raises ValueError with what is allowed if not."""
    allowed = find_fault(field, value)
    if allowed:
        raise ValueError(allowed)
    return value


def _check_pool_size(value: Any) -> Any:
    """One message; pydantic would report a problem for each side of the union."""
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT):
        raise ValueError(f"a whole number from 1 to {MAX_COUNT}, or auto")
    return value


def _check_quarantine_limit(value: Any) -> Any:
    is_share = isinstance(value, float) and 0 < value < 1
    if value is not None and not is_share and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError("a whole number of at least 0, a share above 0 and below 1, or null")
    return value


class Section(BaseModel):
    # strict: "720" or true is not a height. NaN is never meant.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LoraConfig(Section):
    """One LoRA of `model.loras`."""

    path: str
    strength: Annotated[float, Field(ge=-MAX_LORA_STRENGTH, le=MAX_LORA_STRENGTH)] = 1.0


class ModelConfig(Section):
    """The engine that renders, and its options. Part of the run's identity, as far as it changes pixels."""

    engine: str = ENGINE
    """Import path of the engine, as `package.module:Name`. It must be importable on every node."""
    options: dict[str, Any] = {}
    """Keyword arguments of the engine's constructor. The engine validates them. The default engine requires
    `model_base`, the checkpoint tree; its other options are described in `hv_batch/engine/README.md`."""
    loras: dict[str, LoraConfig] = {}
    """LoRA files by name, as `{film: {path: film.safetensors, strength: 0.8}}`; `strength` is 1 if it is left out. Rows
    choose by name, in the column `lora` or `defaults.lora`. A path must exist on every node. The engine must
    support LoRAs, as the default engine does."""

    @field_validator("engine")
    @classmethod
    def _check_import_path(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", value):
            raise ValueError("an import path, package.module:Name")
        return value

    @field_validator("options")
    @classmethod
    def _refuse_loras(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "loras" in value:
            raise ValueError("the options of the engine without loras, which belong into model.loras")
        return value

    @field_validator("loras")
    @classmethod
    def _check_names(cls, value: dict[str, LoraConfig]) -> dict[str, LoraConfig]:
        if not all(LORA_NAME.fullmatch(name) and name != NO_LORA for name in value):
            raise ValueError(f"names of at most 64 letters, digits, '.', '_' and '-', and not {NO_LORA}")
        return value

    @model_serializer(mode="wrap")
    def _leave_out_loras(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without LoRAs, a dump has no key for them, so that a run.json stays readable for older versions."""
        return {name: value for name, value in handler(self).items() if value or name != "loras"}

    def engine_options(self) -> dict[str, Any]:
        """The keyword arguments of the engine's constructor."""
        loras = {name: lora.model_dump() for name, lora in self.loras.items()}
        return {**self.options, **({"loras": loras} if loras else {})}


class Defaults(Section):
    """The values of manifest columns that a row leaves out. Part of the run's identity."""

    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    """The negative prompt. Used only if `cfg_scale` is above 1."""
    height: int = 720
    """Height in pixels."""
    width: int = 1280
    """Width in pixels."""
    num_frames: int = 129
    """Frames of a video. 1 renders an image."""
    num_inference_steps: int = 50
    """Euler steps of a denoise."""
    num_videos: int = 1
    """Videos of one row. Video `i` is rendered with `seed + i`."""
    guidance_scale: float = 6.0
    """Embedded guidance, an input of the model: the released weights are guidance-distilled."""
    cfg_scale: float = 1.0
    """Classifier-free guidance. Above 1, each step computes two branches and costs twice as much."""
    guidance_rescale: float = 0.0
    """Rescales the guided prediction (Lin et al., arXiv 2305.08891, section 3.4). Has an effect only if `cfg_scale` is
    above 1."""
    flow_shift: float = 7.0
    """Shift of the noise schedule towards high noise."""
    fps: int = 24
    """Frames per second of the mp4."""
    lora: str = ""
    """The LoRAs: names of `model.loras`, each with a strength if that of `model.loras` is not meant. A list is allowed
    as well. A row with `none` in this column has none."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_row_rules(cls, value: Any, info: Any) -> Any:
        return check_row_rule(info.field_name, canonical_lora(value) if info.field_name == "lora" else value)

    @model_serializer(mode="wrap")
    def _leave_out_lora(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a LoRA, a dump has no key for it, so that the identity of older output roots stays the same."""
        return {name: value for name, value in handler(self).items() if value or name != "lora"}


class ManifestConfig(Section):
    """How the columns and rows of a manifest are read. What is set is part of the run's identity."""

    columns: dict[ColumnName, ColumnName] = {}
    """Columns of the manifest that are read as columns of hv_batch, as `num_inference_steps: steps`; in the command
    line `--column num_inference_steps=steps`. `fps: ""` does not read the manifest's own column `fps` and carries it as
    `extra_fps`."""
    carry: list[ColumnName] = []
    """Columns that are data, although other tools keep a parameter under this name, as `[resolution, frames]`; in the
    command line `--carry`. Without it, such a column is a problem if its rows lack the parameter."""
    duplicates: Literal["number", "drop", "refuse"] = "number"
    """Rows without `id` that repeat an earlier row. `number`: each gets an id of its own, and so a seed; a repeated row
    that gives its seed is a problem. `drop`: only the first is rendered. `refuse`: each is a problem."""

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in columns if name not in KNOWN_COLUMNS]
        if unknown:
            raise ValueError(f"hv_batch's column = the manifest's column; hv_batch has {', '.join(KNOWN_COLUMNS)}")
        if columns.get("prompt") == "":
            raise ValueError("a column of the manifest for prompt, which every row needs")
        sources = [theirs for theirs in columns.values() if theirs]
        if len(set(sources)) < len(sources):
            raise ValueError("each column of the manifest once")
        return columns

    @field_validator("carry")
    @classmethod
    def _sort(cls, names: list[str]) -> list[str]:
        return sorted(set(names))

    def identity(self) -> dict[str, Any]:
        """What is set, as JSON values for the identity of a run; empty if nothing is (P2)."""
        values, defaults = self.model_dump(mode="json"), type(self)().model_dump(mode="json")
        return {name: value for name, value in values.items() if value != defaults[name]}


class ParallelConfig(Section):
    """How one video is divided among the ranks of a group; each rank is one process with one GPU.

    Part of the run's identity: another plan adds up in another order, which changes bits.
    """

    device: Device = "cuda"
    """The device that all actors compute on. Ranks communicate over NCCL on `cuda`, over gloo on `cpu`."""
    gpus_per_group: int | Literal["auto"] | None = None
    """Ranks of a group, at least 1: `ulysses_degree` x `ring_degree` x `cfg_degree`. Degrees that are not given are
    chosen: the largest Ulysses degree that divides the attention heads and stays inside a node. `auto` renders each
    shape with the cheapest group of 1, 2, 4 or 8 ranks that has the memory for it and respects
    `groups.max_sample_minutes`, so one run may have groups of several sizes. `auto` requires `gpu` and
    `gpu_memory_gib`. A run keeps the choice in all its resumes. `null`: the product of the degrees."""
    ulysses_degree: Ranks | None = None
    """Ranks that share the attention heads. It must divide their number (24 in the released model). `null`: 8, or
    chosen for `gpus_per_group`."""
    ring_degree: Ranks | None = None
    """Ranks that share the keys of ring attention. `null`: 1, or chosen for `gpus_per_group`."""
    cfg_degree: Annotated[int, Field(ge=1, le=2)] = 1
    """With 2, each half of a group computes one branch of classifier-free guidance. Every row must then have a
    `cfg_scale` above 1."""

    @field_validator("gpus_per_group", mode="before")
    @classmethod
    def _check_group_size(cls, value: Any) -> Any:
        if value in (None, "auto") or (type(value) is int and 1 <= value <= MAX_RANKS):
            return value
        raise ValueError(f"a whole number from 1 to {MAX_RANKS}, auto, or null")


class GroupsConfig(Section):
    """Denoise groups: each is a set of ranks that denoise one sample together."""

    count: Count = 1
    """Maximum number of groups at a time. The run starts with the first group that can be placed and keeps requesting
    the others, so an autoscaler can add nodes for them. Near the end of the run, idle groups are released. With groups
    of several sizes (`parallel.gpus_per_group: auto`), the GPUs are bounded: at most `count` x those of the largest
    group that the manifest needs, and several smaller groups may use the GPUs of one."""
    max_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest share of the cluster's GPUs that the workers of this run use, so that several runs can share a cluster.
    Only nodes that have joined count; if an autoscaler adds them, bound `count` instead. One group may always run.
    `null`: no bound but `count`; the run that asks first gets what is free."""
    gpus_per_rank: GpuShare = 1.0
    """GPUs that Ray reserves for a rank. Must be 1 on `cuda`, except for groups of one rank, which may have a share
    above 0."""
    cpus_per_rank: Cpus = 1.0
    """CPUs that Ray reserves for a rank."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 10
    """Steps between two step checkpoints of a denoise, from which a lost group or run resumes. The latents (30 MB at
    720p) are written while the next steps run. 0: only when the run is stopped or a node is drained."""
    nodes_per_group: Ranks = 1
    """Nodes of a group; each has an equal number of its ranks. The ring and the guidance branches cross nodes and
    Ulysses stays inside each, so this must divide `ring_degree` x `cfg_degree`. Not part of a video's identity."""
    max_sample_minutes: Annotated[float, Field(gt=0)] | None = None
    """Maximum duration of one denoise in minutes, for the choice of `parallel.gpus_per_group: auto` only. The duration
    is that of the cost model, with the steps and guidance of `defaults`. If no group size is fast enough, the fastest
    is used. `null`: no maximum; the cheapest group may take an hour, and a drain, a lost node or the end of the run has
    to wait that long."""

    @model_serializer(mode="wrap")
    def _leave_out_share(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a share, a dump has no key for it, so that a run.json stays readable for older versions."""
        return {name: value for name, value in handler(self).items() if value is not None or name != "max_share"}


class EncodersConfig(Section):
    """Text-encoder actors. Their number and placement do not change the embeddings."""

    count: PoolSize = 1
    """Number of actors, at least 1; each holds both text towers. `auto`: as many as keep the groups from waiting, from
    the measured durations of encodings and denoises; at most one per group."""
    gpus: GpuShare = 1.0
    """GPUs that Ray reserves for an actor. Must be above 0 on `cuda`, and below 0.5 if colocated."""
    cpus: Cpus = 1.0
    """CPUs that Ray reserves for an actor."""
    batch_size: Count = 8
    """Prompts of one task. Does not change the embeddings."""
    placement: Literal["pool", "colocated"] = "pool"
    """`pool`: actors with GPUs of their own. `colocated`: actors on the GPUs of the denoise groups. Each rank then
    leaves the share `encoders.gpus` of its GPU free, and a group has at most one encoder per GPU. `colocated` requires
    `groups.gpus_per_rank: 1` and cannot be combined with `parallel.gpus_per_group: auto`."""

    @property
    def is_colocated(self) -> bool:
        return self.placement == "colocated"


class DecodersConfig(Section):
    """VAE-decoder actors, which also write and commit the videos. Their number and placement do not change a byte."""

    count: PoolSize = 1
    """Number of actors, at least 1; each holds one VAE decoder. `auto`: as many as keep the groups from waiting, from
    the measured durations of decodes and denoises; at most two per group."""
    gpus: GpuShare = 1.0
    """GPUs that Ray reserves for an actor. Must be above 0 on `cuda`."""
    cpus: Cpus = 2.0
    """CPUs that Ray reserves for an actor. The video encoder (ffmpeg) runs on them."""
    placement: Literal["pool", "group"] = "pool"
    """`pool`: actors with GPUs of their own. `group`: the ranks of a group hold the VAE beside the DiT and decode what
    they have denoised, each a part of the tiles; rank 0 writes and commits with the CPUs of `groups.cpus_per_rank`.
    There are then no decoder actors, and `count`, `gpus` and `cpus` have no effect."""

    @property
    def is_in_group(self) -> bool:
        return self.placement == "group"


class OutputConfig(Section):
    """The layout of the output root, and the spool for outages."""

    shard_size: Count = 256
    """Samples of one shard, the unit of layout and metadata. Part of the run's identity: it determines every path."""
    keep_latents: bool = False
    """Keep the final latents in the output root instead of removing them when the video is committed."""
    webdataset: bool = False
    """Also write each sealed shard as one tar of videos and JSON files, under `webdataset/`. Part of the run's
    identity."""
    spool_gib: Annotated[float, Field(ge=0)] = 8.0
    """Disk space in GiB for finished videos that wait on the node that decoded them while the output root does not
    answer. The limit is per node, for all runs together. 0: no spool; latents wait in Ray's object store instead."""
    spool_folder: str | None = None
    """The folder of the spool, on a local disk of each node. `null`: the node's temporary folder (`TMPDIR`)."""


class MediaConfig(Section):
    """How frames become files. Part of the run's identity, except for `poster`."""

    codec: Literal["h264", "h265", "av1"] = "h264"
    """The video codec. `h264` plays everywhere; `h265` and `av1` make smaller files and take several times as long."""
    crf: Annotated[int, Field(ge=0, le=63)] = 18
    """Constant rate factor, on the codec's own scale: 18 is visually clean; the worst quality is 51, or 63 with `av1`.
    Values above 51 are allowed for `av1` only."""
    preset: Preset = "medium"
    """Encoder effort against file size, in x264's preset names. For `av1`, each name is mapped to a preset of about the
    same speed."""
    threads: Count = 2
    """Threads of the video encoder. The number is fixed because an encoder may write other bytes with another one."""
    lossless: bool = False
    """Encode the RGB frames without loss: decoding gives them back bit for bit. `crf` has no effect then, and few
    players show such files."""
    poster: bool = True
    """Also write the first frame of every video that is not black as a JPEG of at most 640x640 pixels (about 40 kB),
    under `posters/`; pages show it until a video plays. It is taken before the sample hook. Not part of the run's
    identity, so it may change. An output root of version 0.1 keeps its own value, unless `--allow-change media.poster`
    is given."""

    @model_validator(mode="after")
    def _check_scale_of_codec(self) -> Self:
        if self.crf > 51 and self.codec != "av1":
            problem = f"media.crf = {self.crf} with media.codec = {self.codec}; allowed: at most 51"
            raise PydanticCustomError(CROSS_FIELD, "{problem}", {"problem": problem})
        return self


class HooksConfig(Section):
    """Programs or functions of yours that the run calls. Part of the run's identity, with a hash of their content.

    A hook is an import path, `package.module:function`, or a command line, which no shell interprets. It must exist on
    every node that calls it. See `hv_batch/job/hooks/README.md`.
    """

    prompt: str | None = None
    """Rewrites or drops prompts. Runs once, in the manifest check; a resume renders the same texts."""
    prompt_timeout_s: Seconds = 3600.0
    """Maximum duration of the prompt hook in seconds: of a command, or of one call of a function."""
    sample: str | None = None
    """Changes or scores the file of each sample after it is encoded and before it is committed, as a watermark does. It
    runs where the video is encoded."""
    sample_timeout_s: Seconds = 300.0
    """Maximum duration of the sample hook in seconds, for one file. Must be below `timeouts.stall_s`."""

    @field_validator("prompt", "sample")
    @classmethod
    def _check_hook(cls, value: str | None) -> str | None:
        if value is not None:
            parse_hook(value)
        return value


class RetriesConfig(Section):
    """Attempts of a sample for each failure class, the first attempt included. After the last, it is quarantined."""

    poison: Count = 2
    """Attempts of a sample that fails with an error of its own."""
    infra: Count = 3
    """Attempts of a sample whose actor, node or collective was lost."""
    oom: Count = 2
    """Attempts of a sample that runs out of GPU memory."""
    preempted: Count = 20
    """Attempts of a sample whose node was reclaimed."""
    worker: Count = 4
    """Losses in a row, each with another sample, after which a worker slot is not restarted any more. Counts for the
    worker, not for the samples."""
    max_quarantined: QuarantineLimit | None = None
    """Samples that one command may quarantine: a whole number, or a share of its samples, as 0.05. One more stops the
    run (exit code 1). `null`: no limit. Independent of this key, a run stops if nothing is committed in the output root
    yet and 8 different samples (or one for each worker, if that is more) have failed with the same error."""


class TimeoutsConfig(Section):
    """Deadlines in seconds."""

    start_s: Seconds = 1800.0
    """Maximum time from the placement of a worker until it has loaded its weights (26 GB from a cold store take several
    minutes). Also the maximum time that a run waits without work for nodes that it cannot do without, at its start or
    later."""
    stall_s: Seconds = 600.0
    """A worker without progress (a step, a prompt, some frames) for this long counts as hung and is rebuilt. A group
    between two steps counts as hung after five times the slowest step of its denoise plus one minute, if that is
    shorter."""
    drain_s: Seconds = 600.0
    """Maximum time that running samples may take to finish after SIGTERM."""
