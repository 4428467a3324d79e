"""`hv-batch status`: show what an output root holds, and who writes to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

import click
import typer

from hv_batch.cli.output_root.arguments import Output, Shards, Where, parse_shards
from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job.dataset.committed import matching_records
from hv_batch.job.dataset.conditions import Condition, parse_conditions
from hv_batch.job.inspection.activity import read_activity
from hv_batch.job.inspection.identity_counts import count_identities
from hv_batch.job.inspection.status import MAX_RECORDS, Status, count_looks, read_status
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.store import Store

WATCH_S = 5.0  # least time between two readings; after a reading that takes longer, that time


def status(
    output: Output,
    shards: Shards = None,
    where: Where = None,
    watch: Annotated[bool, typer.Option("--watch", help="repeat every few seconds until the run is finished")] = False,
    as_json: Json = False,
) -> None:
    """Show the state of an output root by shard, its writer, what the videos look like, and why samples failed."""
    store, chosen, conditions = Store(output), parse_shards(shards), parse_conditions(where or ())
    if not watch:
        _show(_read_status(store, chosen, conditions), as_json)
        return
    for current in _readings(store, chosen, conditions):
        if not as_json:
            click.clear()  # has no effect if stdout is no terminal
        _show(current, as_json)


def _show(current: Status, as_json: bool) -> None:
    if as_json:
        show_json("hv_batch/status/1", current.to_dict())
    else:
        show(current.render())


def _read_status(store: Store, shards: list[int] | None, conditions: Sequence[Condition]) -> Status:
    """The status with the looks of the videos, and the number that satisfies the conditions if there are any."""
    current = read_status(store, shards)
    matching = None
    if conditions:
        found = matching_records(store, read_run(store), conditions, shards, lambda _: None)
        matching = sum(1 for _ in found)
    sealed = {shard.shard: shard.sealed for shard in current.shards if shard.committed}
    identities = count_identities(store, read_run(store), sealed, MAX_RECORDS)
    return replace(
        current,
        looks=count_looks(store, current),
        identities=identities,
        matching=matching,
        activity=read_activity(store, current.holder),
    )


def _readings(store: Store, shards: list[int] | None, conditions: Sequence[Condition]) -> Iterator[Status]:
    """The status of the root, repeatedly until the run is finished."""
    while True:
        begun = time.monotonic()
        current = _read_status(store, shards, conditions)
        yield current
        if current.finished:
            return
        time.sleep(max(WATCH_S, time.monotonic() - begun))
