"""Going on with a run by its output root alone: all that a resume needs is in its run.json."""

from __future__ import annotations

from threading import Event

from hv_batch.job.manifest.selection import Selection
from hv_batch.job.orders import read_orders
from hv_batch.job.progress import Progress
from hv_batch.runtime.render import ExitCode, render


def resume(
    output: str,
    *,
    address: str | None,
    progress: Progress,
    manifest: str | None = None,
    selection: Selection | None = None,
    steal: bool = False,
    stopped: Event | None = None,
) -> ExitCode:
    """Render what is left of the run at `output`, or of a selection of it, with the config and the manifest it was
    begun with.

    `manifest` is where the same manifest is now, should it have moved; `steal` as in `render`. Raises UserError when
    there is no run, or its run.json does not hold everything.
    """
    config, recorded = read_orders(output)
    urls = manifest or recorded
    return render(
        config, urls, output, selection=selection, address=address, progress=progress, steal=steal, stopped=stopped
    )
