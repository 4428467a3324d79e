"""Where a run's actors may stand: the bill of materials, and whether a cluster can ever pay it (P6)."""

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

NODE_LABEL = "ray.io/node-id"  # which Ray itself puts on every node

LOOK_EVERY_S = 2.0
SAY_EVERY_S = 30.0

# Of a node's object store, for embeddings and again for latents. The other half is for the copies that readers on other
# nodes pull, for what else runs on the cluster, and for Ray, which begins to spill to disk at 80 %.
STORE_SHARE = 0.25
STORE = "object_store_memory"  # Ray's name for it among a node's resources


SINGLES = {Stage.ENCODE: "an encoder", Stage.DECODE: "a decoder"}


def actor_bundle(cpus: float, gpus: float) -> Bundle:
    """Ray refuses zero amounts in a bundle."""
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}


def avoid_nodes(avoid: frozenset[str]) -> dict[str, str]:
    """The label selector that keeps a bundle or an actor off these nodes."""
    return {NODE_LABEL: f"!in({','.join(sorted(avoid))})"} if avoid else {}


def group_bundles(run: ResolvedRun, plan: ParallelPlan) -> list[Bundle]:
    """One bundle a node, with room for its ranks: so the ranks of a node are consecutive whatever Ray chooses.

    Colocated encoders add their CPUs; they use the ranks' GPUs.
    """
    ranks, groups = run.ranks_per_node(plan), run.config.groups
    cpus = groups.cpus_per_rank * ranks + run.colocated_per_node * run.config.encoders.cpus
    return [actor_bundle(cpus, groups.gpus_per_rank * ranks)] * groups.nodes_per_group


def minimum_resources(run: ResolvedRun) -> list[list[Bundle]]:
    """The least that renders everything: one group, of the largest plan there is, and an encoder and a decoder where
    these stand by themselves.

    The bundles of one inner list must stand on different nodes.
    """
    return [group_bundles(run, run.groups.largest), *([bundle] for bundle in single_actors(run).values())]


def single_actors(run: ResolvedRun) -> dict[Stage, Bundle]:
    """What one encoder and one decoder ask of a node, where they stand by themselves."""
    return {stage: actor_bundle(pool.cpus, pool.gpus) for stage, pool in run.pools.items()}


def total(bundles: Sequence[Mapping[str, float]]) -> Bundle:
    names = {name for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in sorted(names)}


def can_place(bill: Sequence[Sequence[Bundle]], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether every bundle finds a node, and those of one inner list different ones.

    Largest first into the first node that has room: enough for one group and two single actors.
    """
    free = [dict(node) for node in nodes]
    for apart in sorted(bill, key=lambda bundles: sorted(total(bundles).values()), reverse=True):
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
    """Whether the nodes that there are could not hold the least bill, however idle: said, and told to an autoscaler.

    Before a run begins that is all it waits for, and when its nodes are gone, it waits for others in the same way.
    """

    def __init__(self, run: ResolvedRun, *, patience_s: float) -> None:
        self._run = run
        self._patience_s = patience_s
        self._bill = minimum_resources(run)
        self._since: float | None = None
        self._said = -math.inf

    def lasts(self, now: float, *, is_busy: bool = False) -> bool:
        """Raises UserError after `patience_s` of it with nothing to do, with what was asked and what there is."""
        nodes = list(alive_nodes().values())
        if can_place(self._bill, nodes):
            self.forget()
            return False
        told = _asked_and_there(self._run, nodes)
        self._since = now if is_busy or self._since is None else self._since
        if not is_busy and now - self._since >= self._patience_s:
            raise UserError(
                f"Ray has not the resources that this run needs. {told} However idle these are, the run could not go "
                "on there. Add nodes, or ask for less in the config (parallel, groups, encoders, decoders), and run "
                "the same command again."
            )
        if self._said == -math.inf or (not is_busy and now - self._said > SAY_EVERY_S):
            self._said = now
            request_resources(bundles=[bundle for bundles in self._bill for bundle in bundles])
            logger.warning(f"waiting for nodes: {told}")
        return True

    def forget(self) -> None:
        """There is enough, or nobody waits any more."""
        if self._said > -math.inf:
            request_resources(bundles=[])
        self._since, self._said = None, -math.inf


def await_resources(shortage: ResourceShortage, should_stop: Callable[[], bool]) -> bool:
    """Wait until the cluster has what the least bill asks for; nothing is reserved.

    False when `should_stop` ended the waiting. Raises UserError as `ResourceShortage.lasts`.
    """
    try:
        while shortage.lasts(time.monotonic()):
            if should_stop():
                return False
            time.sleep(LOOK_EVERY_S)
        return True
    finally:
        shortage.forget()


def alive_nodes() -> dict[str, Bundle]:
    """What each node of the cluster has in all, by Ray's id of the node."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def result_shares(run: ResolvedRun) -> dict[Stage, float]:
    """Bytes of an object store that the results of one worker may hold, by its stage; asked of the cluster as it is.

    A worker's results lie where it stands. So each gets its part of the smallest store on which one can stand, divided
    by how many of its kind may come together on one node; of the groups' plans, the smallest is the one of which most
    do.
    """
    nodes, most, encoders = list(alive_nodes().values()), run.max_workers, run.config.encoders
    group, encoder = group_bundles(run, run.groups.plans[-1])[0], actor_bundle(encoders.cpus, encoders.gpus)
    of_groups = result_share(group, most[Stage.DENOISE], nodes)
    if encoders.is_colocated:
        return {Stage.ENCODE: of_groups / run.colocated_per_node, Stage.DENOISE: of_groups}
    return {Stage.ENCODE: result_share(encoder, most[Stage.ENCODE], nodes), Stage.DENOISE: of_groups}


def result_share(bundle: Bundle, count: int, nodes: Sequence[Mapping[str, float]]) -> float:
    """Of each of `count` workers that want `bundle` of a node; inf where none of `nodes` has room for one."""
    rooms = [(node[STORE], min(count, _how_many(bundle, node))) for node in nodes]
    stores, crowds = [store for store, room in rooms if room >= 1], [int(room) for _, room in rooms if room >= 1]
    return STORE_SHARE * min(stores) / max(crowds) if stores else math.inf


def _how_many(bundle: Bundle, node: Mapping[str, float]) -> float:
    """Workers that `node` has room for while it is idle."""
    return min((node.get(name, 0.0) / amount + 1e-9 for name, amount in bundle.items()), default=math.inf)


def _asked_and_there(run: ResolvedRun, nodes: Sequence[Mapping[str, float]]) -> str:
    actors = "".join(f", {SINGLES[stage]} with {show(bundle)}" for stage, bundle in single_actors(run).items())
    there = "; ".join(show_hardware(node) for node in nodes) or "none"
    largest = run.groups.largest
    ranks, group = largest.world_size, format_bundles(group_bundles(run, largest))
    return f"Needed at least: a group of {ranks} rank(s) on {group}{actors}. Nodes there are: {there}."


def format_bundles(bundles: Sequence[Bundle]) -> str:
    """As "2 nodes with 4 GPU each"; the bundles are equal."""
    if len(bundles) == 1:
        return f"one node with {show(bundles[0])}"
    return f"{len(bundles)} nodes with {show(bundles[0])} each"


def show_hardware(node: Mapping[str, float]) -> str:
    return show({name: node.get(name, 0.0) for name in ("CPU", "GPU")})


def show_cluster(nodes: Sequence[Mapping[str, float]]) -> str:
    """All of `nodes` together, and what of it is free now."""
    there, free = show_hardware(total(nodes)), show_hardware(ray.available_resources())
    return f"the cluster has {there} on {len(nodes)} node(s), of which {free} are free"


def show(resources: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
