"""A denoise group on this machine with one process per rank, without a launcher and without Ray.

    parent                              rank 0                          ranks 1 ...
      spawn all ranks                     starts the rendezvous store
      send its address to every rank      joins                           join
      wait for the choices of rank 0
      send a job to every rank            step                            step
      receive latents after each step
      send True or False to every rank    next step, or end of the job    next step, or end of the job

The parent answers after every step, so that all ranks stop at the same step. If all ranks refuse a job with the same
error, as for latents that are not finite, they wait for the next job. Any other failure of a rank stops all ranks,
because the others would wait in a collective for a lost peer. In both cases the parent raises the error of the rank. A
rank exits at its next step if the parent has exited.
"""

from __future__ import annotations

import pickle
import signal
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from hv_batch.engine.determinism import make_deterministic
from hv_batch.engine.parallel.process_group import leave_group
from hv_batch.engine.rank_failures import (
    JOB_ERRORS,
    RankFailed,
    RankFailure,
    RankTraceback,
    exit_error,
    exit_if_imported_by_a_rank,
)
from hv_batch.protocol import Device, ParallelPlan, RankSpec, UserError
from hv_batch.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hv_batch.engine.hunyuan import HunyuanVideo
    from hv_batch.engine.text_encoders import TextEmbedding

HOST = "127.0.0.1"
# For joining and for each collective. On a slow disk, one rank may still read its 26 GB while the others wait.
TIMEOUT_S = 1800.0
# After a rank has failed, its peers report errors of their own shortly afterwards. The parent waits this long for these
# errors before it raises the earliest one.
PEER_ERRORS_S = 0.5
PEERS_AGREE_S = 10.0  # the same, if the error may be one that all ranks raise; slow ranks need time to reach that step
EXIT_S = 5.0  # a rank whose link is closed exits within this time, with its exit code
CLOSE_S = 10.0  # an idle rank exits at once; a rank that is still running after this time is killed


class LocalGroup:
    """The processes of one parallel plan, which denoise together.

    The ranks are spawned processes, so a script that creates a group needs the `if __name__ == "__main__"` guard.
    An error of a rank is raised in the parent, with its class and message and the rank's traceback as its cause. Raises
    UserError if the degrees do not divide the model, a rank cannot load it or the guard is missing, and RankFailed if a
    rank dies.
    """

    def __init__(
        self,
        engine: HunyuanVideo,
        device: Device,
        plan: ParallelPlan,
        *,
        reproduce_seed: int | None = None,
    ) -> None:
        """Start all ranks and wait until they have loaded the model and joined.

        Each rank calls `make_deterministic` with `reproduce_seed` if it is not None.
        """
        exit_if_imported_by_a_rank()
        if problems := engine.group_problems(plan):
            raise UserError("The model cannot run with this parallel plan: " + "; ".join(problems) + ".")
        self._is_ready = False
        self._is_idle = False  # whether all ranks have refused the last job and wait for the next one
        self._links: list[Connection] = []
        self._processes: list[Any] = []
        try:
            for rank in range(plan.world_size):
                spec = RankSpec(
                    rank=rank,
                    local_rank=rank,
                    plan=plan,
                    device=device,
                    address="",
                    timeout_s=TIMEOUT_S,
                )
                self._start(engine, spec, reproduce_seed)
            address = self._receive_from_rank0()
            self._send_to_all(address)
            self._choices: Mapping[str, str] = self._receive_from_rank0()
            self._is_ready = True
        except BaseException:
            self.kill()
            raise

    @property
    def is_stopped(self) -> bool:
        """Whether the ranks have been stopped, by a failure or by `close`."""
        return not self._links

    def choices(self) -> Mapping[str, str]:
        """Return the values of the engine's open options that the ranks have chosen."""
        return self._choices

    def trajectory(
        self,
        batch: Sequence[SamplingParams],
        positives: Sequence[TextEmbedding],
        negatives: Sequence[TextEmbedding] | None,
    ) -> Generator[Tensor, None, None]:
        """Yield the latents of a batch of videos after each step, on the CPU; see `sampler.trajectory`.

        Closing the generator stops all ranks at that step, and the group can be used again. So it can if all ranks
        raise the same one of JOB_ERRORS. Any other error stops the group.
        """
        self._is_idle = False
        self._send_to_all((batch, positives, negatives))
        try:
            for _ in range(batch[0].num_inference_steps):
                yield torch.from_numpy(self._receive_from_rank0())
                self._send_to_all(True)
        except GeneratorExit:  # raised at the yield, when all ranks wait for an answer
            self._send_to_all(False)
            raise
        except BaseException:
            if not self._is_idle:
                self.kill()
            raise

    def close(self) -> None:
        """Stop the ranks. May be called twice, and after a failure."""
        for link in self._links:
            with suppress(OSError):  # the rank has already exited
                _send(link, None)
        deadline = time.monotonic() + CLOSE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill all ranks at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for link in self._links:
            link.close()
        self._links, self._processes = [], []

    def _start(self, engine: HunyuanVideo, spec: RankSpec, reproduce_seed: int | None) -> None:
        context = get_context("spawn")  # threads and a CUDA context do not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(engine, spec, theirs, reproduce_seed), daemon=True)
        process.start()
        theirs.close()  # so that the pipe closes when the process exits
        self._links.append(ours)
        self._processes.append(process)

    def _send_to_all(self, message: Any) -> None:
        if not self._links:
            raise RankFailed("this group has been stopped after a failure or by close(); create a new one")
        for link in self._links:
            with suppress(OSError):  # that rank has exited; `_receive_from_rank0` raises its error
                _send(link, message)

    def _receive_from_rank0(self) -> Any:
        """Return the next message of rank 0. The other ranks send failures only. Raises if any rank has failed."""
        while self._links:
            for link in connection.wait(self._links):
                assert isinstance(link, Connection)
                message = _receive_or_none(link)
                if message is None or isinstance(message, RankFailure):
                    self._fail(self._links.index(link), message)
                return message
        raise RankFailed("this group has been stopped after a failure or by close(); create a new one")

    def _fail(self, rank: int, failure: RankFailure | None) -> NoReturn:
        """Raise the error of the rank that failed first, and stop all ranks unless all have ended this job alike.

        A rank that exited without a report counts as the first, because its exit is the likely cause of the others.
        """
        failures = {rank: failure}
        deadline = time.monotonic() + (PEERS_AGREE_S if failure and failure.ends_job_only else PEER_ERRORS_S)
        while waiting := [link for other, link in enumerate(self._links) if other not in failures]:
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            for link in ready:
                assert isinstance(link, Connection)
                message = _receive_or_none(link)
                if message is None or isinstance(message, RankFailure):
                    failures[self._links.index(link)] = message
            if not ready:
                break
        failed_at = {one: report.at if report else 0.0 for one, report in failures.items()}
        first = min(failed_at, key=lambda one: failed_at[one])
        cause, process = failures[first], self._processes[first]
        reports = [report for report in failures.values() if report and report.ends_job_only]
        self._is_idle = len(reports) == len(self._links) and len({report.summary for report in reports}) == 1
        if not self._is_idle:
            if cause is None:
                process.join(EXIT_S)
            self.kill()
        if cause is None:
            raise exit_error(first, process.exitcode, has_started=self._is_ready)
        if cause.error is None:
            raise RankFailed(f"rank {first} failed first: {cause.summary}") from RankTraceback(cause.traceback)
        if isinstance(cause.error, UserError):
            raise cause.error
        raise cause.error from RankTraceback(f"rank {first} of the group:\n{cause.traceback}")


def _serve(engine: HunyuanVideo, spec: RankSpec, link: Connection, reproduce_seed: int | None) -> None:
    """Run one rank: the main function of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent handles it
    try:
        if reproduce_seed is not None:
            make_deterministic(reproduce_seed)
        if spec.rank == 0:
            _send(link, engine.host_rendezvous(HOST, spec.plan.world_size))
        denoiser = engine.join(replace(spec, address=_receive(link)))
        if spec.rank == 0:  # `join` returns on all ranks at the same time
            _send(link, denoiser.choices())
        while (job := _receive(link)) is not None:
            try:
                for latents in denoiser.trajectory(*job):
                    if spec.rank == 0:
                        _send(link, latents.cpu().numpy())
                    if not _receive(link):
                        break
            except JOB_ERRORS as error:
                _send(link, RankFailure.of(error, ends_job_only=True))
        leave_group()
    except (EOFError, BrokenPipeError):
        return  # the parent has exited
    except BaseException as error:  # noqa: BLE001  # the parent must be able to report any error
        with suppress(OSError):
            _send(link, RankFailure.of(error))


# Messages are pickled here, because Connection.send would pass tensors in shared memory, which is freed when the sender
# exits.


def _send(link: Connection, message: Any) -> None:
    link.send_bytes(pickle.dumps(message))


def _receive(link: Connection) -> Any:
    return pickle.loads(link.recv_bytes())


def _receive_or_none(link: Connection) -> Any:
    """Return the next message, or None if the process has exited without one."""
    try:
        return _receive(link)
    except (EOFError, OSError):
        return None
