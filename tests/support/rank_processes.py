"""Joins the processes of a test to a process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.multiprocessing as mp

from hv_batch.engine.parallel.process_group import host_store, join_group, leave_group
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.protocol import ParallelPlan, RankSpec

TIMEOUT_S = 120.0  # of joining and of each collective; large, because the test machine may be busy


@contextmanager
def joined(rank: int, plan: ParallelPlan, addresses: mp.Queue) -> Iterator[SequenceMesh]:
    """Join a group on the CPU over gloo, and leave it at the end of the context.

    Rank 0 sends the address of the rendezvous store to the other ranks through `addresses`, a queue for one group.
    """
    if rank == 0:
        address = host_store("127.0.0.1", plan.world_size)
        for _ in range(plan.world_size - 1):
            addresses.put(address)
    else:
        address = addresses.get()
    spec = RankSpec(rank=rank, local_rank=rank, plan=plan, device="cpu", address=address, timeout_s=TIMEOUT_S)
    yield join_group(spec)
    leave_group()
