"""`hv-batch sample`: render prompts to files on one machine, without Ray.

    encode all prompts -> free the text towers -> denoise (one process, or a local group) -> decode -> mp4 or png
                                                        --latents-only: .safetensors    ^
                                                        --from-latents: start here -----'

`sample_flags` parses the flags, and `sample_files` writes the files. stdout has the paths of the files; notes for the
user are logged.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from hv_batch import __version__
from hv_batch.cli.sample.files import free_stem, read_latents, shorten, write_latents, write_video
from hv_batch.cli.sample.flags import MODELS, ignored_flags, parse, parse_lora_flags, round_up
from hv_batch.cli.terminal import fail, show_json
from hv_batch.engine.determinism import make_deterministic
from hv_batch.engine.hunyuan import PRECISIONS, HunyuanVideo
from hv_batch.engine.matmul_speed import matmul_flops
from hv_batch.engine.pipeline import Callback, HunyuanVideoPipeline, choose_device
from hv_batch.engine.rank_failures import RankFailed
from hv_batch.engine.video_requests import plan_videos
from hv_batch.job.cost_model.flops import decode_flops, denoise_flops
from hv_batch.job.cost_model.model import ModelShape
from hv_batch.job.formatting import clock, duration
from hv_batch.job.licences import engine_licence
from hv_batch.job.progress import LINE_EVERY_S
from hv_batch.job.workload import Workload, long_video_warning, shape_name
from hv_batch.protocol import NonFiniteError, UserError
from hv_batch.sampling_params import DEFAULT_NEGATIVE_PROMPT, MAX_SIDE, SamplingParams, canonical_lora, problems
from hv_batch.step_schedule import KIND, computed_steps, parse_step_cache

logger = logging.getLogger(__name__)

SCHEMA = "hv_batch/sample/1"
MAX_RANDOM_SEED = 1_000_000
LONG_S = 600.0  # of a render on a CPU, after which another way is suggested
# Flag of each field of the parameters, for messages.
FLAGS = {
    "prompt": "--prompt",
    "negative_prompt": "--neg-prompt",
    "height": "height of --video-size",
    "width": "width of --video-size",
    "num_frames": "--video-length",
    "num_inference_steps": "--infer-steps",
    "seed": "--seed",
    "guidance_scale": "--embedded-cfg-scale",
    "cfg_scale": "--cfg-scale",
    "guidance_rescale": "--guidance-rescale",
    "flow_shift": "--flow-shift",
    "lora": "--lora",
}
# Tiles larger than any video that can be rendered.
UNTILED = {"spatial_px": MAX_SIDE, "temporal_frames": 1040, "overlap": 0.0}


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code. Raises UserError for errors that the user can fix."""
    options = parse(arguments)
    _refuse_launcher()
    for flag in ignored_flags(options):
        logger.warning(f"{flag} has no effect, as in the release")
    engine = HunyuanVideo(**_engine_options(options))
    folder = _save_folder(options)
    try:
        written = _decode(options, engine, folder) if options.from_latents else _render(options, engine, folder)
        files = []
        for path in written:
            files.append(str(path))
            if not options.json:
                print(path, flush=True)
    except RankFailed as failed:
        fail(str(failed), options.json)
    except NonFiniteError as error:
        raise UserError(
            f"This video could not be rendered: {error}. Choose a wider --precision, --vae-precision or "
            "--text-encoder-precision (fp16 has the smallest range, fp32 the largest), and check the weights with "
            "`hv-batch weights check --deep`."
        ) from error
    if options.json:
        show_json("hv_batch/samples/1", {"files": files})
    return 0


def _render(options: argparse.Namespace, engine: HunyuanVideo, folder: Path) -> Iterator[Path]:
    videos = _videos(options)
    if warning := long_video_warning(Counter(video.shape for video in videos)):
        logger.warning(warning)
    seed = videos[0].seed
    if options.reproduce:
        make_deterministic(seed)
    device = choose_device(options.device)
    if device == "cpu":
        _log_cpu_time(options, videos[0])
    pipeline = HunyuanVideoPipeline(
        engine,
        device,
        ulysses_degree=options.ulysses_degree,
        ring_degree=options.ring_degree,
        cfg_degree=options.cfg_degree,
        reproduce_seed=seed if options.reproduce else None,
    )
    facts = {
        "parallel": {
            "device": device,
            "ulysses_degree": options.ulysses_degree,
            "ring_degree": options.ring_degree,
            "cfg_degree": options.cfg_degree,
        },
        "reproduce": options.reproduce,
    }
    with pipeline:
        embeddings = pipeline.encode(videos)
        pipeline.free_text_encoder()
        for prompt, text in embeddings.items():
            _warn_if_cut(prompt, text.num_tokens, text.tokens_lost)
        with _progress(len(videos), options) as callback:  # after the warnings: a log record would break the bar
            finals = pipeline.denoise(videos, embeddings, batch_size=options.batch_size, callback=callback)
            for params, latents in zip(videos, finals, strict=True):
                text = embeddings[params.prompt]
                record = {
                    "schema": SCHEMA,
                    "params": params.to_dict(),
                    "text": {"num_tokens": text.num_tokens, "tokens_lost": text.tokens_lost},
                    "engine": pipeline.identity(),  # with the kernel that was chosen, which is known by now
                    **facts,
                    "versions": {"hv_batch": __version__},
                    "licence": engine_licence(engine),
                }
                stem = free_stem(folder, f"seed{params.seed}_{shorten(params.prompt)}", options.name_suffix)
                if options.latents_only:
                    yield write_latents(stem, latents, record)
                else:
                    yield write_video(stem, pipeline.decode(latents), latents.shape, record)


def _decode(options: argparse.Namespace, engine: HunyuanVideo, folder: Path) -> Iterator[Path]:
    inputs = [read_latents(Path(file)) for file in options.from_latents]  # find bad files before the first decode
    decoder = engine.decoder(choose_device(options.device))
    for file, (latents, record) in zip(options.from_latents, inputs, strict=True):
        match record:
            case {"params": {"seed": int(seed), "prompt": str(prompt)}}:
                name = f"seed{seed}_{shorten(prompt)}"
            case _:  # latents that another program wrote
                name = Path(file).stem
        stem = free_stem(folder, name, options.name_suffix)
        record = {"schema": SCHEMA, **record, "engine": _decoded_by(engine, record.get("engine"))}
        yield write_video(stem, decoder.decode(latents), latents.shape, record)


def _decoded_by(engine: HunyuanVideo, before: Any) -> dict[str, Any]:
    """Return the engine entry of a video's record: that of its latents, updated by the decoder of `engine`."""
    decoder = engine.decoder_identity()
    known = before if isinstance(before, dict) else {}  # latents of another program have no record
    weights = known.get("weights")
    return {**known, **decoder, "weights": {**(weights if isinstance(weights, dict) else {}), **decoder["weights"]}}


def _videos(options: argparse.Namespace) -> list[SamplingParams]:
    height, width = round_up(options.video_size)
    requested = (options.video_size[0], options.video_size[-1])
    if requested != (height, width):
        sides = f"{requested[0]}x{requested[1]}"
        logger.info(f"size {sides} is rounded up to multiples of 16: {height}x{width} (height x width)")
    seed = random.randint(0, MAX_RANDOM_SEED) if options.seed is None else options.seed
    values = {
        "negative_prompt": (options.neg_prompt or DEFAULT_NEGATIVE_PROMPT).strip(),
        "height": height,
        "width": width,
        "num_frames": options.video_length,
        "num_inference_steps": options.infer_steps,
        "guidance_scale": options.embedded_cfg_scale,
        # In the release, every value up to 1 disables guidance. NaN is refused below.
        "cfg_scale": 1.0 if options.cfg_scale < 1.0 else options.cfg_scale,
        "guidance_rescale": options.guidance_rescale,
        "flow_shift": options.flow_shift,
        "lora": canonical_lora(list(parse_lora_flags(options.lora))),
    }
    prompts = [prompt.strip() for prompt in options.prompt]
    invalid = [one for prompt in prompts for one in problems({"prompt": prompt})] + problems({**values, "seed": seed})
    if invalid:
        reasons = "; ".join(f"{FLAGS[one.field]} is {one.value!r}, allowed is {one.allowed}" for one in invalid)
        raise UserError(f"This video cannot be rendered: {reasons}.")
    if options.seed is None:
        logger.info(f"seed {seed}")
    return plan_videos(prompts, seed, options.num_videos, **values)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "model_base": options.model_base,
        "dit_weight": options.dit_weight,
        "load_key": options.load_key,
        "dit": MODELS[options.model],
        "precision": options.precision,
        "vae_precision": options.vae_precision,
        "text_encoder_precision": options.text_encoder_precision,
        "text_encoder_precision_2": options.text_encoder_precision_2,
        "attention": options.attention,
        "noise": options.noise,
        "flow_reverse": options.flow_reverse,
        "fp8": "storage" if options.use_fp8 else "none",
        "sparse_attention": options.sparse_attention and {"density": options.sparse_attention},
        "step_cache": _step_cache(options),
        "cfg_until": options.cfg_until,
        "vae_tile": None if options.vae_tiling else UNTILED,
        "offload": "blocks" if options.use_cpu_offload else "none",
        "loras": parse_lora_flags(options.lora),
    }
    return chosen


def _step_cache(options: argparse.Namespace) -> dict[str, Any] | None:
    return {"kind": KIND, "computed": options.step_cache} if options.step_cache else None


def _refuse_launcher() -> None:
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "hv-batch sample starts the ranks of --ulysses-degree x --ring-degree x --cfg-degree itself, but a "
            f"launcher has started it {os.environ['WORLD_SIZE']} times. Run it once, without torchrun."
        )


def _save_folder(options: argparse.Namespace) -> Path:
    if not options.save_path.strip():
        raise UserError("--save-path is blank. Give the path of a folder.")
    suffix = f"_{options.save_path_suffix}" if options.save_path_suffix else ""
    folder = Path(options.save_path + suffix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save-path {folder} cannot be created: {error}. Choose another folder.") from error
    try:
        with tempfile.TemporaryFile(
            dir=folder
        ) as probe:  # a render takes minutes, and its files are written at the end
            probe.write(b"probe")
    except OSError as error:
        raise UserError(
            f"--save-path {folder} cannot be written: {error}. Grant write access, free disk space, or choose another "
            "folder."
        ) from error
    return folder


def _warn_if_cut(prompt: str, num_tokens: int, tokens_lost: int) -> None:
    if tokens_lost:
        logger.warning(
            f"the prompt {shorten(prompt)[:40]!r}... has {num_tokens + tokens_lost} tokens, but the model reads "
            f"{num_tokens}: the last {tokens_lost} are ignored"
        )


def _log_cpu_time(options: argparse.Namespace, video: SamplingParams) -> None:
    """Log how long a video takes without a GPU, and what to do if that is long."""
    ranks = min(options.ulysses_degree * options.ring_degree * options.cfg_degree, os.cpu_count() or 1)
    model = ModelShape.from_options(_engine_options(options))
    speeds = {name: matmul_flops(PRECISIONS[name]) for name in {options.precision, options.vae_precision}}
    work = Workload.of(video)
    denoise = denoise_flops(model, work) / speeds[options.precision] / ranks
    decode = 0.0 if options.latents_only else decode_flops(model, work.shape) / speeds[options.vae_precision]
    note = (
        f"no GPU is used: on this CPU, a video of {shape_name(work.shape)} takes at least {duration(denoise + decode)} "
        f"(at {speeds[options.precision] / 1e9:.2g} GFLOP/s in {options.precision}, one thread a rank)"
    )
    if denoise + decode < LONG_S:
        logger.info(note)
        return
    logger.warning(
        f"{note}. Use a machine with a GPU; or render less, for example with --video-size 320 512 --video-length 17 "
        "--infer-steps 10 and --precision fp32, in which CPUs are faster; or try `hv-batch demo`"
    )


@contextmanager
def _progress(num_videos: int, options: argparse.Namespace) -> Iterator[Callback]:
    """Show a progress bar if stderr is a terminal; otherwise log the first step, and then a line now and then."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    batches, begun, logged_at = -(-num_videos // options.batch_size), time.monotonic(), 0.0
    computed = computed_steps(parse_step_cache(_step_cache(options)), options.infer_steps)
    total, done, computed_done = batches * options.infer_steps, 0, 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("denoising", total=total)

        def advance(step: int, _latents: object) -> None:
            nonlocal done, computed_done, logged_at
            done, now = done + 1, time.monotonic()
            computed_done += step - 1 in computed  # the other steps take almost no time
            bar.advance(task)
            if not console.is_terminal and (now - logged_at >= LINE_EVERY_S or done == total):
                logged_at, each_s = now, (now - begun) / computed_done
                eta = clock(each_s * (batches * len(computed) - computed_done))
                logger.info(
                    f"denoising: {100 * done // total}%, {duration(each_s)} a step, ETA {eta}, step {done}/{total}"
                )

        yield advance
