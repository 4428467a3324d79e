"""From an exception to a failure class: the one place that knows Ray's, torch's and the system's errors (design 6)."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.protocol import DeviceError, UserError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ECHILD}  # the node's limits

# torch.distributed raises plain RuntimeErrors; what it says of its transport is all there is to tell a lost peer from a
# fault of the model.
COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket|process group|store->|broken pipe", re.I)

# After one of these a process's CUDA context stays broken: every later task would fail in it.
DEVICE = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|uncorrectable ECC", re.I)

# When several ranks of a group fail at once, the others' errors are collateral: the most telling one speaks for all.
MOST_TELLING = (
    FailureClass.PREEMPTED,
    FailureClass.FATAL,
    FailureClass.GPU_OOM,
    FailureClass.POISON,
    FailureClass.OUTAGE,
    FailureClass.INFRA,
)


class LatentsGoneError(Exception):
    """The final latents a decode was to start from are neither in the object store nor in the output root."""


class NodeError(Exception):
    """What this node lacks to work (disk for temporary files, a program); another node may have it."""


# A lost input object surfaces as the consumer's own task error with a Ray error as its cause.
NOT_THE_SAMPLE = (RayError, MemoryError, TimeoutError, LatentsGoneError, NodeError)


def classify(error: BaseException, where: str = "") -> Failure:
    """The failure class of an exception that `ray.get` raised for a task of worker `where`."""
    if isinstance(error, RayTaskError):
        return _of_task(error.cause, str(error), where)  # Ray prints a task's error as the remote traceback
    if isinstance(error, RayActorError) and getattr(error, "preempted", False):
        return Failure(FailureClass.PREEMPTED, f"its node was preempted: {error}", where=where).trimmed()
    return Failure(FailureClass.INFRA, f"{type(error).__name__}: {error}", where=where).trimmed()


def worker_survives(error: BaseException) -> bool:
    """Whether the actor that raised is fit for another task.

    Its own exception left it alive, with a working device; or the task never began, because an input was lost.
    """
    if not isinstance(error, RayTaskError) or isinstance(error.cause, RayError):
        return input_was_lost(error)
    return not _is_device_oom(error.cause) and not _is_device_fault(error.cause)


def input_was_lost(error: BaseException) -> bool:
    """Whether the task never began because the object it was to work on is gone with a node."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, ObjectLostError)


def is_device_fault(error: BaseException) -> bool:
    """Whether it speaks of the GPU, so of its node."""
    return isinstance(error, RayTaskError) and _is_device_fault(error.cause)


def is_node_fault(error: BaseException) -> bool:
    """Whether its node lacks something that another may have."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, NodeError)


def is_collateral(error: BaseException) -> bool:
    """Whether a rank only says that its group fell apart, which says nothing of its own node."""
    return isinstance(error, RayTaskError) and _is_collective(error.cause)


def most_telling(failures: Sequence[Failure]) -> Failure:
    return min(failures, key=lambda failure: MOST_TELLING.index(failure.kind))


def _of_task(cause: BaseException, traceback: str, where: str) -> Failure:
    message = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, UserError):
        kind, message = FailureClass.FATAL, str(cause)
    elif _is_device_oom(cause):
        kind = FailureClass.GPU_OOM
    elif isinstance(cause, OSError):
        kind = _of_system(cause)
        if kind is FailureClass.FATAL:
            remedy = "free some space there" if cause.errno in DISK_FULL else "grant access to it"
            message = f"the output root cannot be written: {cause}; {remedy}, or choose another one"
    elif isinstance(cause, NOT_THE_SAMPLE) or _is_device_fault(cause) or _is_collective(cause):
        kind = FailureClass.INFRA
    else:
        kind = FailureClass.POISON
    if kind is FailureClass.FATAL:  # the user's to mend: where in our code it was found says nothing
        traceback = ""
    return Failure(kind, message, traceback, where, begin_anew=isinstance(cause, LatentsGoneError)).trimmed()


def _of_system(cause: OSError) -> FailureClass:
    if isinstance(cause, StorageUnavailableError):
        return FailureClass.OUTAGE
    if cause.errno in DISK_FULL | REFUSED:
        return FailureClass.FATAL
    if cause.errno in EXHAUSTED or isinstance(cause, ConnectionError | TimeoutError):
        return FailureClass.INFRA
    return FailureClass.POISON


def _is_collective(cause: BaseException) -> bool:
    return isinstance(cause, RuntimeError) and COLLECTIVE.search(str(cause)) is not None


def _is_device_oom(cause: BaseException) -> bool:
    return type(cause).__module__.startswith("torch") and type(cause).__name__ == "OutOfMemoryError"


def _is_device_fault(cause: BaseException) -> bool:
    if _is_device_oom(cause):
        return False
    return isinstance(cause, DeviceError) or (isinstance(cause, RuntimeError) and bool(DEVICE.search(str(cause))))
