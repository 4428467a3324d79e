"""The videos that wait on the disks of nodes for the output root, and the Ray tasks that commit them there.

A node has at most one task at a time, which tries to commit all that the node has (see `job/records/spool.py`). While
the output root does not answer, the tasks are repeated after pauses. If a node has lost a video that it should have,
the driver looks for its record in the output root, and the sample is rendered again if there is none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hv_batch.job import layout
from hv_batch.job.config.sections import OutputConfig
from hv_batch.job.failure import FailureClass
from hv_batch.job.formatting import plural
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.continuation import equal_earlier
from hv_batch.job.records.lease import refuse_other_holder
from hv_batch.job.records.run_document import read_run, recorded_spool_folder
from hv_batch.job.records.spool import DrainResult, Spool, spool_base
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


@ray.remote(num_cpus=0, max_retries=3)  # a repeated task finds what the first has committed
def empty_spool(output: OutputConfig, root: Store, fingerprint: str, lease_token: str) -> DrainResult:
    try:
        if lease_token:
            refuse_other_holder(root, lease_token)
    except StorageUnavailableError as error:
        return DrainResult((), str(error))
    result = Spool(output, root, fingerprint).drain()
    try:
        run = None if result.outage else read_run(root)
    except StorageUnavailableError as error:
        return DrainResult(result.committed, str(error))
    for spool in _earlier_spools(output, root, fingerprint, run) if run else ():
        if not result.outage:
            earlier = spool.drain()
            result = DrainResult(result.committed + earlier.committed, earlier.outage)
    return result


def _earlier_spools(output: OutputConfig, root: Store, fingerprint: str, run: Mapping[str, Any]) -> Iterator[Spool]:
    """The spools of earlier commands on this node: in another folder, or from before the manifest had grown.

    The folder in run.json must not be created: anybody with write access to the root can name any folder. If this user
    has a spool there, an earlier run has written it, and its videos are committed.
    """
    folders = [output.spool_folder]
    recorded = recorded_spool_folder(run)
    if recorded not in (None, output.spool_folder) and spool_base(recorded).is_dir():
        folders.append(recorded)
    for folder in folders:
        for each in (fingerprint, *equal_earlier(run)):
            if each != fingerprint or folder != output.spool_folder:
                spool = Spool(output.model_copy(update={"spool_folder": folder}), root, each)
                if spool.exists():
                    yield spool


class SpoolDrain:
    """`submit` runs an act on the output root in an I/O thread, and a function of its result in the loop's thread."""

    def __init__(self, context: RunContext, watch: Watch, outage: Outage, submit: Submit) -> None:
        self._context = context
        self._watch = watch
        self._outage = outage
        self._submit = submit
        self._waiting: dict[str, dict[str, Sample]] = {}  # by node, then by key
        self._unscanned: set[str] = set()  # nodes that may have videos of an earlier run of this output root
        self._draining: set[str] = set()  # nodes with a task
        self._found_no_room = False

    @property
    def is_scanning(self) -> bool:
        """Whether nodes may still commit videos of an earlier run, which must not be rendered meanwhile."""
        return bool(self._unscanned)

    @property
    def is_unusable(self) -> bool:
        """Whether no further videos can wait on disks: spools are disabled, or the last decode found no room."""
        return self._context.config.output.spool_gib <= 0 or self._found_no_room

    def note_decode(self, *, has_failed: bool) -> None:
        """A decode has ended; `has_failed` if neither the output root nor the spool has taken its videos."""
        self._found_no_room = has_failed

    def scan_nodes(self, nodes: Iterable[str]) -> None:
        """Commit what an earlier run of this output root has left on the disks of `nodes`."""
        if self._context.config.output.spool_gib > 0:
            self._unscanned.update(nodes)

    def add(self, node: str, sample: Sample) -> None:
        """The video of `sample` waits on the disk of `node`."""
        self._waiting.setdefault(node, {})[sample.key] = sample

    def poll(self, now: float) -> None:
        """Start a task on each node that may have videos and has no task, unless the output root does not answer."""
        if self._outage.pauses(now):
            return
        context = self._context
        for node in (self._unscanned | self._waiting.keys()) - self._draining:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            task = empty_spool.options(scheduling_strategy=strategy)
            ref = task.remote(context.config.output, context.store, context.fingerprint, context.lease_token)
            self._draining.add(node)
            self._watch(ref, partial(self._drained, node, tuple(self._waiting.get(node, ()))))

    def describe(self) -> str:
        """A log line about the videos that are left on disks; empty if there are none."""
        count = sum(map(len, self._waiting.values()))
        if not count:
            return ""
        return (
            f"{plural(count, 'finished video')} on the disks of {plural(len(self._waiting), 'node')} could not be "
            "committed: a resume commits what it finds on the nodes it runs on, and renders the rest again"
        )

    def _drained(self, node: str, expected: Iterable[str], ref: ray.ObjectRef) -> list[Event]:
        """The task of a node has ended. `expected` are the keys that the node had when the task was started."""
        self._draining.discard(node)
        try:
            result = ray.get(ref)
        except RayError as error:
            failure = classify(error, f"the spool of node {node}")
            if failure.kind is FailureClass.FATAL:
                raise UserError(f"The run cannot go on: {failure.message.rstrip('. ')}.") from error
            result = DrainResult(())
        waiting = self._waiting.get(node, {})
        published = [key for key in result.committed if waiting.pop(key, None)]
        if others := len(result.committed) - len(published):
            logger.info(f"committed {plural(others, 'video')} that an earlier outage had left on the disk of a node")
        if result.outage:
            self._outage.note_failure(StorageUnavailableError(result.outage), time.monotonic())
        else:
            if result.committed:
                self._outage.note_success(time.monotonic())
            self._unscanned.discard(node)
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
