"""The HunyuanVideo engine: builds text encoders, denoiser and decoder from the options of the config.

Constructing the engine is cheap, because the driver and every actor do it: the constructor validates the options and
reads neither weights nor devices. Each part is loaded by its own method.

P3: on a CPU every part computes with one thread, because the bits of a sum depend on how it is split over threads. One
thread is also faster on a small machine, where the spinning OpenMP threads of several processes slow each other down
tens of times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hv_batch.architecture import DiTConfig, TileGeometry
from hv_batch.attention_kernels import AUTO, DEFAULT, HALF_ONLY
from hv_batch.attention_methods import parse_attention_methods
from hv_batch.engine.attention.flex_blocks import check_backend
from hv_batch.engine.attention.kernels import KERNELS, choose_kernel
from hv_batch.engine.attention.quantized import check_quantized
from hv_batch.engine.attention.torch_flash import replaced_problem
from hv_batch.engine.checkpoint.digests import revision, vae_revision
from hv_batch.engine.checkpoint.licence_file import declared_licence
from hv_batch.engine.checkpoint.loading import FP8_MODES, dit_shapes, load_dit_and_tensors, load_vae, verify
from hv_batch.engine.checkpoint.lora.adapter import check_values, digest_adapter
from hv_batch.engine.checkpoint.lora.merge import LoraMerger, check_adapters
from hv_batch.engine.checkpoint.lora.options import parse_loras
from hv_batch.engine.checkpoint.tensor_files import Tensors
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.decoder import HunyuanDecoder
from hv_batch.engine.denoiser import HunyuanDenoiser
from hv_batch.engine.dit.fp8_matmul import multiply_in_fp8_
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.dit.offload import offload_blocks
from hv_batch.engine.dit.pointwise import check_compiler, compile_pointwise
from hv_batch.engine.kernel_choice import check_chosen, choose_for_group
from hv_batch.engine.option_values import parse_choice, parse_fields, parse_path, to_json
from hv_batch.engine.parallel.process_group import host_store, join_group
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.parallel.xfuser import XfuserAttention, check_xfuser, uneven_problem
from hv_batch.engine.sampling.sampler import NOISES, SamplingOptions
from hv_batch.engine.text_encoders import TextTowers
from hv_batch.protocol import Device, ParallelPlan, RankSpec, UserError
from hv_batch.sampling_params import Shape, latent_shape
from hv_batch.step_schedule import parse_cfg_until, parse_step_cache

if TYPE_CHECKING:
    from hv_batch.protocol import Engine

PRECISIONS: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OFFLOADS = ("none", "blocks", "mapped")
SEQUENCE_PARALLELS = ("native", "xfuser")


class HunyuanVideo:
    """The engine of this package (satisfies `hv_batch.protocol.Engine`).

    All options except the paths and `offload` are part of a video's identity:

    - `model_base`: the checkpoint tree. `dit_weight`: another DiT file, or a folder that holds one.
      `load_key`: the set of tensors to read from the file, "module" or "ema".
    - `dit`: fields of `DiTConfig` that differ from the released model and from a config.json beside the weights.
    - `precision`, `vae_precision`, `text_encoder_precision`, `text_encoder_precision_2`: "bf16", "fp16" or "fp32". The
      last one is for CLIP and defaults to that of LLaMA.
    - `fp8`: "none" dequantises FP8 weights at load time, "storage" on every use; both give equal
      pixels. "matmul" computes the products of the blocks in FP8, from any weights, and gives other pixels; see
      `hv_batch.engine.dit.fp8_matmul`.
    - `attention`: the attention kernel of the DiT: "sdpa", "cudnn", "flash", "fa3", "fa4" or "math". With "auto" the
      first group chooses the fastest one that it can run, and the run keeps it; see `hv_batch.engine.kernel_choice`.
    - `sparse_attention`: fields of `SparseAttention`, as `{density: 0.25}`: after the first steps, the image attends to
      a part of its blocks only. Needs native sequence parallelism without a ring.
    - `fuse_pointwise`: whether torch.compile fuses the norms, modulation and rotation of the DiT's blocks. It needs a
      compiler and changes the last bits; see `hv_batch.engine.dit.pointwise`.
    - `quantized_attention`: fields of `QuantizedAttention`, as `{qk: int8}`: attention in 8 bits, except in the first
      steps and the last one. Not together with `sparse_attention`.
    - `sequence_parallel`: how the ranks of a group compute attention: "native", or "xfuser" for xfuser's long-context
      attention, which needs GPUs and a token count that the ranks divide; see `hv_batch.engine.parallel.xfuser`.
    - `vae_tile`: fields of `TileGeometry` that differ from the tiling of the release.
    - `noise`: "cpu-fp32" draws equal noise on every device. "official" draws as the release does, on the device and in
      the dtype of the prompt embedding; use it to reproduce an old seed.
    - `flow_reverse`: the direction of sampling; the released model is sampled with True.
    - `step_cache`: which steps run the DiT, as `{kind: schedule, computed: 16}` of 50; the others are predicted. See
      `hv_batch.step_schedule` and `hv_batch.engine.sampling.step_cache`. None computes every step.
    - `cfg_until`: the share of the steps, such as 0.5, in which the negative branch of classifier-free guidance runs;
      see `hv_batch.engine.sampling.cfg_gate`. None runs it in every step. Not with cfg_degree 2.
    - `offload`: where the weights of the DiT's blocks are kept: "none" on the device, "blocks" in pinned host memory of
      every rank, "mapped" in the memory-mapped checkpoint file, whose pages the ranks of a node share.
    - `loras`: LoRA files by name, as `{film: {path: film.safetensors, strength: 0.8}}`; the strength is 1 if it is left
      out. `SamplingParams.lora` names those of a video; see `hv_batch.engine.checkpoint.lora`. Not with offload mapped.

    Raises UserError if a value is not allowed.
    """

    def __init__(
        self,
        *,
        model_base: str | Path,
        dit: Mapping[str, Any] | None = None,
        dit_weight: str | Path | None = None,
        load_key: str = "module",
        precision: str = "bf16",
        vae_precision: str = "fp16",
        text_encoder_precision: str = "fp16",
        text_encoder_precision_2: str | None = None,
        fp8: str = "none",
        attention: str = "sdpa",
        sparse_attention: Mapping[str, Any] | None = None,
        fuse_pointwise: bool = False,
        quantized_attention: Mapping[str, Any] | None = None,
        sequence_parallel: str = "native",
        vae_tile: Mapping[str, Any] | None = None,
        noise: str = "cpu-fp32",
        flow_reverse: bool = True,
        step_cache: Mapping[str, Any] | None = None,
        cfg_until: float | None = None,
        offload: str = "none",
        loras: Mapping[str, Any] | None = None,
    ) -> None:
        # Absolute, because actors run in another working directory than the driver.
        dit_path = None if dit_weight is None else parse_path("dit_weight", dit_weight)
        self._tree = CheckpointTree(
            parse_path("model_base", model_base), dit_path, parse_choice("load_key", load_key, ("module", "ema"))
        )
        self._dit_config = parse_fields(DiTConfig, dit or {}, "dit", self._tree.dit_options())
        self._geometry = parse_fields(TileGeometry, vae_tile or {}, "vae_tile")
        self._precisions = {
            "precision": precision,
            "vae_precision": vae_precision,
            "text_encoder_precision": text_encoder_precision,
            "text_encoder_precision_2": text_encoder_precision_2 or text_encoder_precision,
        }
        for option, value in self._precisions.items():
            parse_choice(option, value, PRECISIONS)
        self._fp8 = parse_choice("fp8", fp8, FP8_MODES)
        self._attention = parse_choice("attention", attention, (*KERNELS, AUTO))
        if attention in HALF_ONLY and precision == "fp32":
            raise UserError(
                f"engine option attention: {attention} computes in half precision only, and precision is fp32; choose "
                "precision bf16 or fp16, or attention sdpa."
            )
        self._sequence_parallel = parse_choice("sequence_parallel", sequence_parallel, SEQUENCE_PARALLELS)
        for option, flag in {"flow_reverse": flow_reverse, "fuse_pointwise": fuse_pointwise}.items():
            if not isinstance(flag, bool):
                raise UserError(f"engine option {option}: {flag!r} is not allowed; allowed are true and false.")
        self._fuse_pointwise = fuse_pointwise
        self._methods = parse_attention_methods(sparse_attention, quantized_attention)
        self._sampling = SamplingOptions(
            parse_choice("noise", noise, NOISES),
            flow_reverse,
            parse_step_cache(step_cache),
            parse_cfg_until(cfg_until),
            self._methods,
        )
        self._offload = parse_choice("offload", offload, OFFLOADS)
        self._loras = parse_loras(loras or {})
        if self._loras and offload == "mapped":
            raise UserError(
                "engine option offload: mapped keeps the weights in the checkpoint file, into which no LoRA can be "
                "merged. Choose offload blocks or none, or remove loras."
            )

    def check(self) -> list[str]:
        """Return one sentence for each missing file, unreadable file or mismatching tensor.

        Reads no tensor data of the model, and all of the LoRAs, which are small.
        """
        return [*verify(self._tree, self._dit_config, self._fp8), *self.lora_problems()]

    def lora_problems(self) -> list[str]:
        """Return one message for each LoRA that cannot be used; needs no file of the checkpoint."""
        return check_adapters(self._loras, dit_shapes(self._dit_config), check_values) if self._loras else []

    def identity(self) -> dict[str, Any]:
        """Return all facts of this engine that change pixels (P3).

        Raises UserError if a file of the checkpoint is missing.
        """
        return {
            "weights": self._revision,
            "load_key": self._tree.load_key,
            "dit": to_json(asdict(self._dit_config)),
            **self._precisions,
            "fp8": self._fp8,
            "attention": self._attention,
            # Newer options are listed only if they are used, so that the identity of older output roots stays equal.
            **({"fuse_pointwise": True} if self._fuse_pointwise else {}),
            **({} if self._sequence_parallel == "native" else {"sequence_parallel": self._sequence_parallel}),
            **({"sparse_attention": self._methods.sparse.to_json()} if self._methods.sparse else {}),
            **({"quantized_attention": self._methods.quantized.to_json()} if self._methods.quantized else {}),
            **({"step_cache": self._sampling.step_cache.identity()} if self._sampling.step_cache else {}),
            **({"cfg_until": self._sampling.cfg_until} if self._sampling.cfg_until else {}),
            **({"loras": self._lora_identity} if self._loras else {}),
            "vae_tile": to_json(asdict(self._geometry)),
            "noise": self._sampling.noise,
            "flow_reverse": self._sampling.reverse,
        }

    def decoder_identity(self) -> dict[str, Any]:
        """Return the part of `identity` that belongs to the decoder; needs only the VAE's files of the checkpoint."""
        return {
            "weights": vae_revision(self._tree),
            "vae_precision": self._precisions["vae_precision"],
            "vae_tile": to_json(asdict(self._geometry)),
        }

    def licence(self) -> str | None:
        """Return the licence that the checkpoint tree declares for exactly these weights; None if it declares none."""
        return declared_licence(self._tree.model_base, self._revision)

    @cached_property
    def _revision(self) -> dict[str, str]:
        return revision(self._tree)

    @cached_property
    def _lora_identity(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"sha256": digest_adapter(file.path), "strength": file.strength} for name, file in self._loras.items()
        }

    def group_problems(self, plan: ParallelPlan, shapes: Iterable[Shape] = ()) -> list[str]:
        """Return the reasons why the model cannot run with `plan`, or cannot render `shapes` with it; empty if none.

        The Ulysses degree must divide the number of attention heads; the ring degree may be any number. Native sequence
        parallelism supports every shape with every plan; xfuser needs a token count that the ranks divide. Sparse
        attention needs a ring degree of 1 and native sequence parallelism.
        """
        return [
            *self._head_problems(plan),
            *self._sparse_problems(plan),
            *self._xfuser_problems(plan, shapes),
            *self._cfg_problems(plan),
        ]

    def _cfg_problems(self, plan: ParallelPlan) -> Iterator[str]:
        if plan.cfg_degree > 1 and self._sampling.cfg_until:
            yield (
                f"cfg_degree {plan.cfg_degree} gives the negative branch to half of the ranks, which would wait in all "
                f"steps after cfg_until {self._sampling.cfg_until:g} of them; remove cfg_until, or choose cfg_degree 1"
            )

    def _sparse_problems(self, plan: ParallelPlan) -> Iterator[str]:
        if self._methods.sparse is None:
            return
        if plan.ring_degree > 1:
            yield (
                f"sparse_attention chooses the keys of a head among all tokens, but a rank of {plan} holds a part of "
                f"them; use ring_degree 1 and a ulysses_degree that divides {self._dit_config.heads_num} heads"
            )
        if self._sequence_parallel == "xfuser":
            yield "sparse_attention needs sequence_parallel 'native', which gives a kernel all tokens of its heads"

    def _xfuser_problems(self, plan: ParallelPlan, shapes: Iterable[Shape]) -> Iterator[str]:
        if self._sequence_parallel != "xfuser":
            return
        if plan.sequence_degree == 1:
            yield f"sequence_parallel 'xfuser' needs at least two ranks per sequence, not {plan}; choose 'native'"
        pt, ph, pw = self._dit_config.patch_size
        for height, width, frames in sorted(shapes):
            _, t, h, w = latent_shape(height, width, frames)
            if problem := uneven_problem((t // pt) * (h // ph) * (w // pw), plan.sequence_degree):
                yield f"{height}x{width}x{frames}: {problem}"

    def _head_problems(self, plan: ParallelPlan) -> list[str]:
        heads = self._dit_config.heads_num
        if heads % plan.ulysses_degree == 0:
            return []
        allowed = f"with {plan.world_size} ranks, ulysses_degree x ring_degree may be {_splits(heads, plan.world_size)}"
        if plan.world_size % 2 == 0:
            allowed += f"; with cfg_degree 2 also {_splits(heads, plan.world_size // 2)}"
        return [f"ulysses_degree {plan.ulysses_degree} does not divide the model's {heads} attention heads; {allowed}"]

    def text_encoder(self, device: Device) -> TextTowers:
        """Load both text encoders on `device`. Raises UserError if that GPU or a file is missing."""
        if device == "cuda" and (problem := replaced_problem()):
            raise UserError(problem)
        return TextTowers(
            self._tree.text_encoder,
            self._tree.text_encoder_2,
            device=_select_device(device),
            dtype=self._dtype("text_encoder_precision"),
            clip_dtype=self._dtype("text_encoder_precision_2"),
            llama_tokenizer=self._tree.tokenizer,
            clip_tokenizer=self._tree.tokenizer_2,
        )

    def host_rendezvous(self, host: str, world_size: int) -> str:
        """Start the rendezvous store of a group on a free port of `host`; return its address. Called on rank 0 only."""
        return host_store(host, world_size)

    def join(self, spec: RankSpec) -> HunyuanDenoiser:
        """Load the DiT, and the VAE if `spec.decodes`; then join the group. Blocks until every rank has joined.

        The model is loaded first, so that a rank that cannot load it raises its own error. Raises UserError if the
        device, the kernel or a file is missing.
        """
        device = _select_device(spec.device, spec.local_rank)
        dtype = self._dtype("precision")
        chosen = spec.choices.get("attention", AUTO) if self._attention == AUTO else self._attention
        if chosen != self._attention:  # raises before 26 GB are read
            check_chosen(chosen, device, dtype)
        elif chosen != AUTO:
            choose_kernel(chosen, device, dtype)
        if sparse := self._methods.sparse:
            check_backend(sparse.backend, sparse.block, device)
        if self._methods.quantized:
            check_quantized(self._methods.quantized, device, dtype)
        if self._sequence_parallel == "xfuser":
            check_xfuser(device)
        if self._fuse_pointwise:
            check_compiler(device)
        vae = load_vae(self._tree, self._dtype("vae_precision"), device) if spec.decodes else None
        load_device = device if self._offload == "none" else torch.device("cpu")
        kernel = DEFAULT if chosen == AUTO else chosen
        model, base = load_dit_and_tensors(self._tree, self._dit_config, kernel, dtype, load_device, self._fp8)
        if self._fp8 == "matmul":
            multiply_in_fp8_(model, device)
        if self._fuse_pointwise:
            compile_pointwise((*model.double_blocks, *model.single_blocks))
        loras = self._lora_merger(model, base, device) if self._loras else None
        if self._offload != "none":
            streamer = offload_blocks(model, device, pinned=self._offload == "blocks")
            if loras:
                loras.on_change = streamer.forget
        mesh = SequenceMesh.single() if spec.plan.world_size == 1 else join_group(spec)
        if self._sequence_parallel == "xfuser":
            model.joint_attention = XfuserAttention(mesh)
        decoder = HunyuanDecoder(vae, self._geometry, mesh) if vae else None
        if chosen == AUTO:
            chosen = choose_for_group(model, mesh, device)
        choices = {"attention": chosen} if self._attention == AUTO else {}
        return HunyuanDenoiser(model, mesh, device, self._sampling, decoder, loras, choices)

    def open_options(self) -> tuple[str, ...]:
        """Return the names of the options that the first group decides; see `hv_batch.protocol.Engine`."""
        return ("attention",) if self._attention == AUTO else ()

    def _lora_merger(self, model: HYVideoDiT, base: Tensors, device: torch.device) -> LoraMerger:
        return LoraMerger(
            model,
            base,
            dit_shapes(self._dit_config),
            self._loras,
            self._dtype("precision"),
            device,
            in_place=("double_blocks.", "single_blocks.") if self._offload == "blocks" else (),
        )

    def decoder(self, device: Device) -> HunyuanDecoder:
        """Load the VAE on `device`."""
        vae = load_vae(self._tree, self._dtype("vae_precision"), _select_device(device))
        return HunyuanDecoder(vae, self._geometry, SequenceMesh.single())

    def _dtype(self, option: str) -> torch.dtype:
        return PRECISIONS[self._precisions[option]]


def _select_device(device: Device, local_rank: int = 0) -> torch.device:
    """Make `device` the current device of this process. Raises UserError if that GPU is not visible."""
    if device == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        raise UserError(
            f"device 'cuda' needs GPU number {local_rank}, but this process sees {visible} GPUs. "
            "Set parallel.device to 'cpu', or run on a machine that has the GPUs and a CUDA build of torch."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _splits(heads: int, ranks: int) -> str:
    """List every Ulysses x ring combination of `ranks` ranks that divides the heads."""
    return ", ".join(f"{u} x {ranks // u}" for u in range(1, heads + 1) if ranks % u == 0 and heads % u == 0)


if TYPE_CHECKING:
    _: type[Engine] = HunyuanVideo
