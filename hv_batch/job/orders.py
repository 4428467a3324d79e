"""What a run was begun with, as its run.json tells it: all that a resume needs."""

from __future__ import annotations

from pydantic import ValidationError

from hv_batch.job.config.retired_keys import replace_retired
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.records.run_document import read_run
from hv_batch.job.redaction import MASK
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


def read_orders(output: str) -> tuple[RunConfig, str | list[str]]:
    """The config and the manifest's URLs that the run at `output` was begun with. Raises UserError when
    there is no run, or its run.json does not hold everything.
    """
    run = read_run(Store(output))
    config = run["config"]
    if isinstance(config, dict):
        config = replace_retired(config)
    if _is_masked(config):
        raise UserError(
            f"The run at {output} was begun with a secret in its config, which is not kept in its run.json. Give the "
            "secret by the environment, or resume with the command that began the run."
        )
    try:
        return RunConfig.model_validate(config), run["manifest"]["url"]
    except ValidationError as error:
        raise UserError(
            f"The config in the run.json of {output} is not one of this version of hv_batch: {error}. Resume with the "
            "version that is named there."
        ) from error


def _is_masked(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_is_masked, value.values()))
    return any(map(_is_masked, value)) if isinstance(value, list) else value == MASK
