"""Going on with a run by its output root alone: all that a resume needs is in its run.json."""

from __future__ import annotations

from threading import Event

from pydantic import ValidationError

from hv_batch.job.config import RunConfig
from hv_batch.job.inputs import MASK
from hv_batch.job.progress import Progress
from hv_batch.job.runs import read_run
from hv_batch.job.storage import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.render import ExitCode, render


def resume(
    output: str,
    *,
    address: str | None,
    progress: Progress,
    manifest: str | None = None,
    steal: bool = False,
    stopped: Event | None = None,
) -> ExitCode:
    """Render what is left of the run at `output`, with the config and the manifest it was begun with.

    `manifest` is where the same manifest is now, should it have moved; `steal` as in `render`. Raises UserError when
    there is no run, or its run.json does not hold everything.
    """
    config, recorded = read_orders(output)
    urls = manifest or recorded
    return render(config, urls, output, address=address, progress=progress, steal=steal, stopped=stopped)


def read_orders(output: str) -> tuple[RunConfig, str | list[str]]:
    """The config and the manifest's URLs that the run at `output` was begun with. Raises UserError as `resume`."""
    run = read_run(Store(output))
    if _is_masked(run["config"]):
        raise UserError(
            f"The run at {output} was begun with a secret in its config, which is not kept in its run.json. Give the "
            "secret by the environment, or resume with the command that began the run."
        )
    try:
        return RunConfig.model_validate(run["config"]), run["manifest"]["url"]
    except ValidationError as error:
        raise UserError(
            f"The config in the run.json of {output} is not one of this version of hv_batch: {error}. Resume with the "
            "version that is named there."
        ) from error


def _is_masked(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_is_masked, value.values()))
    return any(map(_is_masked, value)) if isinstance(value, list) else value == MASK
