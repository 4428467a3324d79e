"""`hv-batch retry`: make quarantined samples pending again."""

from __future__ import annotations

from typing import Annotated

import typer

from hv_batch.cli.output_root.arguments import Output, Shards, TakeOver, Yes, parse_shards
from hv_batch.cli.output_root.lease import changing
from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job import layout
from hv_batch.job.failure import FailureClass
from hv_batch.job.formatting import plural
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.records.commits import find_shards
from hv_batch.job.records.quarantine import group_reasons, read_quarantined, release
from hv_batch.job.records.run_document import check_revision, chosen_shards, read_run
from hv_batch.job.storage.store import Store


def retry(
    output: Output,
    classes: Annotated[
        list[FailureClass] | None,
        typer.Option("--class", case_sensitive=False, help="only this failure class, for example POISON; repeatable"),
    ] = None,
    shards: Shards = None,
    yes: Yes = False,
    as_json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Release quarantined samples: they are pending again, and the same run command renders them."""
    store = Store(output)
    with changing(store, "retry", yes, take_over) as check_lease:
        run = read_run(store)
        chosen = find_shards(store, chosen_shards(run, parse_shards(shards)), [layout.QUARANTINE])
        planned = PlannedKeys(store, run)
        reasons = group_reasons(read_quarantined(store, chosen, classes or (), planned))
        count, released = sum(reason.samples for reason in reasons), bool(reasons) and yes
        if not as_json:
            for reason in reasons:
                show(reason.render())
        if released:
            check_revision(store)
            check_lease()
            release(store, read_quarantined(store, chosen, classes or (), planned))
    if as_json:
        found = [reason.to_dict() for reason in reasons]
        show_json("hv_batch/retry/1", {"samples": count, "released": released, "reasons": found})
    elif released:
        show(f"{plural(count, 'sample')} pending again. Run the same command as before: it renders only these.")
    else:
        show(
            f"{plural(count, 'sample')} would be released; --yes does it" if count else "no such sample is quarantined"
        )
