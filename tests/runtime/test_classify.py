"""The failure class of each exception, and whether the worker survives it (P5)."""

from __future__ import annotations

import errno

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, ObjectLostError, RayTaskError, WorkerCrashedError

from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.storage.errors import StorageBrokenError, StorageRefusedError, StorageUnavailableError
from hv_batch.protocol import DeviceError, NonFiniteError, UserError
from hv_batch.runtime.classify import (
    LatentsGoneError,
    NodeError,
    classify,
    is_collateral,
    is_device_fault,
    is_node_fault,
    most_telling,
    worker_survives,
)
from hv_batch.runtime.worker import start_failure


class OutOfMemoryError(RuntimeError):
    """Has the name and module of torch's exception."""

    __module__ = "torch.cuda"


def raised_by_a_task(cause):
    return RayTaskError("denoise", "Traceback ...", cause, proctitle="x", pid=1, ip="127.0.0.1").as_instanceof_cause()


@pytest.mark.parametrize(
    ("cause", "kind", "survives"),
    [
        (ValueError("latents are not finite"), FailureClass.POISON, True),
        (RuntimeError("shape mismatch"), FailureClass.POISON, True),
        (OutOfMemoryError("CUDA out of memory"), FailureClass.GPU_OOM, False),
        (UserError("no such weights"), FailureClass.FATAL, True),
        (StorageBrokenError(errno.ENOSPC, "No space left on device"), FailureClass.FATAL, True),
        (StorageRefusedError(errno.EACCES, "denied"), FailureClass.FATAL, True),
        (PermissionError(errno.EACCES, "denied by this node"), FailureClass.INFRA, True),
        (OSError(errno.EIO, "of this node"), FailureClass.INFRA, True),
        (StorageUnavailableError("store is away"), FailureClass.OUTAGE, True),
        (ConnectionError("peer is away"), FailureClass.INFRA, True),
        (ChildProcessError(errno.ECHILD, "ffmpeg was killed by signal 9"), FailureClass.INFRA, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), FailureClass.INFRA, False),
        (DeviceError("self-check: rank 3 computes values that are not finite"), FailureClass.INFRA, False),
        (NonFiniteError("latents are not finite after step 3"), FailureClass.POISON, True),
        (NodeError("no space for temporary files"), FailureClass.INFRA, True),
        (TimeoutError("store is slow"), FailureClass.INFRA, True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), FailureClass.INFRA, True),
        (RuntimeError("NCCL error: unhandled system error"), FailureClass.INFRA, True),
        (RuntimeError("can't start new thread"), FailureClass.INFRA, True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                "tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
            ),
            FailureClass.INFRA,
            True,
        ),
        (ObjectLostError("ab" * 14, None, ""), FailureClass.PREEMPTED, True),
        (WorkerCrashedError(), FailureClass.INFRA, False),
        (LatentsGoneError("gone"), FailureClass.INFRA, True),
    ],
)
def test_task_errors_are_classified_by_their_cause(cause, kind, survives):
    """P5: only errors of the sample itself are POISON, none of a store or of the operating system; Ray reports a lost
    input as a task error of the consumer.
    """
    error = raised_by_a_task(cause)
    failure = classify(error, "denoise-0.0")
    assert failure.kind is kind
    assert failure.where == "denoise-0.0"
    assert (getattr(cause, "strerror", None) or str(cause)) in failure.message
    assert bool(failure.traceback) is (kind is not FailureClass.FATAL)
    assert worker_survives(error) is survives
    assert failure.begin_anew is isinstance(cause, LatentsGoneError)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (UserError("no such weights"), FailureClass.FATAL),
        (StorageUnavailableError("store is away"), FailureClass.OUTAGE),
        (ValueError("what is this"), FailureClass.INFRA),
        (OutOfMemoryError("CUDA out of memory"), FailureClass.INFRA),
    ],
)
def test_a_failed_start_counts_against_the_slot_unless_no_worker_could_start(cause, kind):
    """P5: a failed start charges no sample, and during an outage it does not count against the slot either."""
    assert start_failure(classify(raised_by_a_task(cause))).kind is kind


@pytest.mark.parametrize("error", [ActorDiedError(), NodeDiedError("node died")])
def test_lost_actors_and_nodes_are_infrastructure(error):
    """P5: a lost actor is INFRA."""
    assert classify(error).kind is FailureClass.INFRA
    assert not worker_survives(error)


def test_preemption_is_its_own_class():
    """P5: a preempted node does not count against the sample."""
    error = ActorDiedError()
    error._preempted = True
    assert error.preempted
    assert classify(error).kind is FailureClass.PREEMPTED


def test_collateral_errors_do_not_hide_the_cause():
    """Other ranks fail with connection errors; the rank with the cause determines the class, a preemption first."""
    infra, poison, preempted = (Failure(kind, kind) for kind in ("INFRA", "POISON", "PREEMPTED"))
    infra, poison, preempted = (Failure(FailureClass(f.kind), f.message) for f in (infra, poison, preempted))
    assert most_telling([infra, poison, infra]) is poison
    assert most_telling([infra, poison, preempted]) is preempted


@pytest.mark.parametrize(
    ("error", "device", "collateral"),
    [
        (raised_by_a_task(RuntimeError("CUDA error: uncorrectable ECC error encountered")), True, False),
        (raised_by_a_task(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")), False, True),
        (raised_by_a_task(DeviceError("self-check: rank 3 computes values that are not finite")), True, False),
        (raised_by_a_task(RuntimeError("no device works")), False, False),
        (raised_by_a_task(OutOfMemoryError("CUDA out of memory")), False, False),
        (ActorDiedError(), False, False),
    ],
)
def test_what_an_error_says_of_its_node(error, device, collateral):
    """P5: device faults and own errors of ranks count against a node, broken collectives do not."""
    assert is_device_fault(error) is device
    assert is_collateral(error) is collateral


@pytest.mark.parametrize(("cause", "is_fault"), [(NodeError("no ffmpeg"), True), (OSError(5, "input"), False)])
def test_faults_of_a_node_are_separated_from_faults_of_a_sample(cause, is_fault):
    """P5: a full disk for temporary files counts against the node; other errors of a decode do not."""
    assert is_node_fault(raised_by_a_task(cause)) is is_fault
    assert not is_node_fault(cause)
