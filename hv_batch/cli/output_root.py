"""What an operator does with an output root: look at it, check it, take samples back, tidy up, compare two.

All of it reads storage only and needs no Ray, but for `verify --repair`, which renders again what it has removed. What
changes the root first says what it would do, does it when told so, and holds the root's lease meanwhile, so that no
driver is at work in it.

Exit codes: 0 as it should be, 3 something was found (faults, differences), 1 the command could not be carried out; of
`verify --repair` those of `run`.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import click
import typer

from hv_batch.job.failure import FailureClass
from hv_batch.job.formatting import plural
from hv_batch.job.inspection.diff import compare
from hv_batch.job.inspection.findings import Finding
from hv_batch.job.inspection.garbage import find_garbage, remove
from hv_batch.job.inspection.status import Status, read_status
from hv_batch.job.inspection.verify import remove_faults
from hv_batch.job.inspection.verify import verify as verify_root
from hv_batch.job.manifest.selection import Selection, parse_ranges
from hv_batch.job.records.lease import hold_lease, this_process
from hv_batch.job.records.quarantine import group_reasons, read_quarantined, release
from hv_batch.job.records.run_document import chosen_shards, read_run, read_run_config
from hv_batch.job.storage.store import Store

FOUND = 3

WATCH_S = 5.0  # between two looks; a look at many shards takes longer, and then as long as it takes
MIN_AGE_HOURS = 1.0  # longer than any upload: what is younger may be about to get its record
SAMPLED_DECODES = 16

Output = Annotated[str, typer.Argument(help="output root: folder or URL")]
Json = Annotated[bool, typer.Option("--json", help="for machines")]
Yes = Annotated[bool, typer.Option("--yes", help="do it; without this the command only says what it would do")]
Steal = Annotated[
    bool, typer.Option("--take-over", "--steal", help="although a driver that is known to hang holds the root")
]
Shards = Annotated[str | None, typer.Option(help="only these, as 3,17-20", metavar="LIST")]


def status(
    output: Output,
    shards: Shards = None,
    watch: Annotated[bool, typer.Option("--watch", help="look again every few seconds until it is finished")] = False,
    as_json: Json = False,
) -> None:
    """Tell how an output root stands, shard by shard, who writes to it, and why samples were given up."""
    store, chosen = Store(output), parse_shards(shards)
    if not watch:
        _show(read_status(store, chosen), as_json)
        return
    for found in _looks(store, chosen):
        if not as_json:
            click.clear()  # of a terminal; a log keeps every look
        _show(found, as_json)


def verify(
    output: Output,
    shards: Shards = None,
    sample_decode: Annotated[
        int, typer.Option(min=0, help="how many media to decode from end to end, spread over all")
    ] = SAMPLED_DECODES,
    deep: Annotated[bool, typer.Option("--deep", help="decode all media")] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="remove what is wrong, so that the run command renders and seals it again")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="remove what is wrong, and render and seal it again, as resume would")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="of the Ray cluster that repairs; default: RAY_ADDRESS, else a local Ray")
    ] = None,
    as_json: Json = False,
    steal: Steal = False,
) -> None:
    """Check every record, its media and poster, and all that a seal wrote. Exit code 3 when something is wrong.

    With --repair the exit code is that of the rendering: 0 when all is as it should be again.
    """
    from hv_batch.media.probe import decode_media

    store = Store(output)
    with _changing(store, "verify", remove or repair, steal) as still_ours:
        found = verify_root(store, decode_media, decodes=None if deep else sample_decode, shards=parse_shards(shards))
        if found.findings and repair:
            read_run_config(output)  # what nobody could render again is not removed
        if remove or repair:
            still_ours()
            remove_faults(store, found.findings)
    print(json.dumps(found.to_dict() | {"removed": remove or repair}, indent=1) if as_json else found.render())
    if not found.findings:
        return
    if repair:
        print("what is wrong was removed, and is rendered again", file=sys.stderr)
        raise typer.Exit(_render_again(output, found.findings, address, steal))
    if not as_json:
        print(
            "It was removed; the same run command renders what is missing now and seals again."
            if remove
            else "verify --repair renders it again; verify --remove leaves that to the same run command."
        )
    raise typer.Exit(FOUND)


def retry(
    output: Output,
    kinds: Annotated[
        list[FailureClass] | None, typer.Option("--class", help="only this failure class, as POISON; may be repeated")
    ] = None,
    shards: Shards = None,
    yes: Yes = False,
    steal: Steal = False,
) -> None:
    """Take quarantined samples back: they are pending again, and the same run command renders them."""
    store = Store(output)
    with _changing(store, "retry", yes, steal) as still_ours:
        chosen = chosen_shards(read_run(store), parse_shards(shards))
        reasons = group_reasons(read_quarantined(store, chosen, kinds or ()))
        for reason in reasons:
            print(reason.render())
        if not reasons:
            print("no such sample is quarantined")
            return
        count = sum(reason.samples for reason in reasons)
        if not yes:
            print(f"{plural(count, 'sample')} would be taken back; --yes does it")
            return
        still_ours()
        release(store, read_quarantined(store, chosen, kinds or ()))
    print(
        f"{plural(count, 'sample')} pending again. Run the same command as before: it renders them and nothing twice."
    )


def gc(
    output: Output,
    min_age_hours: Annotated[
        float, typer.Option(min=0.0, help="leave alone what was written since; a living writer may still need it")
    ] = MIN_AGE_HOURS,
    yes: Yes = False,
    as_json: Json = False,
    steal: Steal = False,
) -> None:
    """Remove what nobody needs: media without a record, latents of finished samples, drafts and the like."""
    store = Store(output)
    with _changing(store, "gc", yes, steal) as still_ours:
        counts: Counter[str] = Counter()
        for garbage in find_garbage(store, older_than=time.time() - 3600 * min_age_hours):
            counts[garbage.kind.value] += 1
            print(
                json.dumps(garbage.to_dict() | {"removed": yes})
                if as_json
                else f"{garbage.kind.value:<8}{garbage.name}"
            )
            if yes:
                still_ours()
                remove(store, garbage)
    if not as_json:
        told = ", ".join(f"{count:,} {kind}" for kind, count in counts.items()) or "nothing"
        print(f"{told} {'removed' if yes else 'would be removed; --yes does it' if counts else 'to remove'}")


def diff(
    a: Annotated[str, typer.Argument(help="output root: folder or URL")],
    b: Annotated[str, typer.Argument(help="the one to compare it with")],
    as_json: Json = False,
) -> None:
    """Compare two runs sample by sample. Exit code 3 when any sample differs."""
    found = compare(Store(a), Store(b))
    print(json.dumps(found.to_dict(), indent=1) if as_json else found.render())
    if not found.is_equal:
        raise typer.Exit(FOUND)


def parse_shards(text: str | None) -> list[int] | None:
    """The shards of a list such as `3,17-20`. Raises UserError for anything else."""
    if text is None:
        return None
    return sorted({shard for shards in parse_ranges(text) for shard in shards})


def _render_again(output: str, findings: Sequence[Finding], address: str | None, steal: bool) -> int:
    """Resume the run in the shards that are no longer whole; all of it where the run was not what it seemed."""
    from hv_batch.runtime.render import resume  # Ray and the engine take seconds to import

    damaged = sorted({finding.shard for finding in findings if finding.shard is not None})
    is_whole = any(finding.shard is None for finding in findings)
    chosen = Selection(shards=() if is_whole else tuple(range(shard, shard + 1) for shard in damaged))
    return resume(output, address=address, selection=chosen, steal=steal)


@contextmanager
def _changing(store: Store, purpose: str, does: bool, steal: bool) -> Iterator[Callable[[], None]]:
    """The lease of the root for a command that changes it; nothing for one that only looks.

    What is yielded is called before a change: it raises when somebody has taken the root over meanwhile.
    """
    if not does:
        yield lambda: None
        return
    read_run(store)  # a mistyped path must not become a folder with a lease in it
    with hold_lease(store, this_process(purpose), steal=steal) as lease:
        assert lease is not None, "nobody asked to give up waiting"
        yield lease.check


def _show(found: Status, as_json: bool) -> None:
    print(json.dumps(found.to_dict(), indent=1) if as_json else found.render(), flush=True)


def _looks(store: Store, shards: list[int] | None) -> Iterator[Status]:
    """A status again and again until the run is finished."""
    while True:
        begun = time.monotonic()
        found = read_status(store, shards)
        yield found
        if found.finished:
            return
        time.sleep(max(WATCH_S, time.monotonic() - begun))
