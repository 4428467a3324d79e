"""The actor of one rank of a denoise group. Each rank uses one GPU, or runs on the CPU."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, cast

import numpy as np
import ray

from hv_batch.job.failure import Failure
from hv_batch.job.log_records import log_fields
from hv_batch.job.manifest.samples import Sample
from hv_batch.job.records.choices import read_choices, record_choices
from hv_batch.job.records.latents import FinalLatents, put_latents, sample_identity
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.protocol import ParallelPlan, RankSpec, StepState
from hv_batch.runtime.groups.gpu_memory import await_free_memory
from hv_batch.runtime.groups.group_decode import RecordedDecode, record_decode
from hv_batch.runtime.groups.step_checkpoints import StepTimer, StepWriter, read_steps
from hv_batch.runtime.publisher import DecodedVideo, Publisher, Stages, scratch_folder
from hv_batch.runtime.run_context import (
    ProgressReport,
    PublishReport,
    RunContext,
    StageReport,
    see_output_root,
    stopwatch,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RankLocation:
    """The node and the GPUs of a rank. The ranks of a group need each other's locations to join."""

    node: str  # the id of the Ray node, because several nodes of a cluster may share an address
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """The answer of a rank that has joined its group."""

    warning: str = ""  # for the log of the run
    choices: Mapping[str, str] = field(default_factory=dict)  # of rank 0: those that the run has recorded now


@dataclass(frozen=True, slots=True)
class DenoiseTask:
    """One sample of a task, without its embeddings."""

    sample: Sample
    upstream: Mapping[str, StageReport]  # reports of the stages before the denoise
    attempt: int


@ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)
class RankActor:
    """One rank. Ray must not restart it, because it would have no process group: the driver rebuilds all ranks."""

    def __init__(self, context: RunContext, plan: ParallelPlan, rank: int, name: str) -> None:
        self._context = context
        self._plan = plan
        self._rank = rank
        context.configure_actor(f"{name}.rank{rank}")
        self._name = name
        self._timer = StepTimer()
        self._checkpoint_requested = Event()
        self._publisher = Publisher(context, name)  # used by rank 0 if the group decodes
        self._recording: RecordedDecode | Exception | None = None

    def location(self) -> RankLocation:
        gpus = tuple(str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
        return RankLocation(ray.get_runtime_context().get_node_id(), gpus)

    def host_rendezvous(self) -> str:
        """Rank 0: open the rendezvous store on a free port, and return its address.

        The port stays open until the group ends, so no other process can take it before the ranks join.
        """
        return self._context.engine.host_rendezvous(ray.util.get_node_ip_address(), self._plan.world_size)

    def recorded_choices(self) -> Mapping[str, str]:
        """Rank 0: the values of the engine's open options that the run has chosen; empty if it has not yet."""
        return read_choices(self._context.store)

    def join(self, address: str, reservation: Sequence[RankLocation], choices: Mapping[str, str]) -> Joined:
        """Load the weights, join the process group, and check that the group computes what one rank alone computes.

        `address` is that of the rendezvous store; `reservation` holds the location of every rank, in order. `choices`
        are the recorded ones. If there are none and the engine has open options, rank 0 records those of this group.
        """
        decodes, warning = self._context.run.groups_decode, ""
        if self._rank == 0:
            see_output_root(self._context.store)
            warning = self._publisher.check() if decodes else ""
        parallel = self._context.config.parallel
        neighbours = [
            rank for rank, location in enumerate(reservation) if location.node == reservation[self._rank].node
        ]
        if parallel.device == "cuda":
            # Every rank of a node must see the same GPUs in the same order, for peer-to-peer copies and NCCL's topology
            # detection. This takes effect because nothing initializes CUDA before the engine does.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for rank in neighbours for gpu in reservation[rank].gpus)
            self._await_own_gpu(neighbours.index(self._rank))
        timeouts = self._context.config.timeouts
        place = RankSpec(
            rank=self._rank,
            local_rank=neighbours.index(self._rank),
            plan=self._plan,
            device=parallel.device,
            address=address,
            # One rank may finish loading this much later than another. A hang in a collective is detected earlier, by
            # missing heartbeats.
            timeout_s=max(timeouts.start_s, timeouts.stall_s),
            decodes=decodes,
            choices=choices,
        )
        # A Denoiser, which has `choices` and `use_choices` if the engine has open options.
        self._denoiser = cast(Any, self._context.engine.join(place))
        self._denoiser.self_check()
        logger.info(f"rank {self._rank} of {self._plan.world_size} is ready")
        if self._rank == 0 and self._context.open_options and not choices:
            self._context.check_lease()
            choices = record_choices(
                self._context.store, self._denoiser.choices(), self._name, ray.util.get_node_ip_address()
            )
        return Joined(warning, choices if self._rank == 0 else {})

    def use_choices(self, choices: Mapping[str, str]) -> None:
        """Compute with the choices of the run, if another group has recorded its own while this one started.

        Every rank of the group must be called.
        """
        if choices != self._denoiser.choices():
            self._denoiser.use_choices(choices)
            self._denoiser.self_check()

    def _await_own_gpu(self, local_rank: int) -> None:
        if self._context.run.rank_gpus < 1:  # other processes may use this GPU as well
            return
        import torch  # not at the top: an engine on the CPU may not need torch

        where = f"GPU {local_rank} of this group on node {ray.util.get_node_ip_address()}"
        await_free_memory(lambda: torch.cuda.mem_get_info(local_rank), where)

    def read_steps(self, sample: Sample) -> StepState | None:
        """Rank 0: the step checkpoint of an earlier try, from the output root; None if there is none."""
        state = read_steps(self._context.store, sample, *self._context.sample_identities(sample))
        can_resume = getattr(self._denoiser, "can_resume", None)  # a state without `history` suits other engines
        is_usable = state and (can_resume(sample.params, state) if can_resume else not state.history)
        return state if is_usable else None

    def denoise(self, tasks: Sequence[DenoiseTask], *inputs: Any) -> Any:
        """Denoise the samples of a task. Every rank of the group must be called with the same arguments.

        `inputs` are the pairs of embeddings of all tasks, then the states from which they resume. They are separate
        arguments because Ray resolves only references that are arguments themselves. Rank 0 has read the states: if
        each rank read its own, they could differ.

        Rank 0 writes the final latents to the output root (P4), then returns them, [C, T, H, W] per task, followed by
        the list of reports. Other ranks return None.
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
        finally:  # an error of one sample must not discard the latents of the others
            # If the output root does not answer, the denoise is not lost: the latents are also returned.
            with suppress(StorageUnavailableError):
                put_latents(self._context.store, denoised)
        return *(own.latents for own in denoised), reports

    def _assist(self, sample: Sample, embeddings: tuple[Any, Any], resume: StepState | None) -> None:
        positive, negative = embeddings
        with self._timer.of(sample.params.num_inference_steps) as step_done:

            def on_step(done: int, _read: Callable[[], StepState], computed: int | None = None) -> None:
                step_done(done, computed)

            self._denoiser.denoise(sample.params, positive, negative, on_step, resume)

    def _denoise(
        self, task: DenoiseTask, embeddings: tuple[Any, Any], resume: StepState | None
    ) -> tuple[FinalLatents, StageReport]:
        context, sample = self._context, task.sample
        positive, negative = embeddings
        identity = sample_identity(sample, context.fingerprint)
        every = context.config.groups.checkpoint_every
        computed_steps: int | None = None
        logger.info(
            f"denoising {sample.params.num_inference_steps} steps" + (f" from step {resume.step}" if resume else "")
        )
        with (
            stopwatch() as watch,
            StepWriter(context.store, sample, identity, every, self._checkpoint_requested) as writer,
            self._timer.of(sample.params.num_inference_steps) as step_done,
        ):

            def on_step(done: int, read: Callable[[], StepState], computed: int | None = None) -> None:
                nonlocal computed_steps
                computed_steps = computed
                step_done(done, computed)
                writer.after_step(done, read)

            latents = self._denoiser.denoise(sample.params, positive, negative, on_step, resume)
        logger.info(f"denoised in {watch.seconds:.1f} s")
        details: dict[str, Any] = {"group": str(self._plan), "ranks": self._plan.world_size}
        details |= {"resumed_from_step": resume.step} if resume else {}
        details |= {"computed_steps": computed_steps} if computed_steps is not None else {}
        details |= self._denoiser.choices() if context.open_options else {}
        details |= {"checkpoints_failed": writer.failed} if writer.failed else {}
        report = StageReport(watch.seconds, ray.util.get_node_ip_address(), self._name, details)
        reports = {name: stage.to_dict() for name, stage in {**task.upstream, "denoise": report}.items()}
        return FinalLatents(sample, latents, identity, reports), report

    def find_latents(self, sample: Sample, stages: Stages | None) -> tuple[np.ndarray | None, Stages | None]:
        """Rank 0: the latents to decode, [C, T, H, W], and the reports of the stages before the decode.

        If `stages` is given, the caller has the latents, and None is returned in their place. Otherwise both are read
        from the output root. Returns (None, None) if the sample is already committed.
        """
        if self._publisher.is_committed(sample):
            return None, None
        self._folder = scratch_folder()
        return self._publisher.stored(sample) if stages is None else (None, stages)

    def decode(self, sample: Sample, latents: np.ndarray) -> None:
        """Every rank must be called with the same latents. Rank 0 writes the media file and keeps it for `publish`.

        After an error here, other ranks may be waiting in a collective: the group must be rebuilt.
        """
        frames = self._denoiser.decode(latents)
        if self._rank == 0:
            self._recording = record_decode(self._publisher, sample, frames, Path(self._folder.name))
        else:
            deque(frames, maxlen=0)

    def publish(self, sample: Sample, stages: Stages, failures: Sequence[Failure]) -> PublishReport:
        """Rank 0, after all ranks have decoded: commit the video.

        Raises the deferred error if rank 0 could not write the media file.
        """
        recording, self._recording = self._recording, None
        assert recording, "publish was called before decode"
        with self._folder:
            if isinstance(recording, Exception):
                raise recording
            logger.debug(f"decoded in {recording.seconds:.1f} s")
            made = DecodedVideo(sample, recording.media, recording.seconds, stages, failures)
            return self._publisher.publish([made])[0]

    @ray.method(concurrency_group="health", enable_task_events=False)  # called every second
    def progress(self) -> ProgressReport:
        return ProgressReport(self._timer.steps + self._publisher.count, self._timer.next_within_s)

    @ray.method(concurrency_group="health")
    def checkpoint(self) -> None:
        """Rank 0: request a step checkpoint after the current step."""
        self._checkpoint_requested.set()
