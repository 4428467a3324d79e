"""How the failure of a rank of a local group reaches the caller: with its own class and message."""

from __future__ import annotations

import pickle
import time
import traceback
from dataclasses import dataclass
from multiprocessing import current_process

from hv_batch.protocol import NonFiniteError, UserError

# Errors that the arguments of a job cause. If all ranks raise one, none of them waits for another.
JOB_ERRORS = (NonFiniteError, UserError, ValueError)

UNGUARDED = 79  # exit code of a rank that has imported a script without a main guard


class RankFailed(RuntimeError):  # noqa: N818  # a public name since 0.1.0
    """A rank died without an error that the parent could raise. The group has been stopped."""


class RankTraceback(Exception):  # noqa: N818  # the cause of another exception, not raised itself
    """The traceback of a rank, as text: the cause of the exception that the parent raises."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class RankFailure:
    """The error that a rank reports to the parent."""

    at: float  # time.monotonic(), which is one clock for all processes of a machine
    error: BaseException | None  # None if it cannot be pickled
    summary: str  # class and message of the error
    traceback: str
    ends_job_only: bool  # the rank waits for the next job; otherwise it exits

    @classmethod
    def of(cls, error: BaseException, *, ends_job_only: bool = False) -> RankFailure:
        summary = f"{type(error).__name__}: {error}"
        try:
            pickle.loads(pickle.dumps(error))  # a copy of this process's own error: tests that the parent can read it
            return cls(time.monotonic(), error, summary, traceback.format_exc(), ends_job_only)
        except Exception:  # noqa: BLE001  # the class of the error decides what pickling it raises
            return cls(time.monotonic(), None, summary, traceback.format_exc(), ends_job_only)


def exit_if_imported_by_a_rank() -> None:
    """End this process if it is a rank that is still importing the script that starts the ranks.

    A spawned process imports the main module first. Without the guard `if __name__ == "__main__":` it would start ranks
    of its own. The parent recognises the exit code and names the guard.
    """
    if getattr(current_process(), "_inheriting", False):
        raise SystemExit(UNGUARDED)


def exit_error(rank: int, exit_code: int | None, *, has_started: bool) -> Exception:
    """Return the error for a rank that has exited without a report. `has_started`: it had joined the group."""
    if exit_code == UNGUARDED:
        return UserError(
            "The processes of a group import the script that starts them, and this script starts a group when it is "
            'imported. Put its code below `if __name__ == "__main__":`.'
        )
    message = f"rank {rank} exited without reporting an error (exit code {exit_code})"
    if not has_started and exit_code == 1:
        return RankFailed(
            f"{message} before it had started; its own output above has the reason. A rank imports the main script, "
            'which must be a file with the guard `if __name__ == "__main__":`, not standard input'
        )
    return RankFailed(f"{message}; exit code -9 usually means that the machine ran out of memory")
