"""Joining and leaving the process group of one denoise group."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch exports them unmarked

from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.protocol import ParallelPlan, RankSpec

# Rendezvous stores this process serves. A TCPStore dies with its object, and the other ranks' process groups with it.
_hosted: dict[str, TCPStore] = {}


def host_store(host: str, world_size: int) -> str:
    """Rank 0: open the group's meeting point and return its "host:port". One address serves one `join_group`.

    The operating system picks the port while the store binds it, so no other process can take it in between.
    """
    store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False, multi_tenant=True)
    address = f"{host}:{store.port}"
    _hosted[address] = store
    return address


def join_group(place: RankSpec) -> SequenceMesh:
    """Join the process group of this rank's denoise group; returns when every rank has.

    Raises torch.distributed.DistError (a RuntimeError) when a rank is lost or `timeout_s` passes first.
    """
    if place.device == "cuda":
        torch.cuda.set_device(place.local_rank)
    if place.plan.world_size == 1:
        return SequenceMesh.single()
    timeout = timedelta(seconds=place.timeout_s)
    host, port = place.address.rsplit(":", 1)
    store = TCPStore(host, int(port), place.plan.world_size, is_master=False, timeout=timeout, wait_for_workers=False)
    dist.init_process_group(
        "nccl" if place.device == "cuda" else "gloo",
        store=PrefixStore("sequence-parallel", store),
        rank=place.rank,
        world_size=place.plan.world_size,
        timeout=timeout,
        device_id=torch.device("cuda", place.local_rank) if place.device == "cuda" else None,
    )
    mesh = _form_mesh(place.plan, place.rank, timeout)
    dist.barrier()
    return mesh


def _form_mesh(plan: ParallelPlan, rank: int, timeout: timedelta) -> SequenceMesh:
    """This rank's place in the branch x ring x Ulysses grid of all ranks, with a process group for each line in it."""
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
    """Make a group of every row of `partition`, as all ranks must, in the same order; return the one of `rank`."""
    own = None
    for ranks in partition.tolist():
        if len(ranks) > 1:
            # A sub-group does not inherit the timeout, and would hang for its default of 10 to 30 minutes.
            group = dist.new_group(ranks, timeout=timeout)
            own = group if rank in ranks else own
    return own


def leave_group() -> None:
    """Give up the process group and any store hosted here. Safe to call twice, and after a failed join."""
    if dist.is_initialized():
        dist.destroy_process_group()
    _hosted.clear()
