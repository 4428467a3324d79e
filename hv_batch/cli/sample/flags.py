"""The command line of `hv-batch sample`: the flags of the released `sample_video.py` with their names and defaults.

The arguments of a `sample_video.py` command can be passed to `hv-batch sample` unchanged. There are three groups of
flags:

- flags that select something, with the released meaning;
- `FIXED`: flags that name a part of the released model. Only one such part was released. Its name is accepted; any
other
  value is refused with the reason, because the video would not match the command;
- `IGNORED`: flags that the released script parses and ignores. They have no effect, and the command logs a warning.

One default differs: `--flow-reverse` is on, because the released model renders pictures only with it.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hv_batch.protocol import UserError
from hv_batch.sampling_params import DEFAULT_NEGATIVE_PROMPT, SIZE_MULTIPLE

PRECISIONS = ("fp32", "fp16", "bf16")

# flag -> (value of the released model, reason why no other is allowed)
FIXED: dict[str, tuple[str | int, str]] = {
    "--latent-channels": (16, "the VAE has 16 latent channels"),
    "--rope-theta": (256, "the model was trained with rotary embeddings of theta 256"),
    "--vae": ("884-16c-hy", "no other VAE was released"),
    "--text-encoder": ("llm", "the model was trained with the states of the LLaMA tower"),
    "--tokenizer": ("llm", "the LLaMA tower reads the tokens of its own tokenizer"),
    "--text-states-dim": (4096, "it is the width of the LLaMA tower"),
    "--text-len": (256, "the model was trained with 256 text tokens"),
    "--prompt-template": ("dit-llm-encode", "the template is part of the weights' contract"),
    "--prompt-template-video": ("dit-llm-encode-video", "the template is part of the weights' contract"),
    "--hidden-state-skip-layer": (2, "the model was trained with the states two layers before the last"),
    "--text-encoder-2": ("clipL", "the model was trained with the pooled vector of CLIP ViT-L/14"),
    "--tokenizer-2": ("clipL", "CLIP reads the tokens of its own tokenizer"),
    "--text-states-dim-2": (768, "it is the width of CLIP ViT-L/14"),
    "--text-len-2": (77, "it is the length of CLIP's position table"),
    "--denoise-type": ("flow", "the model was trained by flow matching"),
    "--flow-solver": ("euler", "the release has no other solver"),
}

# flag -> keyword arguments for argparse
IGNORED: dict[str, dict[str, Any]] = {
    "--model-resolution": {"choices": ("540p", "720p")},
    "--seed-type": {"choices": ("file", "random", "fixed", "auto")},
    "--use-linear-quadratic-schedule": {"action": "store_true", "default": None},
    "--linear-schedule-end": {"type": int},
    "--disable-autocast": {"action": "store_true", "default": None},  # autocast is never used
}

MODELS: dict[str, dict[str, Any]] = {  # options of the DiT
    "HYVideo-T/2-cfgdistill": {},
    "HYVideo-T/2": {"guidance_embed": False},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `hv-batch sample --help` lists the allowed flags and values.")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags into attributes of the same names. Raises UserError if they are not valid; `--help` exits."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for flag, (value, reason) in FIXED.items():
        given = getattr(options, _attribute(flag))
        if given != value:
            raise UserError(f"{flag} is {given!r}, but only {value!r} is allowed: {reason}. Omit the flag.")
    if options.apply_final_norm:
        raise UserError("--apply-final-norm is not allowed: the model was trained without it. Omit the flag.")
    if len(options.video_size) > 2:
        given = " ".join(map(str, options.video_size))
        raise UserError(f"--video-size is {given}. Give one number for both sides, or height and width.")
    for flag in ("--num-videos", "--batch-size", "--ulysses-degree", "--ring-degree"):
        if getattr(options, _attribute(flag)) < 1:
            raise UserError(f"{flag} is {getattr(options, _attribute(flag))}. Allowed: a whole number of at least 1.")
    if options.cfg_degree > 1 and options.cfg_scale <= 1 and not options.from_latents:
        raise UserError(
            f"--cfg-degree is {options.cfg_degree} with --cfg-scale {options.cfg_scale}: half of the ranks would "
            "compute nothing. Give a --cfg-scale above 1, or omit --cfg-degree."
        )
    if not options.prompt and not options.from_latents:
        raise UserError("--prompt is missing. Give a text to render, or files of latents with --from-latents.")
    return options


def ignored_flags(options: argparse.Namespace) -> list[str]:
    """Return the given flags that have no effect."""
    return [flag for flag in IGNORED if getattr(options, _attribute(flag)) is not None]


def parse_lora_flags(values: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the engine option `loras` for the values of --lora. Each is named after its file."""
    loras: dict[str, dict[str, Any]] = {}
    for value in values:
        path, colon, number = value.rpartition(":")
        try:
            entry = {"path": path, "strength": float(number)} if colon else {"path": value}
        except ValueError:
            entry = {"path": value}  # a colon within the path
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(str(entry["path"])).stem)[:48].lstrip("-_") or "lora"
        name = next(
            name for count in itertools.count(1) if (name := stem if count == 1 else f"{stem}-{count}") not in loras
        )
        loras[name] = entry
    return loras


def round_up(video_size: Sequence[int]) -> tuple[int, int]:
    """Return (height, width) in pixels, each rounded up to a multiple of 16 as in the release.

    A single value means both sides. Raises UserError if a side is not positive.
    """
    if min(video_size) <= 0:
        given = " ".join(map(str, video_size))
        raise UserError(f"--video-size is {given}. Height and width must be at least 1, as in --video-size 720 1280.")
    height, width = (-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (video_size[0], video_size[-1]))
    return height, width


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hv-batch sample",
        description="Render one prompt without Ray. Takes the flags of HunyuanVideo's sample_video.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_sampling(parser.add_argument_group("what to render"))
    _add_model(parser.add_argument_group("the model"))
    _add_machine(parser.add_argument_group("where to compute"))
    _add_output(parser.add_argument_group("what is written"))
    _add_released_only(parser.add_argument_group("flags of the release with a single allowed value or no effect"))
    return parser


Group = argparse._ArgumentGroup  # argparse has no public name for it


def _add_sampling(group: Group) -> None:
    add = group.add_argument
    add("--prompt", action="append", metavar="TEXT", help="text to render; repeatable")
    add("--neg-prompt", metavar="TEXT", help=f"what to avoid, with --cfg-scale; if empty: {DEFAULT_NEGATIVE_PROMPT}")
    add("--video-size", type=int, nargs="+", default=(720, 1280), metavar="PX", help="height and width, or one value")
    add("--video-length", type=int, default=129, metavar="FRAMES", help="4n + 1 frames; 1 is an image")
    add("--infer-steps", type=int, default=50, metavar="N", help="denoising steps")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the first video; video i has seed + i; if omitted: random, logged",
    )
    add("--num-videos", type=int, default=1, metavar="N", help="videos per prompt")
    add("--batch-size", type=int, default=1, metavar="N", help="videos denoised together; does not change the pixels")
    add("--embedded-cfg-scale", type=float, default=6.0, metavar="X", help="embedded guidance")
    add("--cfg-scale", type=float, default=1.0, metavar="X", help="classifier-free guidance; up to 1: off")
    add("--guidance-rescale", type=float, default=0.0, metavar="X", help="reduces overexposure by --cfg-scale")
    add("--flow-shift", type=float, default=7.0, metavar="X", help="shift of the noise schedule")
    add(
        "--flow-reverse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="integrate from noise to picture",
    )
    add("--noise", default="cpu-fp32", choices=("cpu-fp32", "official"), help="official: as in the release")


def _add_model(group: Group) -> None:
    add = group.add_argument
    add("--model-base", default="ckpts", metavar="DIR", help="folder of the checkpoint")
    add("--dit-weight", metavar="PATH", help="DiT file or folder to use instead of that in --model-base")
    add("--load-key", default="module", choices=("module", "ema"), help="key of the tensors in the DiT file")
    add("--model", default="HYVideo-T/2-cfgdistill", choices=tuple(MODELS), help="with or without embedded guidance")
    add("--precision", default="bf16", choices=PRECISIONS, help="precision of the DiT")
    add("--vae-precision", default="fp16", choices=PRECISIONS, help="precision of the VAE")
    add("--text-encoder-precision", default="fp16", choices=PRECISIONS, help="precision of LLaMA")
    add("--text-encoder-precision-2", default="fp16", choices=PRECISIONS, help="precision of CLIP")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="merge this LoRA (.safetensors) with this strength; may be repeated",
    )
    add("--use-fp8", action="store_true", help="use the 8-bit weights that --dit-weight names")
    add("--cfg-until", type=float, metavar="X", help="share of the steps that run the negative prompt, as 0.5")
    add("--step-cache", type=int, default=0, metavar="N", help="run the model in N of 50 steps, as 16; 0: in all")
    add("--sparse-attention", type=float, metavar="X", help="attend to this fraction of the blocks, as 0.25")
    add("--vae-tiling", action=argparse.BooleanOptionalAction, default=True, help="decode in overlapping tiles")
    add(
        "--attention",
        default="sdpa",
        choices=("sdpa", "cudnn", "flash", "fa3", "fa4", "math", "auto"),
        help="attention kernel; flash, fa3 and fa4 need packages; auto: the fastest one that works here",
    )


def _add_machine(group: Group) -> None:
    add = group.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda if there is a GPU")
    add("--ulysses-degree", type=int, default=1, metavar="N", help="ranks that split the heads; started by the command")
    add("--ring-degree", type=int, default=1, metavar="N", help="ranks that split the tokens")
    add("--cfg-degree", type=int, default=1, choices=(1, 2), help="2: half of the ranks for each branch of --cfg-scale")
    add("--use-cpu-offload", action="store_true", help="keep the weights of the DiT in host memory")
    add("--reproduce", action="store_true", help="seed all generators and use deterministic kernels only")


def _add_output(group: Group) -> None:
    add = group.add_argument
    add("--save-path", default="./results", metavar="DIR", help="output folder; created if missing")
    add("--save-path-suffix", default="", metavar="TEXT", help="appended to the name of the folder, after _")
    add("--name-suffix", default="", metavar="TEXT", help="appended to the names of the files, after _")
    add("--latents-only", action="store_true", help="write latents as .safetensors instead of decoding them")
    add("--json", action="store_true", help="print one JSON object with a schema; errors as well")
    add("--from-latents", nargs="+", metavar="FILE", help="decode these latents instead of rendering prompts")


def _add_released_only(group: Group) -> None:
    for flag, (value, reason) in FIXED.items():
        group.add_argument(flag, type=type(value), default=value, metavar="X", help=reason)
    group.add_argument("--apply-final-norm", action="store_true", help="refused: the model was trained without it")
    for flag, keywords in IGNORED.items():
        group.add_argument(flag, help="no effect, as in the release", **keywords)
