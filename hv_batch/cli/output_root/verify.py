"""`hv-batch verify`: check an output root; remove what is faulty, and render it again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from hv_batch.cli.output_root.arguments import Engines, Hooks, Output, Shards, TakeOver, parse_shards
from hv_batch.cli.output_root.lease import changing
from hv_batch.cli.terminal import FOUND, Json, show, show_json
from hv_batch.job.formatting import plural
from hv_batch.job.inspection.findings import Finding
from hv_batch.job.inspection.verify import remove_faults
from hv_batch.job.inspection.verify import verify as verify_root
from hv_batch.job.inspection.verify_plan import refuse_loss
from hv_batch.job.manifest.selection import Selection
from hv_batch.job.records.run_document import check_revision
from hv_batch.job.storage.store import Store

SAMPLED_DECODES = 16


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
    with changing(store, "verify", remove or repair, take_over) as check_lease:
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
