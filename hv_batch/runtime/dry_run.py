"""`hv-batch run --dry-run`: every check of a run that needs no GPU, and what the run would do. Nothing is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.manifest.selection import Selection
from hv_batch.job.records.pending import only_failed
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.store import Store
from hv_batch.job.workload import shape_name
from hv_batch.protocol import UserError
from hv_batch.runtime.nodes.resources import SINGLES, format_bundles, group_bundles, show, single_actors
from hv_batch.runtime.preflight import PreparedRun, prepare_run
from hv_batch.runtime.ray_contact import contact_cluster, resolve_address


def check_run(
    config: RunConfig,
    manifest_urls: Sequence[str],
    output_url: str,
    *,
    selection: Selection | None,
    address: str | None,
    failed_only: bool = False,
    allow_change: Collection[str] = (),
) -> dict[str, Any]:
    """Check a run as `render` does before it starts Ray, and return what it would do as JSON values.

    Writes nothing but the probe of the output root, which it removes. Raises UserError with all problems, and if
    no Ray answers at the address.
    """
    store = Store(output_url)
    with tempfile.TemporaryDirectory(prefix="hv_batch-plan-") as spool:
        if failed_only:
            selection = only_failed(store, selection or Selection())
        try:
            job = prepare_run(
                *(config, Manifest(manifest_urls), store, Store(spool), selection, address), allow_change=allow_change
            )
            contact_cluster(resolve_address(address))
        except OSError as error:
            raise UserError(f"{error}. Nothing was started.") from error
        return _describe(job, store)


def _describe(job: PreparedRun, store: Store) -> dict[str, Any]:
    run, summary = job.context.run, job.index.summary
    largest = run.groups.largest
    minimum = [f"a group of {largest.world_size} rank(s) on {format_bundles(group_bundles(run, largest))}"]
    minimum += [f"{SINGLES[stage]} with {show(bundle)}" for stage, bundle in single_actors(run).items()]
    return {
        "output": public_url(store.url),
        "state": job.state.value,
        "rows": summary.rows,
        "samples": summary.samples,
        "shards": summary.shards,
        "selected": job.pending.total,
        "shapes": {shape_name(list(shape)): count for shape, count in sorted(summary.shapes.items())},
        "minimum": minimum,
        "fingerprint": job.context.fingerprint,
    }


STATES = {
    "new": "has no run yet; this one would start there",
    "resumed": "has an unfinished run, which this one would resume",
    "finished": "is finished; this run would render nothing",
}


def render_check(result: Mapping[str, Any]) -> str:
    """The result of `check_run` as text."""
    shapes = ", ".join(f"{count:,} of {shape}" for shape, count in result["shapes"].items())
    rows, samples, shards = (f"{result[name]:,} {name}" for name in ("rows", "samples", "shards"))
    return "\n".join(
        [
            f"output root: {result['output']} {STATES[result['state']]}",
            f"manifest: {rows}, {samples} in {shards} ({shapes})",
            f"selected: {result['selected']:,} samples, less those that are done",
            f"minimum: {', '.join(result['minimum'])}",
            "dry run: everything is valid; nothing was started or written. `hv-batch plan` estimates memory and hours.",
        ]
    )
