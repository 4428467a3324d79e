"""The `plan` command: what a run needs and costs, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hv_batch.job.cost_model.memory import GIB
from hv_batch.job.manifest.column_report import describe_columns
from hv_batch.job.workload import shape_name


def render_plan(plan: Mapping[str, Any]) -> str:
    """The plan as text tables."""
    return "\n".join(_lines(plan))


def _lines(plan: Mapping[str, Any]) -> Iterator[str]:
    manifest, gpu = plan["manifest"], plan["gpu"]
    rows, samples, shards = (f"{manifest[count]:,} {count}" for count in ("rows", "samples", "shards"))
    urls = manifest["url"]
    yield f"{urls if isinstance(urls, str) else ', '.join(urls)}: {rows}, {samples} in {shards}"
    yield from describe_columns(manifest["carried"], manifest["notes"])
    yield ""
    # With a step cache, the number of steps that run the model is shown as well.
    yield f"{'shape':<16}{'steps':>10}{'cfg':>5}{'samples':>10}{'tokens':>10}{'denoise PFLOP':>15}{'decode PFLOP':>14}"
    for work in plan["work"]:
        shape = shape_name([work["height"], work["width"], work["num_frames"]])
        steps = f"{work['computed_steps']} of {work['steps']}" if "computed_steps" in work else str(work["steps"])
        yield (
            f"{shape:<16}{steps:>10}{'yes' if work['cfg'] else 'no':>5}{work['samples']:>10,}"
            f"{work['tokens']:>10,}{work['denoise_flops'] / 1e15:>15,.4g}{work['decode_flops'] / 1e15:>14,.4g}"
        )
    if loras := plan.get("loras"):
        sets = ", ".join(f"{lora or 'none'}: {count:,}" for lora, count in loras["samples"].items())
        yield (
            f"LoRAs, in samples: {sets}; a group changes them at most {loras['changes']:,} times, and each time reads "
            "the weights that they touch"
        )
    yield ""
    yield f"{'model':<16}{'parameters':>14}{'GB':>9}"
    for part in plan["components"]:
        streamed = part.get("streamed_from_host")
        note = f"  of which {streamed / 1e9:.2f} stream from the host" if streamed else ""
        yield f"{part['name']:<16}{part['parameters']:>14,}{part['bytes'] / 1e9:>9.2f}{note}"
    yield ""
    yield f"{'memory, GiB':<16}{'weights':>9}{'activations':>13}{'reserve':>9}{'peak':>8}  at"
    for stage in plan["memory"]:
        at = shape_name(stage["shape"]) if stage["shape"] else ""
        fits = "" if stage["fits"] else f"  DOES NOT FIT into the {gpu['memory_gib']:g} of one {gpu['name']}"
        weights, activations, reserve, total = (
            stage[part] / GIB for part in ("weights", "activations", "reserve", "total")
        )
        yield f"{stage['stage']:<16}{weights:>9.1f}{activations:>13.1f}{reserve:>9.1f}{total:>8.1f}  {at}{fits}"
    yield ""
    yield from _cost_lines(plan)


def _cost_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    gpu, bill, traffic, workers = plan["gpu"], plan["gpus"], plan["traffic"], plan["workers"]
    yield (
        f"GPUs: {bill['groups']:g} for {workers['denoise']} group(s) + {bill['encoders']:g} for {workers['encode']} "
        f"encoder(s) + {bill['decoders']:g} for {workers['decode']} decoder(s) = {bill['total']:g}"
    )
    if plan["encoders_colocated"]:
        yield "encoders share the groups' GPUs and slow down denoising: the hours below are a lower bound"
    if plan["groups_decode"]:
        yield "groups also decode and do not denoise meanwhile: the hours of both are added"
    yield (
        f"sent by a rank in a step of {shape_name(traffic['shape'])}: {traffic['ulysses_bytes_a_step'] / 1e9:.1f} GB "
        f"by Ulysses, {traffic['ring_bytes_a_step'] / 1e9:.1f} GB by the ring; so {traffic['group']} keeps "
        f"{traffic['efficiency']:.0%} of its {gpu['name']}s' speed"
    )
    yield ""
    yield f"{'estimate':<16}{'hours':>9}{'GPU hours':>11}{'encode':>9}{'denoise':>9}{'decode':>9}"
    for name, estimate in plan["estimate"].items():
        stages = estimate["stage_hours"]
        yield (
            f"{name.upper():<16}{estimate['hours']:>9.2f}{estimate['gpu_hours']:>11.1f}{stages['encode']:>9.2f}"
            f"{stages['denoise']:>9.2f}{stages['decode']:>9.2f}{'  (speed assumed)' if estimate['assumed'] else ''}"
        )
    yield ""
    yield from size_lines(plan)
    yield f"denoising this manifest on {gpu['name']}, by group size:"
    head = f"{'ranks (u x r)':<16}{'s/sample':>9}{'efficient':>11}{'videos/node/day':>17}"
    yield f"{head}{'GPU hours':>11}{'GiB/rank':>10}"
    for size in plan["group_sizes"]:
        plan_name = f"{size['ranks']} ({size['ulysses_degree']} x {size['ring_degree']})"
        yield (
            f"{plan_name:<16}{size['seconds_a_sample']:>9.1f}{size['efficiency']:>11.0%}"
            f"{size['videos_a_node_a_day']:>17,.0f}{size['gpu_hours']:>11.1f}{size['bytes_a_rank'] / GIB:>10.1f}"
            f"{'' if size['fits'] else '  does not fit'}"
        )
    yield ""
    yield from _price_lines(plan)
    yield from _recommendation_lines(plan)
    attention = plan["attention"]
    assumes = (
        "" if attention["option"] == attention["assumed"] else f", for which this plan assumes {attention['assumed']}"
    )
    yield f"attention kernel: {attention['option']}{assumes}"
    yield (
        f"{gpu['name']}: {gpu['tflops']:g} TFLOP/s dense bf16, of which {gpu['efficiency']:.1%}, fitted to: "
        f"{gpu['fitted_to']}. Speeds are estimates; memory is computed, with an assumed reserve."
    )
    if densities := sorted({work["attention_density"] for work in plan["work"] if "attention_density" in work}):
        shown = ", ".join(f"{density:.2f}" for density in densities)
        yield (
            f"sparse attention computes a fraction of {shown} of the dense attention, averaged over the steps; more if "
            "top_p is set. Its kernel is assumed to be as fast as the dense one."
        )
    if plan["cudnn_would_save"] > 0:
        yield (
            f"model.options.attention=cudnn would denoise this in {plan['cudnn_would_save']:.0%} less time on "
            f"{gpu['name']}, with the same accuracy but other pixels in the last bits."
        )


def _price_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """What a sample costs by shape and group size: GPU seconds, and a price if there is one."""
    price = plan["price_gpu_hour"]
    unit = "GPU seconds" if price is None else f"price at {price:g} for a GPU hour"
    sizes = "".join(f"{size['ranks']:>10}" for size in plan["costs"][0]["group_sizes"])
    yield f"{unit} of a sample, with encoding and decoding, by ranks of a group (*: does not fit)"
    yield f"{'shape, steps':<22}{sizes}{'denoise':>10}{'decode':>8}{'encode':>8}"
    for cost in plan["costs"]:
        cells = ""
        for size in cost["group_sizes"]:
            value = f"{size['gpu_seconds']:,.1f}" if price is None else f"{size['cost']:,.4f}"
            cells += f"{value if size['fits'] else value + '*':>10}"
        name = f"{shape_name(cost['shape'])}, {cost['steps']}{' cfg' if cost['cfg'] else ''}"
        shares = cost["shares"]
        yield f"{name:<22}{cells}{shares['denoise']:>10.1%}{shares['decode']:>8.1%}{shares['encode']:>8.1%}"
    yield ""


def _recommendation_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """The setups that use the GPUs of the config best, for the options as they are and for others."""
    recommended = plan["recommendation"]
    has_price = plan["price_gpu_hour"] is not None
    yield f"setups for {recommended['gpus']:g} GPUs, with the cheapest groups (!: other pixels, to be checked first)"
    yield (
        f"{'options':<38}{'ranks':>6}{'groups':>8}{'encoders':>10}{'decoders':>10}{'hours':>9}{'GPU hours':>11}"
        f"{'a sample' if has_price else '':>10}"
    )
    for variant in recommended["variants"]:
        name, setup = f"{variant['name']}{'' if variant['exact'] else ' !'}", variant["setup"]
        if setup is None:
            yield f"{name:<38}  no setup: too little memory, or too few GPUs for a group, an encoder and a decoder"
            continue
        yield (
            f"{name:<38}{variant['ranks']:>6}{setup['groups']:>8}{setup['encoders']:>10}{setup['decoders']:>10}"
            f"{setup['hours']:>9.2f}{variant['gpu_hours']:>11.1f}"
            f"{format(variant['cost_a_sample'], '.4f') if has_price else '':>10}"
        )
    if best := next((each for each in recommended["variants"] if each["name"] == recommended["best_exact"]), None):
        yield f"recommended: {' '.join([*best['setup']['overrides'], *best['overrides']])}"
    yield ""


def size_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """The group of each shape, unless the config fixes one for all, and the GPU hours of `cfg_degree: 2` if fewer."""
    if any(size["why"] for size in plan["sizes"]):
        yield f"{'shape':<16}{'samples':>10}{'s/sample':>10}{'GPU hours':>11}  group"
        for size in plan["sizes"]:
            yield (
                f"{shape_name(size['shape']):<16}{size['samples']:>10,}{size['seconds_a_sample']:>10.1f}"
                f"{size['gpu_hours']:>11.1f}  {size['ranks']} ({size['group']}), {size['why']}"
            )
        yield ""
    if halves := plan["halves"]:
        yield (
            "every row uses guidance: with parallel.cfg_degree=2 (half of a group per branch), denoising would "
            f"take {halves['gpu_hours']:.1f} GPU hours instead of {halves['instead_of']:.1f}"
        )
        yield ""
