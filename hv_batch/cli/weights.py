"""`hv-batch weights`: inspect, fetch and convert checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.protocol import UserError

if TYPE_CHECKING:
    from hv_batch.weights.shards import OnBytes

# Modules that import torch or transformers are imported inside the commands, so that --help is fast.

app = typer.Typer(help="Inspect, fetch and convert checkpoints.", no_args_is_help=True)


class Dtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Format(StrEnum):
    safetensors = "safetensors"


class Layout(StrEnum):
    released = "released"
    diffusers = "diffusers"


class Distilled(StrEnum):
    fasthunyuan = "fasthunyuan"
    accvideo = "accvideo"


LoadKey = Annotated[str, typer.Option(help="key of the tensors in a .pt file: module or ema")]


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="a model_base in the released or diffusers' layout, or only a DiT")],
    load_key: LoadKey = "module",
    deep: Annotated[
        bool, typer.Option("--deep", help="read all weights: checksums, sizes, values that are not finite")
    ] = False,
    as_json: Json = False,
) -> None:
    """Report the parts of a checkpoint, sizes, dtypes, parameter counts, problems and the revision.

    The exit code is 1 if there are problems.
    """
    from hv_batch.weights.inventory import take_inventory

    inventory = take_inventory(path, load_key, deep=deep)
    if as_json:
        show_json("hv_batch/weights/1", inventory.to_dict())
    else:
        show(inventory.render())
    raise typer.Exit(1 if inventory.problems else 0)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a model_base, or a DiT file or folder")],
    target: Annotated[Path, typer.Argument(help="folder to write; the same command resumes an interrupted conversion")],
    to: Annotated[Format, typer.Option(help="file format")] = Format.safetensors,
    dtype: Annotated[Dtype | None, typer.Option(help="dtype of the DiT; default: as stored")] = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="store the DiT's block weights in FP8 with one scale each, as released")
    ] = False,
    load_key: LoadKey = "module",
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to safetensors in the released layout. The VAE and the text towers are not changed."""
    from hv_batch.engine.hunyuan import PRECISIONS
    from hv_batch.weights.conversion import Recipe, plan_conversion

    recipe = Recipe(dtype=PRECISIONS[dtype] if dtype else None, fp8=fp8)
    conversion = plan_conversion(source, target, recipe, load_key)
    with _bar(f"writing {to}", conversion.nbytes) as on_bytes:
        conversion.run(on_bytes)
    _show_target(target, as_json)


@app.command()
def extract_text_encoder(
    llava: Annotated[Path, typer.Argument(help="folder of llava-llama-3-8b-v1_1-transformers")],
    target: Annotated[Path, typer.Argument(help="folder to write: <model_base>/text_encoder")],
    as_json: Json = False,
) -> None:
    """Extract the language model and its tokenizer from LLaVA, one tensor at a time."""
    from hv_batch.weights import extraction

    nbytes = sum(tensor.nbytes for tensor in extraction.language_model(llava).values())
    with _bar("writing the language model", nbytes) as on_bytes:
        extraction.extract_text_encoder(llava, target, on_bytes)
    _show_target(target, as_json)


@app.command()
def fetch(
    target: Annotated[
        Path, typer.Argument(help="the model_base to fill; the same command resumes an interrupted download")
    ],
    layout: Annotated[Layout, typer.Option(help="the released repositories, or the one in diffusers' layout")] = (
        Layout.released
    ),
    distilled: Annotated[
        Distilled | None, typer.Option(help="fetch distilled weights instead, in the released layout")
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="also fetch the released FP8 weights")] = False,
    revision: Annotated[
        list[str] | None,
        typer.Option(help="REPOSITORY=COMMIT, or a tag or branch; repeatable. fetch.json records the commit"),
    ] = None,
    local: Annotated[
        Path | None, typer.Option("--from", help="copy from a local folder: a hub cache, or ORG/NAME folders")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download the weights, pinned to the commits that the first fetch into the folder records."""
    from hv_batch.job.licences import licence_notice
    from hv_batch.weights import fetching

    if distilled and (fp8 or layout is not Layout.released):
        raise UserError(
            f"--distilled {distilled} cannot be combined with --fp8 or --layout {Layout.diffusers}: its repository has "
            "one set of 16-bit weights in the released layout. Use `hv-batch weights convert --fp8` for FP8 weights."
        )
    print(licence_notice(), file=sys.stderr)
    revisions = {}
    for text in revision or []:
        name, equals, commit = text.partition("=")
        if not equals or not commit:
            raise UserError(
                f"--revision {text!r} is invalid. Expected REPOSITORY=COMMIT, for example tencent/HunyuanVideo=main."
            )
        revisions[name] = commit
    fetching.fetch(target, layout=distilled or layout, fp8=fp8, revisions=revisions, local=local)
    _show_target(target, as_json)


def _show_target(target: Path, as_json: bool) -> None:
    if as_json:
        show_json("hv_batch/weights-target/1", {"target": str(target)})
    else:
        print(target)


@contextmanager
def _bar(what: str, nbytes: int) -> Iterator[OnBytes]:
    """Show a progress bar with the remaining time if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=nbytes)
        yield lambda count: progress.advance(task, count)
