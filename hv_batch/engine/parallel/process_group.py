"""Joining and leaving the process group of one denoise group."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch exports them unmarked

from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.protocol import ParallelPlan, RankSpec

# The rendezvous stores of this process. A TCPStore stops when its object is freed, and the process groups of the other
# ranks stop with it.
_hosted: dict[str, TCPStore] = {}


def host_store(host: str, world_size: int) -> str:
    """Start the rendezvous store of a group and return its "host:port". Called on rank 0 only.

    One address can be used for one `join_group`. The operating system chooses the port while the store binds it, so no
    other process can take the port in between.
    """
    store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False, multi_tenant=True)
    address = f"{host}:{store.port}"
    _hosted[address] = store
    return address


def join_group(spec: RankSpec) -> SequenceMesh:
    """Join the process group of this rank's denoise group. Returns after all ranks have joined.

    Raises torch.distributed.DistError (a RuntimeError) if a rank is lost or `spec.timeout_s` passes first.
    """
    if spec.device == "cuda":
        torch.cuda.set_device(spec.local_rank)
    if spec.plan.world_size == 1:
        return SequenceMesh.single()
    timeout = timedelta(seconds=spec.timeout_s)
    host, port = spec.address.rsplit(":", 1)
    store = TCPStore(host, int(port), spec.plan.world_size, is_master=False, timeout=timeout, wait_for_workers=False)
    dist.init_process_group(
        "nccl" if spec.device == "cuda" else "gloo",
        store=PrefixStore("sequence-parallel", store),
        rank=spec.rank,
        world_size=spec.plan.world_size,
        timeout=timeout,
        device_id=torch.device("cuda", spec.local_rank) if spec.device == "cuda" else None,
    )
    mesh = _form_mesh(spec.plan, spec.rank, timeout)
    dist.barrier()
    return mesh


def _form_mesh(plan: ParallelPlan, rank: int, timeout: timedelta) -> SequenceMesh:
    """Return this rank's position in the branch x ring x Ulysses grid, with one process group per grid axis."""
    cfg, u, r = plan.cfg_degree, plan.ulysses_degree, plan.ring_degree
    grid = torch.arange(cfg * r * u).view(cfg, r, u)
    sequence = _own_subgroup(grid.view(cfg, r * u), rank, timeout) if cfg > 1 else dist.group.WORLD
    return SequenceMesh(
        rank=rank % (r * u),
        ulysses_degree=u,
        ring_degree=r,
        cfg_degree=cfg,
        branch=rank // (r * u),
        ulysses=_own_subgroup(grid.view(-1, u), rank, timeout),
        ring=_own_subgroup(grid.transpose(1, 2).reshape(-1, r), rank, timeout),
        sequence=sequence,
        cfg=_own_subgroup(grid.view(cfg, -1).T, rank, timeout),
        world=dist.group.WORLD,
    )


def _own_subgroup(partition: Tensor, rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """Create one process group per row of `partition` and return the group that contains `rank`.

    All ranks must create all groups in the same order. Returns None if the rows have one rank.
    """
    own = None
    for ranks in partition.tolist():
        if len(ranks) > 1:
            # A subgroup does not inherit the timeout; its default is 10 to 30 minutes.
            group = dist.new_group(ranks, timeout=timeout)
            own = group if rank in ranks else own
    return own


def leave_group() -> None:
    """Destroy the process group and any store hosted here. May be called twice, and after a failed join."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _hosted.clear()
