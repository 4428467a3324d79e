"""The driver's account of videos that wait on the disks of nodes, and the tasks there that commit them.

One task a node at a time, each trying what its node has (see `job/spool.py`); while the output root does not answer,
that is a try now and then. What a node should have and does not is looked for in the output root, and rendered again
where it is not there either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hv_batch.job import layout
from hv_batch.job.config.sections import OutputConfig
from hv_batch.job.failure import FailureClass
from hv_batch.job.formatting import plural
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.spool import DrainResult, Spool
from hv_batch.job.scheduling.messages import Event, Published, SpoolLost
from hv_batch.job.stages import Stage
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.classify import classify
from hv_batch.runtime.driver.outage import Outage
from hv_batch.runtime.run_context import RunContext
from hv_batch.runtime.worker import Watch

logger = logging.getLogger(__name__)

Submit = Callable[[Callable[[], Event], Callable[[Event], list[Event]]], None]


@ray.remote(num_cpus=0, max_retries=3)  # a repeated one finds what the first has committed
def empty_spool(output: OutputConfig, root: Store, fingerprint: str) -> DrainResult:
    return Spool(output, root, fingerprint).drain()


class SpoolDrain:
    """`submit` runs an act on the output root in an I/O thread, and a function of its result in the loop's thread."""

    def __init__(self, context: RunContext, watch: Watch, outage: Outage, submit: Submit) -> None:
        self._context = context
        self._watch = watch
        self._outage = outage
        self._submit = submit
        self._waiting: dict[str, dict[str, Sample]] = {}  # by node, then by key
        self._unvisited: set[str] = set()  # nodes that may have what nobody knows of
        self._asked: set[str] = set()  # nodes with a task

    @property
    def is_visiting(self) -> bool:
        """What nodes may have is about to be committed, and should not be rendered meanwhile."""
        return bool(self._unvisited)

    def visit(self, nodes: Iterable[str]) -> None:
        if self._context.config.output.spool_gib > 0:
            self._unvisited.update(nodes)

    def add(self, node: str, sample: Sample) -> None:
        self._waiting.setdefault(node, {})[sample.key] = sample

    def go_on(self, now: float) -> None:
        """Let nodes try to commit what they have."""
        if self._outage.pauses(now):
            return
        context = self._context
        for node in (self._unvisited | self._waiting.keys()) - self._asked:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            task = empty_spool.options(scheduling_strategy=strategy)
            ref = task.remote(context.config.output, context.store, context.fingerprint)
            self._asked.add(node)
            self._watch(ref, partial(self._answered, node, tuple(self._waiting.get(node, ()))))

    def describe(self) -> str:
        """What is left behind, for people; nothing where nothing is."""
        count = sum(map(len, self._waiting.values()))
        if not count:
            return ""
        return (
            f"{plural(count, 'finished video')} on the disks of {plural(len(self._waiting), 'node')} could not be "
            "committed: a resume commits what it finds on the nodes it runs on, and renders the rest again"
        )

    def _answered(self, node: str, expected: Iterable[str], ref: ray.ObjectRef) -> list[Event]:
        """`expected` is what the node had when it was asked."""
        self._asked.discard(node)
        try:
            emptied = ray.get(ref)
        except RayError as error:
            failure = classify(error, f"the spool of node {node}")
            if failure.kind is FailureClass.FATAL:
                raise UserError(f"The run cannot go on: {failure.message.rstrip('. ')}.") from error
            emptied = DrainResult(())
        waiting = self._waiting.get(node, {})
        published = [key for key in emptied.committed if waiting.pop(key, None)]
        if found := len(emptied.committed) - len(published):
            logger.info(f"committed {plural(found, 'video')} that an earlier outage had left on the disk of a node")
        if emptied.outage:
            self._outage.met(StorageUnavailableError(emptied.outage), time.monotonic())
        else:
            if emptied.committed:
                self._outage.over(time.monotonic())
            self._unvisited.discard(node)
            for key in expected:
                if sample := waiting.pop(key, None):
                    self._submit(partial(self._recover, sample), lambda event: [event])
        if not waiting:
            self._waiting.pop(node, None)
        return [Published(key) for key in published]

    def _recover(self, sample: Sample) -> Event:
        """In the I/O thread. The video may have been committed by a task that died before it could report that."""
        store = self._context.store
        if store.exists(layout.commit_key(sample.shard, sample.key)):
            return Published(sample.key)
        has_latents = store.exists(layout.latent_key(sample.shard, sample.key))
        return SpoolLost(sample.key, Stage.DECODE if has_latents else Stage.ENCODE)
