"""The manifest and the config of a run that is planned or simulated, checked as the run would check them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from hv_batch.job.config.engine_factory import build_engine
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import ENGINE
from hv_batch.job.cost_model.memory_check import check_memory
from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.cost_model.resolver import resolve_run
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


@contextmanager
def checked_manifest(config: RunConfig, manifest: Manifest) -> Iterator[tuple[Index, ResolvedRun]]:
    """The index of the samples, which exists inside the block only, and the resolved run.

    Raises UserError for a config or manifest that a run would refuse, and for an engine without a cost model.
    """
    if config.model.engine != ENGINE:
        raise UserError(f"The costs of the engine {config.model.engine} are not known; known are those of {ENGINE}.")
    # This refuses the options that a run would refuse.
    engine = build_engine(config.model.engine, config.model.engine_options())
    if (plan := resolve_run(config).fixed_plan) and (problems := engine.group_problems(plan)):
        raise UserError("; ".join(problems))
    check_loras = getattr(engine, "lora_problems", list)
    if problems := check_loras():
        raise UserError("\n".join(problems))
    with tempfile.TemporaryDirectory(prefix="hv_batch-plan-") as folder:
        index = check_manifest(manifest, config, Store(folder))
        run = resolve_run(config, index.summary.shapes)
        check_memory(run)
        groups = run.groups
        if problems := [line for plan in groups.plans for line in engine.group_problems(plan, groups.shapes(plan))]:
            raise UserError("; ".join(problems))
        yield index, run
