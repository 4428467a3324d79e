"""A denoise group on this machine, one process a rank, without a launcher and without Ray.

    parent                              rank 0                          ranks 1 ...
      spawn all                           opens the meeting point
      its address to every rank           joins                           join
      wait for "ready"
      job to every rank                   step                            step
      latents after each step
      "go on" or "stop" to every rank     next step, or end of the job    next step, or end of the job

The parent answers every step, so that all ranks stop at the same one. The first failure of any rank ends all of them:
the others would wait in a collective for a peer that is gone. A rank whose parent is gone ends at its next step.
"""

from __future__ import annotations

import pickle
import signal
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from hv_batch.engine.determinism import make_deterministic
from hv_batch.engine.parallel.process_group import leave_group
from hv_batch.protocol import Device, ParallelPlan, RankSpec, SamplingParams, UserError

if TYPE_CHECKING:
    from hv_batch.engine.hunyuan import HunyuanVideo
    from hv_batch.engine.text_encoders import TextEmbedding

HOST = "127.0.0.1"
# Of joining, and of each collective: a slow disk may keep one rank reading its 26 GB while the others wait.
TIMEOUT_S = 1800.0
# When a rank fails, its peers' own errors arrive within moments; this is how long they may take to be heard before the
# earliest is chosen.
COLLATERAL_S = 0.5
CLOSE_S = 10.0  # an idle rank ends at once; one that has not by then is busy, and is killed


class RankFailed(RuntimeError):  # noqa: N818
    """A rank failed, and with it the group; the text has the rank's traceback."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """The last words of a rank."""

    at: float  # time.monotonic(), one clock for all processes of a machine
    told: str  # its traceback, or the text of a UserError
    is_users: bool


class LocalGroup:
    """The processes of one plan, which denoise together.

    As with all spawned processes, a script that makes a group needs the `if __name__ == "__main__"` guard. Raises
    UserError when the degrees do not fit the model or a rank cannot load, RankFailed when one fails.
    """

    def __init__(
        self,
        engine: HunyuanVideo,
        device: Device,
        plan: ParallelPlan,
        *,
        reproduce_seed: int | None = None,
    ) -> None:
        """Start all ranks and wait until they have loaded and met; `reproduce_seed` is of `make_deterministic`."""
        if found := engine.group_problems(plan):
            raise UserError("The model cannot be shared out like this: " + "; ".join(found) + ".")
        self._links: list[Connection] = []
        self._processes: list[Any] = []
        try:
            for rank in range(plan.world_size):
                place = RankSpec(
                    rank=rank,
                    local_rank=rank,
                    plan=plan,
                    device=device,
                    address="",
                    timeout_s=TIMEOUT_S,
                )
                self._start(engine, place, reproduce_seed)
            address = self._hear()
            self._tell(address)
            self._hear()
        except BaseException:
            self.kill()
            raise

    def trajectory(
        self,
        batch: Sequence[SamplingParams],
        positives: Sequence[TextEmbedding],
        negatives: Sequence[TextEmbedding] | None,
    ) -> Generator[Tensor, None, None]:
        """The latents of videos that are denoised side by side, after each step, on the CPU; see `sampler.trajectory`.

        Closing the iterator stops all ranks at that step, and the group can be used again. Any error ends the group.
        """
        self._tell((batch, positives, negatives))
        try:
            for _ in range(batch[0].num_inference_steps):
                yield torch.from_numpy(self._hear())
                self._tell(True)
        except GeneratorExit:  # thrown in where the ranks wait for an answer
            self._tell(False)
            raise
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """End the ranks. Safe to call twice, and after a failure."""
        for link in self._links:
            with suppress(OSError):  # it has ended already
                _send(link, None)
        deadline = time.monotonic() + CLOSE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for link in self._links:
            link.close()
        self._links, self._processes = [], []

    def _start(self, engine: HunyuanVideo, place: RankSpec, reproduce_seed: int | None) -> None:
        context = get_context("spawn")  # a forked child would inherit threads and a CUDA context that do not survive it
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(engine, place, theirs, reproduce_seed), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._links.append(ours)
        self._processes.append(process)

    def _tell(self, message: Any) -> None:
        if not self._links:
            raise RankFailed("this group has ended; make another")
        for link in self._links:
            with suppress(OSError):  # that rank has ended: `_hear` learns why
                _send(link, message)

    def _hear(self) -> Any:
        """The next message of rank 0, for the others speak only to say why they end. Raises for the first failure."""
        while True:
            for link in connection.wait(self._links):
                assert isinstance(link, Connection)
                message = _last_words(link)
                if message is None or isinstance(message, _Failure):
                    self._fail(self._links.index(link), message)
                return message

    def _fail(self, rank: int, words: _Failure | None) -> NoReturn:
        """End all ranks and raise for the one that failed first; one that died without a word is the likely cause."""
        failures = {rank: words}
        deadline = time.monotonic() + COLLATERAL_S
        while waiting := [link for other, link in enumerate(self._links) if other not in failures]:
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            for link in ready:
                assert isinstance(link, Connection)
                message = _last_words(link)
                if message is None or isinstance(message, _Failure):
                    failures[self._links.index(link)] = message
            if not ready:
                break
        said_at = {one: last.at if last else 0.0 for one, last in failures.items()}
        first = min(said_at, key=lambda one: said_at[one])
        cause, process = failures[first], self._processes[first]
        process.join(COLLATERAL_S)
        self.kill()
        if cause is None:
            raise RankFailed(
                f"rank {first} died without a word (exit code {process.exitcode}); when that is -9, the machine was "
                "probably out of memory"
            )
        if cause.is_users:
            raise UserError(cause.told)
        raise RankFailed(f"rank {first} failed first:\n{cause.told}")


def _serve(engine: HunyuanVideo, place: RankSpec, link: Connection, reproduce_seed: int | None) -> None:
    """One rank: the body of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent answers it
    try:
        if reproduce_seed is not None:
            make_deterministic(reproduce_seed)
        if place.rank == 0:
            _send(link, engine.host_rendezvous(HOST, place.plan.world_size))
        denoiser = engine.join(replace(place, address=_receive(link)))
        if place.rank == 0:  # joining ends for all ranks together
            _send(link, "ready")
        while (job := _receive(link)) is not None:
            for latents in denoiser.trajectory(*job):
                if place.rank == 0:
                    _send(link, latents.cpu().numpy())
                if not _receive(link):
                    break
        leave_group()
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except BaseException as error:  # noqa: BLE001  # whatever it was, the parent should say it
        is_users = isinstance(error, UserError)
        told = str(error) if is_users else traceback.format_exc()
        with suppress(OSError):
            _send(link, _Failure(time.monotonic(), told, is_users))


# Pickled here, because a Connection's own pickling would pass tensors as shared memory, which lives as its sender does.


def _send(link: Connection, message: Any) -> None:
    link.send_bytes(pickle.dumps(message))


def _receive(link: Connection) -> Any:
    return pickle.loads(link.recv_bytes())


def _last_words(link: Connection) -> Any:
    """The next message; None when the process has ended without one."""
    try:
        return _receive(link)
    except (EOFError, OSError):
        return None
