"""`hv-batch gc`: remove objects that nothing needs any more."""

from __future__ import annotations

import time
from collections import Counter
from typing import Annotated

import typer

from hv_batch.cli.output_root.arguments import Output, TakeOver, Yes
from hv_batch.cli.output_root.lease import changing
from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job.inspection.garbage import find_garbage, remove
from hv_batch.job.storage.store import Store

MIN_AGE_HOURS = 1.0  # longer than any upload: a younger file may be about to get its record


def gc(
    output: Output,
    min_age_hours: Annotated[
        float, typer.Option(min=0.0, help="keep younger objects, which an active writer may still need")
    ] = MIN_AGE_HOURS,
    yes: Yes = False,
    as_json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Remove unneeded objects: media without a record, latents of finished samples, incomplete writes."""
    store = Store(output)
    with changing(store, "gc", yes, take_over) as check_lease:
        counts: Counter[str] = Counter()
        for garbage in find_garbage(store, older_than=time.time() - 3600 * min_age_hours):
            counts[garbage.kind.value] += 1
            if as_json:  # one line each: there may be millions
                show_json("hv_batch/gc-object/1", garbage.to_dict() | {"removed": yes}, indent=None)
            else:
                show(f"{garbage.kind.value:<8}{garbage.name}")
            if yes:
                check_lease()
                remove(store, garbage)
    if as_json:
        show_json("hv_batch/gc/1", {"objects": dict(counts), "removed": yes}, indent=None)
    else:
        totals = ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "nothing"
        show(f"{totals} {'removed' if yes else 'would be removed; --yes does it' if counts else 'to remove'}")
