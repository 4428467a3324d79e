"""`hv-batch export`: a folder in the layout of another tool, from the sealed shards of an output root; or a manifest.

A mode is a function that fills a `Destination` and returns the facts for the report. Every mode refuses a destination
that is not empty or lies in the output root. `--as-manifest` writes one file for another run of hv_batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from hv_batch.cli.output_root.arguments import Output, Shards, Where, parse_shards
from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job.dataset.committed import matching_records
from hv_batch.job.dataset.conditions import parse_conditions
from hv_batch.job.dataset.manifest_export import write_manifest
from hv_batch.job.export.destination import Destination
from hv_batch.job.export.hub import export_hub
from hv_batch.job.export.vbench import VIDEOS_PER_PROMPT, export_vbench
from hv_batch.job.formatting import plural, size
from hv_batch.job.progress import LINE_EVERY_S
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

SCHEMA = "hv_batch/export/1"

logger = logging.getLogger(__name__)


def export(
    output: Output,
    vbench: Annotated[
        Path | None, typer.Option(help="new folder for VBench: videos/{original prompt}-{i}.mp4", metavar="DIR")
    ] = None,
    hub: Annotated[
        Path | None, typer.Option(help="new folder to push to the Hugging Face Hub: card, media, tables", metavar="DIR")
    ] = None,
    as_manifest: Annotated[
        str | None,
        typer.Option(help="new file or URL: committed samples as a manifest (JSON Lines) for a run", metavar="FILE"),
    ] = None,
    new_seeds: Annotated[
        bool, typer.Option("--new-seeds", help="with --as-manifest: give every row another seed")
    ] = False,
    where: Where = None,
    shards: Shards = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(help="for --vbench: the original prompts; default: prompt_original, prompt_en or prompt"),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="copy files; default: hard links if possible")] = False,
    as_json: Json = False,
) -> None:
    """Write the videos of sealed shards in the layout of another tool, or samples as a manifest for another run."""
    if as_manifest is not None:
        if vbench or hub or prompt_column or copy:
            raise UserError("--as-manifest writes one file. Use --vbench and --hub in a command of their own.")
        _export_manifest(Store(output), as_manifest, where or (), parse_shards(shards), new_seeds, as_json)
        return
    if where or new_seeds:
        raise UserError("--where and --new-seeds belong to --as-manifest FILE. Add it, or remove them.")
    modes = {name: folder for name, folder in {"vbench": vbench, "hub": hub}.items() if folder is not None}
    if len(modes) != 1:
        raise UserError("Give one of --vbench DIR, --hub DIR and --as-manifest FILE.")
    ((mode, folder),) = modes.items()
    if prompt_column is not None and mode != "vbench":
        raise UserError("--prompt-column names the files of --vbench. Remove it.")
    store = Store(output)
    run, chosen = read_run(store), parse_shards(shards)
    destination = Destination(store, folder, copies=copy)
    with _progress() as progress:
        if mode == "vbench":
            facts = export_vbench(
                store, run, destination, shards=chosen, prompt_column=prompt_column, progress=progress
            )
        else:
            facts = export_hub(store, run, destination, shards=chosen, progress=progress)
    counts = destination.counts
    report = {
        "mode": mode,
        "folder": str(destination.folder),
        "links": counts.links,
        "copies": counts.copies,
        "bytes": counts.bytes,
        **facts,
    }
    if as_json:
        show_json(SCHEMA, report)
    else:
        show(_describe(report))


def _export_manifest(
    store: Store,
    target: str,
    where: Sequence[str],
    shards: list[int] | None,
    new_seeds: bool,
    as_json: bool,
) -> None:
    records = matching_records(store, read_run(store), parse_conditions(where), shards)
    rows = write_manifest(target, records, new_seeds=new_seeds)
    if as_json:
        show_json(SCHEMA, {"mode": "as_manifest", "file": target, "rows": rows})
    else:
        show(f"{plural(rows, 'row')} written to {target}")


def _describe(report: dict[str, Any]) -> str:
    files = [plural(report[kind], one) for kind, one in (("links", "link"), ("copies", "copy")) if report[kind]]
    lines = [f"{report['folder']}: {' and '.join(files) or 'no files'} ({size(report['bytes'])})"]
    if report["mode"] == "hub":
        return "\n".join([*lines, report["advice"]])
    lines.append(f"{plural(report['videos'], 'video')} of {plural(report['prompts'], 'prompt')}")
    if fewer := report["prompts_with_fewer_than_5_videos"]:
        lines.append(f"{plural(fewer, 'prompt')} with fewer than the {VIDEOS_PER_PROMPT} videos that VBench evaluates")
    if images := report["images_left_out"]:
        lines.append(f"{plural(images, 'image')} left out")
    if renamed := report["renamed_prompts"]:
        example = next(iter(renamed.values()))
        lines.append(
            f"{plural(len(renamed), 'prompt')} cannot be file names; prompts.json has the prompts of all files. For "
            f"example: {example}"
        )
    return "\n".join(lines)


@contextmanager
def _progress() -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A function that begins a display of `total` files: a bar on a terminal, a log line now and then elsewhere."""
    console = Console(stderr=True)
    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:

        def begin(total: int) -> Callable[[int], None]:
            task = bar.add_task("files", total=total)
            done, shown_at = 0, time.monotonic()

            def advance(count: int) -> None:
                nonlocal done, shown_at
                done += count
                bar.advance(task, count)
                if not console.is_terminal and time.monotonic() - shown_at >= LINE_EVERY_S:
                    shown_at = time.monotonic()
                    logger.info(f"{done:,} of {total:,} files")

            return advance

        yield begin
