"""From an exception to a failure class: the one place that knows Ray's, torch's and the system's errors (design 6)."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from ray.exceptions import RayActorError, RayError, RayTaskError

from hv_batch.job.errors import Failure, FailureClass
from hv_batch.protocol import UserError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}

# torch.distributed raises plain RuntimeErrors; what it says of its transport is all there is to tell a lost peer from a
# fault of the model.
COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket|process group|store->|broken pipe", re.I)

# When several ranks of a gang fail at once, the others' errors are collateral: the most telling one speaks for all.
MOST_TELLING = (
    FailureClass.PREEMPTED,
    FailureClass.FATAL,
    FailureClass.GPU_OOM,
    FailureClass.POISON,
    FailureClass.INFRA,
)


class LatentsGoneError(Exception):
    """The final latents a decode was to start from are neither in the object store nor in the output root."""


# A lost input object surfaces as the consumer's own task error with a Ray error as its cause.
NOT_THE_SAMPLE = (RayError, MemoryError, ConnectionError, TimeoutError, LatentsGoneError)


def classify(error: BaseException, where: str = "") -> Failure:
    """The failure class of an exception that `ray.get` raised for a task of worker `where`."""
    if isinstance(error, RayTaskError):
        return _of_task(error.cause, str(error), where)  # Ray prints a task's error as the remote traceback
    if isinstance(error, RayActorError) and getattr(error, "preempted", False):
        return Failure(FailureClass.PREEMPTED, f"its node was preempted: {error}", where=where).trimmed()
    if isinstance(error, RayError):
        return Failure(FailureClass.INFRA, f"{type(error).__name__}: {error}", where=where).trimmed()
    return _of_task(error, "", where)


def worker_survives(error: BaseException) -> bool:
    """Whether the actor that raised is fit for another task: its own exception left it alive and its memory usable."""
    return isinstance(error, RayTaskError) and not isinstance(error.cause, RayError) and not _is_device_oom(error.cause)


def most_telling(failures: Sequence[Failure]) -> Failure:
    return min(failures, key=lambda failure: MOST_TELLING.index(failure.kind))


def _of_task(cause: BaseException, traceback: str, where: str) -> Failure:
    message = f"{type(cause).__name__}: {cause}"
    kind = FailureClass.POISON
    if isinstance(cause, UserError):
        kind, message = FailureClass.FATAL, str(cause)
    elif isinstance(cause, OSError) and cause.errno in DISK_FULL | REFUSED:
        kind = FailureClass.FATAL
    elif _is_device_oom(cause):
        kind = FailureClass.GPU_OOM
    elif isinstance(cause, NOT_THE_SAMPLE) or (isinstance(cause, RuntimeError) and COLLECTIVE.search(str(cause))):
        kind = FailureClass.INFRA
    return Failure(kind, message, traceback, where, begin_anew=isinstance(cause, LatentsGoneError)).trimmed()


def _is_device_oom(cause: BaseException) -> bool:
    return type(cause).__module__.startswith("torch") and type(cause).__name__ == "OutOfMemoryError"
