"""Maps an exception to a failure class. Only this module interprets the errors of Ray, torch and the system."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from hv_batch import __version__
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.storage.errors import StorageError, StorageRefusedError, StorageUnavailableError
from hv_batch.protocol import DeviceError, UserError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}

# torch.distributed raises plain RuntimeErrors. Only the words about the transport distinguish a lost peer from a fault
# of the model.
COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket|process group|store->|broken pipe", re.I)

# After one of these errors the CUDA context of the process stays broken: every later task in it would fail.
DEVICE = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|uncorrectable ECC", re.I)

# If several ranks of a group fail together, most of the errors are consequences of one. The class that comes first here
# determines the failure of the group.
MOST_TELLING = (
    FailureClass.PREEMPTED,
    FailureClass.FATAL,
    FailureClass.GPU_OOM,
    FailureClass.POISON,
    FailureClass.OUTAGE,
    FailureClass.INFRA,
)

# Ray's text about an actor whose class or arguments could not be loaded, and about one of another version.
CODE = re.compile(r"^((?:ModuleNotFoundError|ImportError): .*|.*OtherVersionError: .*)$", re.M)


# Texts of Python and PyTorch about a node that has no more threads or host memory; they raise a plain RuntimeError.
HOST_LIMIT = re.compile(r"can't start new thread|can't allocate memory|not enough memory|Cannot allocate memory")


class LatentsGoneError(Exception):
    """The final latents that a decode needs are neither in the object store nor in the output root."""


class NodeError(Exception):
    """This node lacks something that another node may have: disk space for temporary files, a program, GPU memory."""


# Causes that lie outside the sample. Ray reports a lost input object as a task error whose cause is a Ray error.
NOT_THE_SAMPLE = (RayError, MemoryError, TimeoutError, LatentsGoneError, NodeError)


def classify(error: BaseException, where: str = "") -> Failure:
    """The failure for an exception that `ray.get` raised for a task of worker `where`."""
    if isinstance(error, RayTaskError):
        return _of_task(error.cause, str(error), where)  # str() of a RayTaskError is the remote traceback
    if isinstance(error, RayActorError) and getattr(error, "preempted", False):
        return Failure(FailureClass.PREEMPTED, f"its node was preempted: {error}", where=where).trimmed()
    if isinstance(error, RayActorError) and (found := CODE.search(str(error))):
        return Failure(FailureClass.FATAL, _describe_code(str(error), found[1]), where=where).trimmed()
    return Failure(FailureClass.INFRA, f"{type(error).__name__}: {error}", where=where).trimmed()


def _describe_code(text: str, reason: str) -> str:
    """The message for a node whose code is not the driver's, from Ray's text about an actor that died there."""
    node = re.search(r"ip=([^,)\s]+)", text)
    return (
        f"The code of this run cannot be used on the node {node[1] if node else '(unknown)'}: {reason.strip()}. Every "
        f"node needs hv_batch {__version__} with its dependencies, and the engine of the config. Install them in the "
        "image of the nodes, or submit the run with `ray job submit --runtime-env jobs/runtime_env.yaml`."
    )


def worker_survives(error: BaseException) -> bool:
    """Whether the actor can run another task after this error.

    True if the task raised an exception that leaves the device usable, or if the task did not start because an input
    was lost.
    """
    if not isinstance(error, RayTaskError) or isinstance(error.cause, RayError):
        return input_was_lost(error)
    return not _is_device_oom(error.cause) and not _is_device_fault(error.cause)


def input_was_lost(error: BaseException) -> bool:
    """Whether the task did not start because one of its input objects was lost with a node."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, ObjectLostError)


def is_device_fault(error: BaseException) -> bool:
    """Whether the GPU of the task failed. Such a failure counts against the node."""
    return isinstance(error, RayTaskError) and _is_device_fault(error.cause)


def is_node_fault(error: BaseException) -> bool:
    """Whether the node of the task lacks something that another node may have."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, NodeError)


def is_collateral(error: BaseException) -> bool:
    """Whether the error of a rank is a broken collective. Another rank caused it, so it does not count against the node
    of this one.
    """
    return isinstance(error, RayTaskError) and _is_collective(error.cause)


def most_telling(failures: Sequence[Failure]) -> Failure:
    """The failure that represents several simultaneous ones of a group, by the order of `MOST_TELLING`."""
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
            remedy = "free space there" if cause.errno in DISK_FULL else "correct this"
            if isinstance(cause, StorageRefusedError):
                remedy = "grant access to it"
            message = f"a store cannot be used: {_text_of(cause)}; {remedy}, or choose another output root"
    elif isinstance(cause, ObjectLostError):
        kind, message = FailureClass.PREEMPTED, f"the node that held its input is gone: {message}"
    elif isinstance(cause, NOT_THE_SAMPLE) or _is_host_limit(cause) or _is_device_fault(cause) or _is_collective(cause):
        kind = FailureClass.INFRA
    else:
        kind = FailureClass.POISON
    if kind is FailureClass.FATAL:  # the user fixes it by the message; a traceback of this package does not help
        traceback = ""
    return Failure(kind, message, traceback, where, begin_anew=isinstance(cause, LatentsGoneError)).trimmed()


def _of_system(cause: OSError) -> FailureClass:
    """The class of an error of a store, or of the operating system. Neither is the fault of the sample."""
    if isinstance(cause, StorageUnavailableError):
        return FailureClass.OUTAGE
    return FailureClass.FATAL if isinstance(cause, StorageError) else FailureClass.INFRA


def _text_of(cause: OSError) -> str:
    """The message of a StorageError, which begins with the URL of the store, without the number of the error."""
    return str(cause.strerror or cause)


def _is_host_limit(cause: BaseException) -> bool:
    return isinstance(cause, RuntimeError) and HOST_LIMIT.search(str(cause)) is not None


def _is_collective(cause: BaseException) -> bool:
    return isinstance(cause, RuntimeError) and COLLECTIVE.search(str(cause)) is not None


def _is_device_oom(cause: BaseException) -> bool:
    return type(cause).__module__.startswith("torch") and type(cause).__name__ == "OutOfMemoryError"


def _is_device_fault(cause: BaseException) -> bool:
    if _is_device_oom(cause):
        return False
    return isinstance(cause, DeviceError) or (isinstance(cause, RuntimeError) and bool(DEVICE.search(str(cause))))
