"""The model of a config: the shapes of its networks, precisions, options, and the bytes of its weights.

Widths come from `model.options` and from the JSON files of the checkpoint tree, if there is one. All other widths are
those of the release, so `hv-batch plan` works before anything is downloaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from hv_batch.architecture import DIT_CLASS, ClipShape, DiTConfig, LlamaShape, TileGeometry, VAEConfig, check_fields
from hv_batch.attention_methods import ALL_DENSE, AttentionMethods, parse_attention_methods
from hv_batch.job.workload import Workload
from hv_batch.protocol import UserError
from hv_batch.step_schedule import StepSchedule, computed_steps, guided_steps, parse_cfg_until, parse_step_cache

ITEMSIZE: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes of a value in each precision

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ForwardKind:
    """What decides the cost of one pass through the DiT, beside the shape of the video."""

    density: float = 1.0  # fraction of the attention that is computed
    is_quantized: bool = False  # attention in 8 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """All networks, and the precisions that they compute with."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    llama: LlamaShape = field(default_factory=LlamaShape)
    clip: ClipShape = field(default_factory=ClipShape)
    tile: TileGeometry = field(default_factory=TileGeometry)
    precision: str = "bf16"
    vae_precision: str = "fp16"
    text_encoder_precision: str = "fp16"
    fp8: bool = False
    offload: bool = False
    step_cache: StepSchedule | None = None
    cfg_until: float | None = None
    attention: str = "sdpa"
    methods: AttentionMethods = ALL_DENSE

    def computed_steps(self, steps: int) -> int:
        """Number of the steps of a video that run the DiT."""
        return len(computed_steps(self.step_cache, steps))

    def forwards(self, work: Workload) -> Counter[ForwardKind]:
        """Number of passes through the DiT for one video, by kind."""
        found: Counter[ForwardKind] = Counter()
        for step in computed_steps(self.step_cache, work.steps):
            branches = work.branches if step < guided_steps(self.cfg_until, work.steps) else 1
            attention = self.methods.at(step, work.steps)
            found[ForwardKind(self.methods.density(step, work.steps), attention.quantized is not None)] += branches
        return found

    @property
    def dit_bytes(self) -> int:
        """Bytes of the DiT's weights, on the GPU and on the host."""
        dit, itemsize = self.dit, ITEMSIZE[self.precision]
        saved = dit.block_linears * (itemsize - 1) if self.fp8 else 0
        return dit.parameters * itemsize - saved

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the DiT's weights that offloading keeps on the host: those of its blocks."""
        if not self.offload:
            return 0
        return self.dit_bytes - (self.dit.parameters - self.dit.blocks) * ITEMSIZE[self.precision]

    @property
    def largest_block_bytes(self) -> int:
        dit, itemsize = self.dit, ITEMSIZE[self.precision]
        blocks = [(dit.double_block, dit.double_linears)] * bool(dit.mm_double_blocks_depth)
        blocks += [(dit.single_block, dit.single_linears)] * bool(dit.mm_single_blocks_depth)
        return max(total * itemsize - (linears * (itemsize - 1) if self.fp8 else 0) for total, linears in blocks)

    @property
    def text_bytes(self) -> int:
        return (self.llama.parameters + self.clip.parameters) * ITEMSIZE[self.text_encoder_precision]

    @property
    def vae_bytes(self) -> int:
        return self.vae.parameters * ITEMSIZE[self.vae_precision]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ModelShape:
        """From the engine's options, which the engine must have accepted, and the checkpoint tree that they name."""
        base = Path(str(options.get("model_base", ""))).expanduser()
        precisions = {
            name: options[name]
            for name in ("precision", "vae_precision", "text_encoder_precision")
            if options.get(name) in ITEMSIZE
        }
        return cls(
            dit=_shape(DiTConfig, {**_dit_values(base, options.get("dit_weight")), **(options.get("dit") or {})}),
            vae=_shape(VAEConfig, _read_json(base / "hunyuan-video-t2v-720p" / "vae" / "config.json")),
            llama=_shape(LlamaShape, _read_json(base / "text_encoder" / "config.json")),
            clip=_shape(ClipShape, _clip_text(_read_json(base / "text_encoder_2" / "config.json"))),
            tile=_shape(TileGeometry, options.get("vae_tile") or {}),
            fp8=options.get("fp8", "none") != "none",
            offload=options.get("offload", "none") != "none",
            step_cache=_or_none(parse_step_cache, options.get("step_cache")),
            cfg_until=_or_none(parse_cfg_until, options.get("cfg_until")),
            attention=options.get("attention", "sdpa"),
            methods=_methods(options),
            **precisions,
        )


def _shape(kind: type[T], values: Mapping[str, Any]) -> T:
    """A `kind` of these values, or the released one if they are inconsistent, which the engine reports."""
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    try:
        check_fields(kind, values, "")
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})
    except UserError:
        return kind()


def _methods(options: Mapping[str, Any]) -> AttentionMethods:
    try:
        return parse_attention_methods(options.get("sparse_attention"), options.get("quantized_attention"))
    except UserError:  # as in `_or_none`
        return ALL_DENSE


def _or_none(parse: Callable[[object], T | None], value: object) -> T | None:
    """The parsed value of an option; None if it is not allowed, as in the run.json of an older version. The engine
    reports it before a run.
    """
    try:
        return parse(value)
    except UserError:
        return None


def _read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file of the checkpoint; empty if it is missing or unreadable, which the engine reports."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _dit_values(base: Path, dit_weight: Any) -> Mapping[str, Any]:
    """The values of a config.json beside the DiT's weights, if it describes this engine's DiT."""
    path = Path(str(dit_weight)).expanduser() if dit_weight else base / "hunyuan-video-t2v-720p" / "transformers"
    values = _read_json((path if path.is_dir() else path.parent) / "config.json")
    return values if values.get("_class_name") == DIT_CLASS else {}


def _clip_text(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of CLIP's text tower, in a config of that tower alone or of both towers."""
    text = values.get("text_config")
    return text if isinstance(text, Mapping) else values
