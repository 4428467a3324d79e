"""`hv-batch doctor`: checks this machine, or every node of a Ray cluster, before a run or for a report of a fault."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.redaction import safe_text
from hv_batch.protocol import UserError
from hv_batch.runtime.nodes.node_checks import Check, NodeRequest, Status, check_node
from hv_batch.runtime.nodes.resources import show_hardware
from hv_batch.runtime.ray_contact import describe_token, resolve_address
from hv_batch.runtime.session import connect

VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_TMPDIR", "CUDA_VISIBLE_DEVICES", "AWS_ENDPOINT_URL")
START_S = 60.0  # for the first process of a node, in addition to the time of its checks


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The checks by machine; those of Ray itself are under the name `ray`."""

    nodes: Mapping[str, list[Check]]

    @property
    def checks(self) -> list[Check]:
        return [check for checks in self.nodes.values() for check in checks]

    @property
    def is_healthy(self) -> bool:
        return all(check.status is not Status.FAILED for check in self.checks)


def diagnose(config: RunConfig | None, output: str | None, address: str | None, timeout_s: float) -> Diagnosis:
    """Check this machine, and with an address (or RAY_ADDRESS) every node of that cluster, each for `timeout_s`.

    Never raises for what it finds: an address where nothing answers is a failed check.
    """
    request = NodeRequest(config, output, timeout_s)
    name, checks = check_node(request)
    try:
        place = resolve_address(address)
        if place == "local":
            detail = f"{ray.__version__}; no address is given, so a run starts a local Ray; {describe_token()}"
            return Diagnosis({"ray": [Check("ray", Status.OK, detail)], name: checks})
        connect(place)
    except UserError as error:
        return Diagnosis({"ray": [Check("ray", Status.FAILED, str(error))], name: checks})
    try:
        return Diagnosis({**_cluster(place), f"{name} (this process)": checks, **_nodes(request)})
    finally:
        ray.shutdown()


def _cluster(address: str) -> dict[str, list[Check]]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    hardware = "; ".join(show_hardware(node["Resources"]) for node in alive)
    detail = f"{ray.__version__} at {address}, {len(alive)} node(s): {hardware}; {describe_token()}"
    return {"ray": [Check("ray", Status.OK, detail)]}


def _nodes(request: NodeRequest) -> dict[str, list[Check]]:
    """The checks of every node, made there by a task of no CPU."""
    probe = ray.remote(num_cpus=0, max_retries=0)(check_node)
    asked, found = {}, {}
    for node in (node for node in ray.nodes() if node["Alive"]):
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[probe.options(scheduling_strategy=here).remote(request)] = node
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=request.timeout_s + START_S)
    for ref in late:
        ray.cancel(ref, force=True)
        found[_name(asked[ref])] = [Check("node", Status.FAILED, "did not start the checks in time")]
    for ref in ready:
        node = asked[ref]
        try:
            _, checks = ray.get(ref)
        except RayError as error:  # hv_batch is missing there, or the node is lost
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            checks = [Check("node", Status.FAILED, safe_text(reason))]
        found[_name(node)] = [*checks, *_counted(node, checks)]
    return found


def _counted(node: Mapping[str, Any], checks: list[Check]) -> list[Check]:
    """Whether Ray counts as many GPUs as the driver of the node lists."""
    gpus = next((check for check in checks if check.name == "GPUs"), None)
    if gpus is None or gpus.detail.startswith("none"):
        return []
    listed, counted = gpus.detail.count(";") + 1, int(node["Resources"].get("GPU", 0))
    if listed == counted:
        return []
    detail = f"the driver lists {listed}, and Ray was started with {counted}; `ray start` takes --num-gpus"
    return [Check("Ray GPUs", Status.WARNING, detail)]


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} {node['NodeID'][:8]}"


def report_environment() -> dict[str, str]:
    """The variables that change how a run works. Those of the list hold no secrets."""
    return {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
