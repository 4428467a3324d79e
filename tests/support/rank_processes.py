"""How the processes of a test become the ranks of a group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.multiprocessing as mp

from hv_batch.engine.parallel.process_group import host_store, join_group, leave_group
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.protocol import ParallelPlan, RankSpec

TIMEOUT_S = 120.0  # of a rank that waits for another; a busy machine takes its time


@contextmanager
def joined(rank: int, plan: ParallelPlan, addresses: mp.Queue) -> Iterator[SequenceMesh]:
    """On the CPU, over gloo. Rank 0 tells the others through `addresses`, which serves one group, where they meet."""
    if rank == 0:
        address = host_store("127.0.0.1", plan.world_size)
        for _ in range(plan.world_size - 1):
            addresses.put(address)
    else:
        address = addresses.get()
    spec = RankSpec(rank=rank, local_rank=rank, plan=plan, device="cpu", address=address, timeout_s=TIMEOUT_S)
    yield join_group(spec)
    leave_group()
