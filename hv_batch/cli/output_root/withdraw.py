"""`hv-batch withdraw`: remove a sample from the dataset for good."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from hv_batch.cli.output_root.arguments import Output, TakeOver
from hv_batch.cli.output_root.lease import changing
from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job import layout
from hv_batch.job.formatting import plural
from hv_batch.job.inspection.withdraw import find_samples
from hv_batch.job.inspection.withdraw import withdraw as withdraw_samples
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.store import Store


def withdraw(
    output: Output,
    sample: Annotated[str, typer.Argument(help="id of a row (all of its videos), or key of one video", metavar="ID")],
    reason: Annotated[str, typer.Option(help="why; it is kept in the output root for good")],
    as_json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Remove a sample from the dataset for good: its files and records go, and it is never rendered again."""
    store = Store(output)
    with changing(store, "withdraw", True, take_over) as check_lease:
        run = read_run(store)
        found = withdraw_samples(store, run, find_samples(store, run, sample), reason, check_lease)
    if as_json:
        show_json("hv_batch/withdrawal/1", asdict(found))
        return
    show(f"withdrawn: {', '.join(found.samples)}; {plural(len(found.removed) + found.spooled, 'object')} removed")
    shards = ", ".join(map(layout.shard_name, found.sealed))
    show(
        f"{f'{shards} sealed again; ' if shards else ''}"
        f"{'the run is finished' if found.finished else 'the run is not finished: the same run command continues it'}"
    )
