"""The inside of a denoise group: one actor a rank, one GPU (or CPU process) each."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import ray

from hv_batch.job.failure import Failure
from hv_batch.job.log_records import log_fields
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.latents import FinalLatents, put_latents, sample_identity
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.protocol import Denoiser, ParallelPlan, RankSpec, StepState
from hv_batch.runtime.groups.gpu_memory import await_free_memory
from hv_batch.runtime.groups.group_decode import RecordedDecode, record_decode
from hv_batch.runtime.groups.step_checkpoints import StepTimer, StepWriter, read_steps
from hv_batch.runtime.publisher import DecodedVideo, Publisher, Stages, scratch_folder
from hv_batch.runtime.run_context import ProgressReport, RunContext, StageReport, see_output_root, stopwatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankLocation:
    """Where Ray put a rank: what the ranks of a group need to know of each other before they can meet."""

    node: str  # Ray's id: several nodes of a cluster may share an address
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DenoiseTask:
    """One sample of a task, but for its embeddings."""

    sample: Sample
    stages: Mapping[str, StageReport]  # behind it
    attempt: int


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class RankActor:
    """One rank. A restarted rank would have no process group, hence no restarts: the driver rebuilds the whole group."""

    def __init__(self, context: RunContext, plan: ParallelPlan, rank: int, name: str) -> None:
        self._context = context
        self._plan = plan
        self._rank = rank
        context.configure_actor(f"{name}.rank{rank}")
        self._name = name
        self._pace = StepTimer()
        self._checkpoint_asked = Event()
        self._publisher = Publisher(context, name)  # of rank 0, where the group decodes
        self._recording: RecordedDecode | Exception | None = None

    def location(self) -> RankLocation:
        gpus = tuple(str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
        return RankLocation(ray.get_runtime_context().get_node_id(), gpus)

    def host_rendezvous(self) -> str:
        """Rank 0: open the meeting point on a port that is free at this moment, and keep it (no port race)."""
        return self._context.engine.host_rendezvous(ray.util.get_node_ip_address(), self._plan.world_size)

    def join(self, address: str, reservation: Sequence[RankLocation]) -> None:
        """Load the weights, meet the other ranks, and see that the group computes what one rank alone would."""
        decodes = self._context.run.groups_decode
        if self._rank == 0:
            self._publisher.check() if decodes else see_output_root(self._context.store)
        parallel = self._context.config.parallel
        neighbours = [
            rank for rank, location in enumerate(reservation) if location.node == reservation[self._rank].node
        ]
        if parallel.device == "cuda":
            # Every rank of a node sees the same GPUs in the same order: peer-to-peer copies and NCCL's topology search
            # need to see the neighbours. Takes effect because CUDA starts only in the engine.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for rank in neighbours for gpu in reservation[rank].gpus)
            self._await_own_gpu(neighbours.index(self._rank))
        timeouts = self._context.config.timeouts
        place = RankSpec(
            rank=self._rank,
            local_rank=neighbours.index(self._rank),
            plan=self._plan,
            device=parallel.device,
            address=address,
            # Ranks may finish loading as far apart as a start may take. A hang in a collective does not wait for this:
            # the scheduler misses the steps after timeouts.stall_s.
            timeout_s=max(timeouts.start_s, timeouts.stall_s),
            decodes=decodes,
        )
        self._denoiser: Denoiser = self._context.engine.join(place)
        self._denoiser.self_check()
        logger.info(f"rank {self._rank} of {self._plan.world_size} is ready")

    def _await_own_gpu(self, local_rank: int) -> None:
        if self._context.run.rank_gpus < 1:  # others may compute there, too
            return
        import torch  # only where there are GPUs: not every engine needs torch

        where = f"GPU {local_rank} of this group on node {ray.util.get_node_ip_address()}"
        await_free_memory(lambda: torch.cuda.mem_get_info(local_rank), where)

    def read_steps(self, sample: Sample) -> StepState | None:
        """Rank 0: the step checkpoint that an earlier try has left in the output root."""
        return read_steps(self._context.store, sample, sample_identity(sample, self._context.fingerprint))

    def denoise(self, tasks: Sequence[DenoiseTask], *inputs: Any) -> Any:
        """The latents of each from rank 0, then their reports; None elsewhere. Rank 0 has put the latents into the
        output root first (P4).

        `inputs` are the embeddings of each, a pair, then the state that each resumes from: Ray looks for references
        among the arguments alone, not inside them. Every rank is given the same states, which rank 0 read: a rank that
        looked for itself might see another one.
        """
        embeddings, resumes = inputs[: len(tasks)], inputs[len(tasks) :]
        each = zip(tasks, embeddings, resumes, strict=True)
        if self._rank != 0:
            for task, texts, resume in each:
                with log_fields(sample=task.sample.key, attempt=task.attempt):
                    self._assist(task.sample, texts, resume)
            return None
        denoised, reports = list[FinalLatents](), list[StageReport]()
        try:
            for task, texts, resume in each:
                with log_fields(sample=task.sample.key, attempt=task.attempt):
                    own, report = self._denoise(task, texts, resume)
                denoised.append(own)
                reports.append(report)
        finally:  # whatever becomes of the others
            # An output root that does not answer is no reason to lose a denoise: the latents also travel by reference.
            with suppress(StorageUnavailableError):
                put_latents(self._context.store, denoised)
        return *(own.latents for own in denoised), reports

    def _assist(self, sample: Sample, embeddings: tuple[Any, Any], resume: StepState | None) -> None:
        positive, negative = embeddings
        with self._pace.of(sample.params.num_inference_steps) as pace:
            self._denoiser.denoise(sample.params, positive, negative, lambda done, _: pace(done), resume)

    def _denoise(
        self, task: DenoiseTask, embeddings: tuple[Any, Any], resume: StepState | None
    ) -> tuple[FinalLatents, StageReport]:
        context, sample = self._context, task.sample
        positive, negative = embeddings
        identity = sample_identity(sample, context.fingerprint)
        every = context.config.groups.checkpoint_every
        logger.info(
            f"denoising {sample.params.num_inference_steps} steps" + (f" from step {resume.step}" if resume else "")
        )
        with (
            stopwatch() as watch,
            StepWriter(context.store, sample, identity, every, self._checkpoint_asked) as writer,
            self._pace.of(sample.params.num_inference_steps) as pace,
        ):

            def on_step(done: int, read: Callable[[], np.ndarray] | None) -> None:
                pace(done)
                writer.after_step(done, read)

            latents = self._denoiser.denoise(sample.params, positive, negative, on_step, resume)
        logger.info(f"denoised in {watch.seconds:.1f} s")
        details: dict[str, Any] = {"group": str(self._plan), "ranks": self._plan.world_size}
        details |= {"resumed_from_step": resume.step} if resume else {}
        details |= {"checkpoints_failed": writer.failed} if writer.failed else {}
        report = StageReport(watch.seconds, ray.util.get_node_ip_address(), self._name, details)
        reports = {name: stage.to_dict() for name, stage in {**task.stages, "denoise": report}.items()}
        return FinalLatents(sample, latents, identity, reports), report

    def find_latents(self, sample: Sample, stages: Stages | None) -> tuple[np.ndarray | None, Stages | None]:
        """Rank 0: what is to be decoded, and the reports behind it; None for these when the sample is committed.

        With `stages` the caller has the latents; without, both are read from the output root.
        """
        if self._publisher.is_committed(sample):
            return None, None
        self._folder = scratch_folder()
        return self._publisher.stored(sample) if stages is None else (None, stages)

    def decode(self, sample: Sample, latents: np.ndarray) -> None:
        """Every rank is given the same latents; rank 0 makes the media file and keeps it for `publish`.

        An error here leaves ranks waiting for each other.
        """
        frames = self._denoiser.decode(latents)
        if self._rank == 0:
            self._recording = record_decode(self._publisher, sample, frames, Path(self._folder.name))
        else:
            deque(frames, maxlen=0)

    def publish(self, sample: Sample, stages: Stages, failures: Sequence[Failure]) -> str | None:
        """Rank 0, when all ranks have decoded: as `DecoderActor.decode`."""
        recording, self._recording = self._recording, None
        assert recording, "nothing was decoded"
        with self._folder:
            if isinstance(recording, Exception):
                raise recording
            logger.debug(f"decoded in {recording.seconds:.1f} s")
            made = DecodedVideo(sample, recording.media, recording.seconds, stages, failures)
            return self._publisher.publish([made])[0]

    @ray.method(concurrency_group="health", enable_task_events=False)  # a question a second is no news
    def progress(self) -> ProgressReport:
        return ProgressReport(self._pace.steps + self._publisher.count, self._pace.patience_s)

    @ray.method(concurrency_group="health")
    def checkpoint(self) -> None:
        """Rank 0: have the step that is under way followed by a step checkpoint."""
        self._checkpoint_asked.set()
