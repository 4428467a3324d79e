"""Waiting until the memory of a GPU is free, before 26 GB of weights are loaded (P4)."""

from __future__ import annotations

import pytest

from hv_batch.runtime.classify import NodeError
from hv_batch.runtime.groups.gpu_memory import await_free_memory

GIB = 2**30


def test_memory_that_comes_back_is_waited_for():
    """P4: a process that was just killed still holds its memory; that is no failure."""
    found = iter([(20 * GIB, 80 * GIB), (79 * GIB, 80 * GIB)])
    await_free_memory(lambda: next(found), "GPU 0")
    assert next(found, None) is None


def test_memory_that_somebody_keeps_is_the_nodes_fault():
    """P5: NodeError with free memory and GPU: it is INFRA, so the group is built elsewhere and no sample is charged."""
    with pytest.raises(NodeError, match=r"only 20\.0 of 80\.0 GiB of GPU 3 are free"):
        await_free_memory(lambda: (20 * GIB, 80 * GIB), "GPU 3", timeout_s=0.0)
