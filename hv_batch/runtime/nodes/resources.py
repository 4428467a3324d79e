"""The resources that a run needs, and whether the cluster can ever provide them (P6)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.autoscaler.sdk import request_resources

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.job.stages import Stage
from hv_batch.protocol import ParallelPlan, UserError

logger = logging.getLogger(__name__)

Bundle = dict[str, float]

NODE_LABEL = "ray.io/node-id"  # Ray sets this label on every node

POLL_S = 2.0
SAY_EVERY_S = 30.0

# The share of a node's object store for embeddings, and the same for latents. The other half is for the copies that
# readers on other nodes pull, and for other users of the cluster. Ray starts to spill to disk at 80 %.
STORE_SHARE = 0.25
STORE = "object_store_memory"  # Ray's name of the object store among a node's resources

SINGLES = {Stage.ENCODE: "an encoder", Stage.DECODE: "a decoder"}


def actor_bundle(cpus: float, gpus: float) -> Bundle:
    """The bundle of an actor, without zero amounts, which Ray refuses."""
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}


def avoid_nodes(avoid: frozenset[str]) -> dict[str, str]:
    """The label selector that excludes these nodes for a bundle or an actor."""
    return {NODE_LABEL: f"!in({','.join(sorted(avoid))})"} if avoid else {}


def group_bundles(run: ResolvedRun, plan: ParallelPlan) -> list[Bundle]:
    """One bundle per node, with the resources of all ranks there, so that the ranks of a node are always consecutive.

    Colocated encoders add their CPUs; they use the ranks' GPUs.
    """
    ranks, groups = run.ranks_per_node(plan), run.config.groups
    cpus = groups.cpus_per_rank * ranks + run.colocated_per_node * run.config.encoders.cpus
    return [actor_bundle(cpus, groups.gpus_per_rank * ranks)] * groups.nodes_per_group


def minimum_resources(run: ResolvedRun) -> list[list[Bundle]]:
    """The minimum with which the run can render all samples: one group of the largest plan, and one encoder and one
    decoder if these have pools of their own.

    The bundles of one inner list must be on different nodes.
    """
    return [group_bundles(run, run.groups.largest), *([bundle] for bundle in single_actors(run).values())]


def single_actors(run: ResolvedRun) -> dict[Stage, Bundle]:
    """The bundles of one encoder and one decoder, as far as these have pools of their own."""
    return {stage: actor_bundle(pool.cpus, pool.gpus) for stage, pool in run.pools.items()}


def total(bundles: Sequence[Mapping[str, float]]) -> Bundle:
    names = {name for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in sorted(names)}


def can_place(needed: Sequence[Sequence[Bundle]], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether every bundle fits on a node, and the bundles of each inner list on different nodes.

    First fit, largest first. This is sufficient for one group and two single actors.
    """
    free = [dict(node) for node in nodes]
    for apart in sorted(needed, key=lambda bundles: sorted(total(bundles).values()), reverse=True):
        untaken = list(free)
        for need in apart:
            node = next((n for n in untaken if all(n.get(k, 0.0) >= v - 1e-9 for k, v in need.items())), None)
            if node is None:
                return False
            untaken = [other for other in untaken if other is not node]
            for name, amount in need.items():
                node[name] -= amount
    return True


class ResourceShortage:
    """Detects that the cluster's nodes, even when idle, cannot hold the minimum resources of a run.

    It logs the shortage and requests the resources from an autoscaler. A run waits for the end of the shortage before
    it starts, and again if its nodes are lost.
    """

    def __init__(self, run: ResolvedRun, *, timeout_s: float) -> None:
        self._run = run
        self._timeout_s = timeout_s
        self._needed = minimum_resources(run)
        self._since: float | None = None
        self._logged = -math.inf

    def lasts(self, nodes: Sequence[Mapping[str, float]], now: float, *, is_busy: bool = False) -> bool:
        """Whether there is a shortage at the monotonic time `now`, at which the cluster has `nodes`.

        Raises UserError after `timeout_s` of a shortage in which the run is not busy.
        """
        if can_place(self._needed, nodes):
            self.forget()
            return False
        comparison = _compare(self._run, nodes)
        self._since = now if is_busy or self._since is None else self._since
        if not is_busy and now - self._since >= self._timeout_s:
            raise UserError(
                f"The cluster is too small for this run, even when idle. {comparison} Add nodes, or request less in "
                "the config (parallel, groups, encoders, decoders), and run the same command again."
            )
        if self._logged == -math.inf or (not is_busy and now - self._logged > SAY_EVERY_S):
            self._logged = now
            request_resources(bundles=[bundle for bundles in self._needed for bundle in bundles])
            logger.warning(f"waiting for nodes: {comparison}")
        return True

    def forget(self) -> None:
        """End the shortage, and withdraw the request to the autoscaler."""
        if self._logged > -math.inf:
            request_resources(bundles=[])
        self._since, self._logged = None, -math.inf


def await_resources(shortage: ResourceShortage, should_stop: Callable[[], bool]) -> bool:
    """Wait until the cluster can hold the minimum resources. Nothing is reserved.

    Returns False if `should_stop` ended the wait. Raises UserError as `ResourceShortage.lasts` does.
    """
    try:
        while shortage.lasts(list(alive_nodes().values()), time.monotonic()):
            if should_stop():
                return False
            time.sleep(POLL_S)
        return True
    finally:
        shortage.forget()


def alive_nodes() -> dict[str, Bundle]:
    """The total resources of each node that is alive, by its Ray id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def result_shares(run: ResolvedRun) -> dict[Stage, float]:
    """The bytes of an object store that the results of one worker may use, by stage, for the current cluster.

    The results of a worker are in the object store of its node. Each worker gets an equal part of the smallest store of
    a node that can hold one, divided by the largest number of such workers on one node. For groups that number is the
    one of the smallest plan.
    """
    nodes, most, encoders = list(alive_nodes().values()), run.max_workers, run.config.encoders
    group, encoder = group_bundles(run, run.groups.plans[-1])[0], actor_bundle(encoders.cpus, encoders.gpus)
    of_groups = result_share(group, most[Stage.DENOISE], nodes)
    if encoders.is_colocated:
        return {Stage.ENCODE: of_groups / run.colocated_per_node, Stage.DENOISE: of_groups}
    return {Stage.ENCODE: result_share(encoder, most[Stage.ENCODE], nodes), Stage.DENOISE: of_groups}


def result_share(bundle: Bundle, count: int, nodes: Sequence[Mapping[str, float]]) -> float:
    """The bytes for the results of each of `count` workers that need `bundle`; inf if none of `nodes` can hold one."""
    capacities = [(node[STORE], min(count, _capacity(bundle, node))) for node in nodes]
    usable = [(store, int(workers)) for store, workers in capacities if workers >= 1]
    if not usable:
        return math.inf
    return STORE_SHARE * min(store for store, _ in usable) / max(workers for _, workers in usable)


def _capacity(bundle: Bundle, node: Mapping[str, float]) -> float:
    """The number of workers that `node` can hold while it is idle."""
    return min((node.get(name, 0.0) / amount + 1e-9 for name, amount in bundle.items()), default=math.inf)


def _compare(run: ResolvedRun, nodes: Sequence[Mapping[str, float]]) -> str:
    """The minimum resources and the cluster's nodes, for messages."""
    actors = "".join(f", {SINGLES[stage]} with {show(bundle)}" for stage, bundle in single_actors(run).items())
    existing = "; ".join(show_hardware(node) for node in nodes) or "none"
    largest = run.groups.largest
    ranks, group = largest.world_size, format_bundles(group_bundles(run, largest))
    return f"Minimum: a group of {ranks} rank(s) on {group}{actors}. Nodes of the cluster: {existing}."


def format_bundles(bundles: Sequence[Bundle]) -> str:
    """For example "2 nodes with 4 GPU each". The bundles must be equal."""
    if len(bundles) == 1:
        return f"one node with {show(bundles[0])}"
    return f"{len(bundles)} nodes with {show(bundles[0])} each"


def show_hardware(node: Mapping[str, float]) -> str:
    return show({name: node.get(name, 0.0) for name in ("CPU", "GPU")})


def show_cluster(nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """The total hardware of `nodes`, and how much of it is `free`."""
    return (
        f"the cluster has {show_hardware(total(nodes))} on {len(nodes)} node(s), of which {show_hardware(free)} are "
        "free"
    )


def show(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
