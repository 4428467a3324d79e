"""`hv-batch weights`: look at checkpoints, fetch them, rewrite them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hv_batch.protocol import UserError

if TYPE_CHECKING:
    from hv_batch.weights.shards import OnBytes

# What torch and transformers need to be imported for is imported in the commands: --help does without.

app = typer.Typer(help="Look at checkpoints, fetch them, rewrite them.", no_args_is_help=True)


class Dtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Format(StrEnum):
    safetensors = "safetensors"


class Layout(StrEnum):
    released = "released"
    diffusers = "diffusers"


LoadKey = Annotated[str, typer.Option(help="which of a .pt file's sets of tensors: module or ema")]


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="a model_base in the released or diffusers' layout, or a DiT alone")],
    load_key: LoadKey = "module",
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Tell what is there and what is missing, sizes, dtypes, parameters, and the revision. Exit code 1 for problems."""
    from hv_batch.weights.inventory import take_inventory

    found = take_inventory(path, load_key)
    print(json.dumps(found.to_dict(), indent=1) if as_json else found.render())
    raise typer.Exit(1 if found.problems else 0)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a model_base, or a DiT file or folder")],
    target: Annotated[Path, typer.Argument(help="folder to write; interrupted, the same command goes on")],
    to: Annotated[Format, typer.Option(help="file format")] = Format.safetensors,
    dtype: Annotated[Dtype | None, typer.Option(help="of the DiT; default: as stored")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="the DiT's blocks in FP8 with a scale each, as released")] = False,
    load_key: LoadKey = "module",
) -> None:
    """Rewrite a checkpoint as safetensors in the released layout. The VAE and the text towers keep their numbers."""
    from hv_batch.engine.hunyuan import PRECISIONS
    from hv_batch.weights.conversion import Recipe, plan_conversion

    recipe = Recipe(dtype=PRECISIONS[dtype] if dtype else None, fp8=fp8)
    conversion = plan_conversion(source, target, recipe, load_key)
    with _bar(f"writing {to}", conversion.nbytes) as on_bytes:
        conversion.run(on_bytes)
    print(target)


@app.command()
def extract_text_encoder(
    llava: Annotated[Path, typer.Argument(help="folder of llava-llama-3-8b-v1_1-transformers")],
    target: Annotated[Path, typer.Argument(help="folder to write: <model_base>/text_encoder")],
) -> None:
    """Take the language model and its tokenizer out of LLaVA, tensor by tensor."""
    from hv_batch.weights import extraction

    nbytes = sum(tensor.nbytes for tensor in extraction.language_model(llava).values())
    with _bar("writing the language model", nbytes) as on_bytes:
        extraction.extract_text_encoder(llava, target, on_bytes)
    print(target)


@app.command()
def fetch(
    target: Annotated[Path, typer.Argument(help="the model_base to fill; interrupted, the same command goes on")],
    layout: Annotated[Layout, typer.Option(help="the released repositories, or the one in diffusers' layout")] = (
        Layout.released
    ),
    fp8: Annotated[bool, typer.Option("--fp8", help="the released FP8 weights as well")] = False,
    revision: Annotated[
        list[str] | None,
        typer.Option(help="REPOSITORY=COMMIT, a tag or a branch; may be repeated. What it means is kept in fetch.json"),
    ] = None,
    local: Annotated[
        Path | None, typer.Option("--from", help="a local folder instead: a hub's cache, or ORG/NAME folders")
    ] = None,
) -> None:
    """Download the weights, pinned to the commits that are recorded when the folder is begun."""
    from hv_batch.job.records.run_document import licence_notice
    from hv_batch.weights import fetching

    print(licence_notice(), file=sys.stderr)
    revisions = {}
    for text in revision or []:
        name, equals, commit = text.partition("=")
        if not equals or not commit:
            raise UserError(f"--revision {text!r} should be REPOSITORY=COMMIT, as tencent/HunyuanVideo=main.")
        revisions[name] = commit
    fetching.fetch(target, layout=layout, fp8=fp8, revisions=revisions, local=local)
    print(target)


@contextmanager
def _bar(what: str, nbytes: int) -> Iterator[OnBytes]:
    """A bar on a terminal, with the time left; nothing in a log, where the end is what counts."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=nbytes)
        yield lambda count: progress.advance(task, count)
