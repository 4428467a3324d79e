"""What a run needs and costs, computed before it starts: `hv-batch plan`. Needs neither GPUs nor weights.

This module adds up the numbers of `hv_batch.job.cost_model.{model,memory,flops,speed}` over a manifest. Hours are
estimates; `hv_batch.job.cost_model.speed` says what they are fitted to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hv_batch.job.config.group_rules import GROUP_SIZES, NODE_GPUS
from hv_batch.job.config.hardware import GPUS, Gpu
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.cost_model.checked_manifest import checked_manifest
from hv_batch.job.cost_model.flops import (
    count_work,
    decode_flops,
    denoise_flops,
    exchange_bytes,
    mean_density,
    plan_ranks,
    rank_traffic,
)
from hv_batch.job.cost_model.group_report import rank_seconds, report_halves, report_sizes
from hv_batch.job.cost_model.memory import (
    GIB,
    RESERVE_BYTES,
    Footprint,
    decoder_footprint,
    denoiser_footprint,
    encoder_footprint,
    rank_footprint,
)
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.cost_model.recommend import recommend
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.cost_model.sample_cost import report_prices
from hv_batch.job.cost_model.speed import ENCODE_SECONDS, decode_seconds, denoise_seconds, kernel_of
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.samples import Sample, count_lora_changes
from hv_batch.job.scheduling.pool_sizing import worker_count, workers_needed
from hv_batch.job.stages import Stage
from hv_batch.job.workload import Workload
from hv_batch.protocol import ParallelPlan

DAY_S = 86_400
HOUR_S = 3600

Report = dict[str, Any]


def make_plan(config: RunConfig, manifest_urls: Sequence[str], gpu: Gpu, price: float | None = None) -> Report:
    """The whole plan, JSON-able. Raises UserError for a config or manifest that a run would refuse.

    `price` is that of one GPU for an hour; without it, all costs are null.
    """
    manifest = Manifest(manifest_urls)
    with checked_manifest(config, manifest) as (index, run):
        summary = index.summary
        work = count_work(sample.params for sample in index)
        loras = _lora_changes(index) if config.model.loras else None
    workers = planned_workers(run, stage_seconds(run, work, gpu))
    gpus = reserved_gpus(run, workers)
    return {
        "manifest": {
            "url": manifest.public_urls,
            "rows": summary.rows,
            "samples": summary.samples,
            "shards": summary.shards,
            "carried": list(summary.extra_kinds),
            "notes": list(summary.warnings),
        },
        **({"loras": loras} if loras else {}),
        "work": [_work(run.model, kind, count) for kind, count in sorted(work.items())],
        "components": _components(run.model),
        "memory": _memory(run, work, gpu),
        "traffic": _traffic(run, work, gpu),
        "gpus": gpus,
        "workers": {stage.name.lower(): count for stage, count in sorted(workers.items())},
        "groups_decode": run.groups_decode,
        "encoders_colocated": config.encoders.is_colocated,
        "estimate": {name: _estimate(run, stage_seconds(run, work, known), known) for name, known in GPUS.items()},
        "gpu": {
            "name": gpu.name,
            "tflops": gpu.tflops,
            "memory_gib": gpu.memory_gib,
            "efficiency": gpu.efficiency,
            "fitted_to": gpu.anchor,
        },
        "attention": {"option": run.model.attention, "assumed": kernel_of(gpu, run.model)},
        "cudnn_would_save": _cudnn_saves(run, work, gpu),
        "sizes": report_sizes(run, work, gpu),
        "halves": report_halves(run, work, gpu),
        "group_sizes": [_group_size(run.model, work, gpu, ranks) for ranks in GROUP_SIZES],
        "price_gpu_hour": price,
        "costs": report_prices(run, work, gpu, price),
        "recommendation": recommend(run, work, gpu, gpus["total"], price),
    }


def _lora_changes(samples: Iterable[Sample]) -> Report:
    """Samples of each choice of LoRAs, and how often a group that denoises all of them reads weights again."""
    counts, changes = count_lora_changes(samples)
    return {"samples": dict(sorted(counts.items())), "changes": changes}


def _work(model: ModelShape, work: Workload, samples: int) -> Report:
    height, width, frames = work.shape
    return {
        "height": height,
        "width": width,
        "num_frames": frames,
        "steps": work.steps,
        **({"computed_steps": model.computed_steps(work.steps)} if model.step_cache else {}),
        "cfg": work.branches == 2,
        "samples": samples,
        "tokens": work.tokens,
        "denoise_flops": denoise_flops(model, work),
        **({"attention_density": mean_density(model, work)} if model.methods.sparse else {}),
        "decode_flops": decode_flops(model, work.shape),
    }


def _components(model: ModelShape) -> list[Report]:
    dit = {"name": "DiT", "parameters": model.dit.parameters, "bytes": model.dit_bytes}
    dit |= {"streamed_from_host": model.streamed_bytes} if model.offload else {}
    return [
        {"name": "LLaMA and CLIP", "parameters": model.llama.parameters + model.clip.parameters}
        | {"bytes": model.text_bytes},
        dit,
        {"name": "VAE", "parameters": model.vae.parameters, "bytes": model.vae_bytes},
    ]


def _memory(run: ResolvedRun, work: Counter[Workload], gpu: Gpu) -> list[Report]:
    """The peak memory of each kind of worker, at the shape that needs most."""
    model, decodes = run.model, run.groups_decode
    ranks = {kind: _rank(model, kind, run.groups.by_shape[kind.shape], decodes=decodes) for kind in work}
    decoders = {} if decodes else {kind: decoder_footprint(model, kind.shape) for kind in work}
    stages = [_stage("text encoder", encoder_footprint(model), gpu)]
    for name, footprints in (("group rank" if decodes else "denoise rank", ranks), ("VAE decoder", decoders)):
        if footprints:
            largest = max(footprints, key=lambda kind: footprints[kind].total)
            stages.append(_stage(name, footprints[largest], gpu, largest))
    return stages


def _rank(model: ModelShape, kind: Workload, plan: ParallelPlan, *, decodes: bool) -> Footprint:
    return rank_footprint(model, kind.shape, plan.ulysses_degree, plan.ring_degree, decodes=decodes)


def _stage(name: str, footprint: Footprint, gpu: Gpu, work: Workload | None = None) -> Report:
    return {
        "stage": name,
        "shape": list(work.shape) if work else None,
        "weights": footprint.weights,
        "activations": footprint.activations,
        "reserve": RESERVE_BYTES,
        "total": footprint.total,
        "fits": footprint.total <= gpu.memory_gib * GIB,
    }


def _traffic(run: ResolvedRun, work: Counter[Workload], gpu: Gpu) -> Report:
    """Bytes that one rank sends for a sample of the shape with most tokens, and the efficiency of its group."""
    model, kind = run.model, max(work, key=lambda kind: kind.tokens)
    alone, together = ParallelPlan(), run.groups.by_shape[kind.shape]
    sent = rank_traffic(model, kind.tokens, together.ulysses_degree, together.ring_degree)
    passes = kind.branches // together.cfg_degree
    exchanged = exchange_bytes(model, kind.tokens) if together.cfg_degree > 1 else 0.0
    return {
        "shape": list(kind.shape),
        "ulysses_bytes_a_step": sent.ulysses * passes,
        "ring_bytes_a_step": sent.ring * passes,
        "exchange_bytes_a_step": exchanged,
        "bytes_a_sample": model.forwards(kind).total() // together.cfg_degree * sent.total
        + model.computed_steps(kind.steps) * exchanged,
        "streamed_bytes_a_step": model.streamed_bytes * passes,
        "group": str(together),
        "efficiency": denoise_seconds(gpu, model, kind, alone)
        / denoise_seconds(gpu, model, kind, together)
        / together.world_size,
    }


def planned_workers(run: ResolvedRun, seconds: Mapping[Stage, float]) -> dict[Stage, int]:
    """Workers of each stage, with `auto` pools as a run would size them. `seconds` are those of one worker for the
    whole manifest. All groups count as groups of the largest size.
    """
    config = run.config
    workers = {**run.max_workers, Stage.DENOISE: config.groups.count}
    for stage, pool in ((Stage.ENCODE, config.encoders), (Stage.DECODE, config.decoders)):
        if pool.count == "auto":
            needed = workers_needed(config.groups.count, seconds[Stage.DENOISE], seconds[stage])
            workers[stage] = worker_count(needed, workers[stage])
    return workers


def reserved_gpus(run: ResolvedRun, workers: Mapping[Stage, int]) -> Report:
    groups = workers[Stage.DENOISE] * run.groups.largest.world_size * run.config.groups.gpus_per_rank
    encoders, decoders = (
        workers[stage] * run.pools[stage].gpus if stage in run.pools else 0.0 for stage in (Stage.ENCODE, Stage.DECODE)
    )
    return {"groups": groups, "encoders": encoders, "decoders": decoders, "total": groups + encoders + decoders}


def stage_seconds(run: ResolvedRun, work: Counter[Workload], gpu: Gpu) -> dict[Stage, float]:
    """Seconds that one worker of each stage would take for the whole manifest. The group is one of the largest size, or
    several smaller ones on the same GPUs that are never idle.
    """
    model, groups = run.model, run.groups
    largest = groups.largest.world_size

    def decoding(kind: Workload) -> float:
        if not run.groups_decode:
            return decode_seconds(gpu, model, kind)
        ranks = groups.by_shape[kind.shape].world_size
        return decode_seconds(gpu, model, kind, ranks) * ranks / largest

    def denoising(kind: Workload) -> float:
        return rank_seconds(gpu, model, kind, groups.by_shape[kind.shape])

    return {
        Stage.ENCODE: _total(work, lambda kind: kind.branches * ENCODE_SECONDS),
        Stage.DENOISE: _total(work, denoising) / largest,
        Stage.DECODE: _total(work, decoding),
    }


def _estimate(run: ResolvedRun, seconds: Mapping[Stage, float], gpu: Gpu) -> Report:
    """Hours of every stage over the whole manifest. The stages overlap, so the slowest one determines the run's hours.

    A group does not denoise while it decodes: if groups do both, these two add up.
    """
    workers = planned_workers(run, seconds)
    stages = {stage.name.lower(): seconds[stage] / (workers[stage] or workers[Stage.DENOISE]) for stage in Stage}
    in_groups = stages["denoise"] + stages["decode"]
    hours = (max(stages["encode"], in_groups) if run.groups_decode else max(stages.values())) / HOUR_S
    return {
        "hours": hours,
        "gpu_hours": hours * reserved_gpus(run, workers)["total"],
        "slowest": max(stages, key=lambda stage: stages[stage]),
        "stage_hours": {stage: seconds / HOUR_S for stage, seconds in stages.items()},
        "assumed": gpu.anchor.startswith("none"),
    }


def _cudnn_saves(run: ResolvedRun, work: Counter[Workload], gpu: Gpu) -> float:
    """The fraction of denoise time that `attention: cudnn` would save; 0 if it is already chosen or not known to be
    faster on this GPU.
    """

    def denoising(model: ModelShape) -> float:
        return _total(work, lambda kind: rank_seconds(gpu, model, kind, run.groups.by_shape[kind.shape]))

    if run.model.precision == "fp32":  # which cuDNN's kernel does not support
        return 0.0
    return 1 - denoising(replace(run.model, attention="cudnn")) / denoising(run.model)


def _group_size(model: ModelShape, work: Counter[Workload], gpu: Gpu, ranks: int) -> Report:
    """The cost of denoising this manifest with groups of `ranks` ranks."""
    ulysses, ring = plan_ranks(model.dit.heads_num, ranks)
    plan = ParallelPlan(ulysses_degree=ulysses, ring_degree=ring)
    seconds = _total(work, lambda kind: denoise_seconds(gpu, model, kind, plan))
    alone = _total(work, lambda kind: denoise_seconds(gpu, model, kind, ParallelPlan()))
    largest = max(kind.tokens for kind in work)
    need = denoiser_footprint(model, largest, ulysses, ring).total
    return {
        "ranks": ranks,
        "ulysses_degree": ulysses,
        "ring_degree": ring,
        "seconds_a_sample": seconds / work.total(),
        "efficiency": alone / seconds / ranks,
        "videos_a_node_a_day": DAY_S * (NODE_GPUS // ranks) * work.total() / seconds,
        "gpu_hours": seconds * ranks / HOUR_S,
        "bytes_a_rank": need,
        "fits": need <= gpu.memory_gib * GIB,
    }


def _total(work: Counter[Workload], seconds: Any) -> float:
    return sum(count * seconds(kind) for kind, count in work.items())
