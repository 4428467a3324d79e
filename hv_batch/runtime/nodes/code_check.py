"""Checks that every node has this version of hv_batch, before the first actor starts there (P6)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hv_batch import __version__
from hv_batch.protocol import UserError

logger = logging.getLogger(__name__)

ANSWER_S = 60.0  # for the first process of a busy node; a node that takes longer is checked by its first actor

REMEDY = (
    f"Every node needs hv_batch {__version__}, the version of the driver. Install it in the image of the nodes, or "
    "submit the run with `ray job submit --runtime-env jobs/runtime_env.yaml`, which uploads the code."
)


def check_code(nodes: Iterable[str]) -> None:
    """Ask a process on each node for its version of hv_batch; `nodes` are ids of Ray.

    Raises UserError with every node that has none or another one. Nodes that do not answer are left out.
    """
    probe = ray.remote(num_cpus=0, max_retries=0)(_probe())
    asked = {
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in nodes
    }
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    for ref in late:
        ray.cancel(ref, force=True)
    problems = []
    for ref in ready:
        try:
            address, version, error = ray.get(ref)
        except RayError as failure:  # the node is lost, or full: the scheduler handles that later
            logger.warning(f"node {asked[ref][:8]} could not be asked for its version of hv_batch: {failure}")
            continue
        if version is None:
            problems.append(f"hv_batch cannot be imported on the node {address}: {error}")
        elif version != __version__:
            problems.append(f"the node {address} has hv_batch {version}")
    if problems:
        raise UserError(f"{'; '.join(sorted(set(problems)))}. {REMEDY}")


def _probe() -> Callable[[], tuple[Any, Any, Any]]:
    """A function that is sent by value: one of this module could not be loaded where hv_batch is missing."""

    def probe() -> tuple[Any, Any, Any]:
        import importlib

        import ray

        address = ray.util.get_node_ip_address()
        try:
            return address, importlib.import_module("hv_batch").__version__, None
        except Exception as error:  # noqa: BLE001  # whatever the import of a damaged installation raises
            return address, None, f"{type(error).__name__}: {error}"

    return probe
