"""The commands for an output root: `status`, `verify`, `retry`, `withdraw`, `gc` and `diff`.

They read storage only and need no Ray, except `verify --repair`, which renders again what it has removed. Commands that
change the root only report what they would do, unless a flag asks for the change. While they change the root they hold
its lease, so that no driver works there at the same time.

Exit codes: 0 no problem, 3 faults or differences, 1 the command failed; `verify --repair` has those of `run`.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Annotated

import click
import typer

from hv_batch.cli.terminal import Json, show, show_json
from hv_batch.job import layout
from hv_batch.job.config.engine_factory import VARIABLE
from hv_batch.job.dataset.committed import matching_records
from hv_batch.job.dataset.conditions import Condition, parse_conditions
from hv_batch.job.failure import FailureClass
from hv_batch.job.formatting import plural
from hv_batch.job.inspection.activity import read_activity
from hv_batch.job.inspection.diff import compare
from hv_batch.job.inspection.findings import Finding
from hv_batch.job.inspection.garbage import find_garbage, remove
from hv_batch.job.inspection.identity_counts import count_identities
from hv_batch.job.inspection.status import MAX_RECORDS, Status, count_looks, read_status
from hv_batch.job.inspection.verify import remove_faults
from hv_batch.job.inspection.verify import verify as verify_root
from hv_batch.job.inspection.verify_plan import refuse_loss
from hv_batch.job.inspection.withdraw import find_samples
from hv_batch.job.inspection.withdraw import withdraw as withdraw_samples
from hv_batch.job.manifest.planned_keys import PlannedKeys
from hv_batch.job.manifest.selection import Selection, parse_ranges
from hv_batch.job.records.commits import find_shards
from hv_batch.job.records.lease import hold_lease
from hv_batch.job.records.lease_holder import this_process
from hv_batch.job.records.quarantine import group_reasons, read_quarantined, release
from hv_batch.job.records.run_document import check_revision, chosen_shards, read_run, read_summary
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

FOUND = 3

WATCH_S = 5.0  # least time between two readings; after a reading that takes longer, that time
MIN_AGE_HOURS = 1.0  # longer than any upload: a younger file may be about to get its record
SAMPLED_DECODES = 16
MAX_NAMED = 1_000_000  # shards of --shards, which are held as a list

Output = Annotated[str, typer.Argument(help="output root: folder or URL")]
Yes = Annotated[bool, typer.Option("--yes", help="make the change; without this flag it is only reported")]
TakeOver = Annotated[
    bool,
    typer.Option("--take-over", "--steal", help="stop the driver that holds the output root; use if it hangs"),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        help="an engine of your own that run.json may name, as package.module:Name; repeatable; default: "
        f"${VARIABLE}, separated by commas"
    ),
]
Hooks = Annotated[
    list[str] | None,
    typer.Option(help="a hook that run.json names and that may be run, written as there; repeatable", metavar="TEXT"),
]
Where = Annotated[
    list[str] | None,
    typer.Option(help="only samples that satisfy this, such as category=cat, luma_mean<20 or look=black; repeatable"),
]
Shards = Annotated[str | None, typer.Option(help="only these shards, for example 3,17-20", metavar="LIST")]


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


def verify(
    output: Output,
    shards: Shards = None,
    sample_decode: Annotated[
        int, typer.Option(min=0, help="number of media to decode completely, spread over all shards")
    ] = SAMPLED_DECODES,
    deep: Annotated[bool, typer.Option("--deep", help="decode all media")] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="remove faulty objects, so that the run command renders and seals again")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="remove faulty objects, then render and seal again, as resume does")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster for --repair; default: RAY_ADDRESS, else a local Ray")
    ] = None,
    engine: Engines = None,
    hook: Hooks = None,
    as_json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Check all records, media, posters and sealed files. The exit code is 3 if there are faults.

    With --repair the exit code is that of the rendering: 0 if all faults are repaired.
    """
    from hv_batch.media.probe import decode_media

    store = Store(output)
    with _changing(store, "verify", remove or repair, take_over) as check_lease:
        result = verify_root(store, decode_media, decodes=None if deep else sample_decode, shards=parse_shards(shards))
        repairable = [finding for finding in result.findings if finding.is_repairable]
        if repairable and (remove or repair):
            # Before anything is removed: what could not be rendered again must stay.
            refuse_loss(store, result.findings)
            check_revision(store)
            if repair:
                _check_resume(output, engine or (), hook or ())
            check_lease()
            remove_faults(store, repairable)
    removed = bool(repairable) and (remove or repair)
    if as_json:
        show_json("hv_batch/verification/1", result.to_dict() | {"removed": removed})
    else:
        show(result.render())
    if not result.findings:
        return
    left = len(result.findings) - len(repairable)
    if repair and repairable:
        print("faulty objects were removed; rendering the samples again", file=sys.stderr)
        code = _render_again(output, repairable, address, take_over, engine or (), hook or ())
        raise typer.Exit(code or (FOUND if left else 0))
    if not as_json:
        show(_remedy(removed, len(repairable), left))
    raise typer.Exit(FOUND)


def _remedy(removed: bool, repairable: int, left: int) -> str:
    """What to do about the findings, as the last lines of the report."""
    lines = []
    if repairable:
        lines.append(
            "Faulty objects were removed. The same run command renders the missing samples and seals again."
            if removed
            else "verify --repair renders them again; verify --remove leaves that to the same run command."
        )
    if left:
        lines.append(f"{plural(left, 'problem')} cannot be repaired by a render; nothing is removed for them.")
    return "\n".join(lines)


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
    with _changing(store, "retry", yes, take_over) as check_lease:
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


def withdraw(
    output: Output,
    sample: Annotated[str, typer.Argument(help="id of a row (all of its videos), or key of one video", metavar="ID")],
    reason: Annotated[str, typer.Option(help="why; it is kept in the output root for good")],
    as_json: Json = False,
    take_over: TakeOver = False,
) -> None:
    """Remove a sample from the dataset for good: its files and records go, and it is never rendered again."""
    store = Store(output)
    with _changing(store, "withdraw", True, take_over) as check_lease:
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
    with _changing(store, "gc", yes, take_over) as check_lease:
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


def diff(
    a: Annotated[str, typer.Argument(help="output root: folder or URL")],
    b: Annotated[str, typer.Argument(help="output root to compare with")],
    as_json: Json = False,
) -> None:
    """Compare two runs sample by sample. The exit code is 3 if any sample differs."""
    result = compare(Store(a), Store(b))
    if as_json:
        show_json("hv_batch/diff/1", result.to_dict())
    else:
        show(result.render())
    if not result.is_equal:
        raise typer.Exit(FOUND)


def end_run(output: str, code: int, as_json: bool) -> None:
    """End a command that has rendered, with its exit code and for --json with what the output root says now."""
    if as_json:
        store = Store(output)
        try:
            summary, has_report = read_summary(store), store.exists(layout.REPORT)
        except (OSError, UserError):  # stopped before the run began, or the store does not answer
            summary, has_report = None, False
        url = public_url(store.url)
        report = f"{url}/{layout.REPORT}" if has_report else None
        show_json("hv_batch/run/1", {"output": url, "exit_code": int(code), "summary": summary, "report": report})
    raise typer.Exit(code)


def parse_shards(text: str | None) -> list[int] | None:
    """The shard numbers of a list such as `3,17-20`; None for all.

    Raises UserError if `text` is no such list, or names more than MAX_NAMED shards.
    """
    if text is None:
        return None
    ranges = parse_ranges(text)
    if (count := sum(map(len, ranges))) > MAX_NAMED:
        raise UserError(f"--shards names {count:,} shards; allowed: at most {MAX_NAMED:,}. Omit it to select all.")
    return sorted({shard for shards in ranges for shard in shards})


def _check_resume(output: str, engines: Sequence[str], hooks: Sequence[str]) -> None:
    from hv_batch.runtime.render import check_resume  # Ray and the engine take seconds to import

    check_resume(output, engines=engines, hooks=hooks)


def _render_again(
    output: str,
    findings: Sequence[Finding],
    address: str | None,
    take_over: bool,
    engines: Sequence[str],
    hooks: Sequence[str],
) -> int:
    """Resume the run in the shards with findings; the whole run if a finding belongs to no shard."""
    from hv_batch.runtime.render import resume  # Ray and the engine take seconds to import

    damaged = sorted({finding.shard for finding in findings if finding.shard is not None})
    is_whole = any(finding.shard is None for finding in findings)
    chosen = Selection(shards=() if is_whole else tuple(range(shard, shard + 1) for shard in damaged))
    return resume(output, address=address, selection=chosen, steal=take_over, engines=engines, hooks=hooks)


@contextmanager
def _changing(store: Store, purpose: str, changes: bool, take_over: bool) -> Iterator[Callable[[], None]]:
    """Hold the lease of the root if the command changes it.

    Yields a function that must be called before each change: it raises UserError if another writer has taken the root
    over.
    """
    if not changes:
        yield lambda: None
        return
    read_run(store)  # raises if there is no run: a mistyped path must not become a folder with a lease
    with hold_lease(store, this_process(purpose), steal=take_over) as lease:
        assert lease is not None, "without `wait` the lease is held or refused"
        yield lease.check


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
