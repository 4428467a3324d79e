"""The self-check of a group on CUDA devices, with weights in every form, and damaged on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from hv_batch.architecture import DiTConfig
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.dit.offload import offload_blocks
from hv_batch.engine.parallel.process_group import host_store, join_group, leave_group
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.self_check import check_group
from hv_batch.protocol import ParallelPlan, RankSpec
from tests.support.dit_reference import keep_in_fp8, random_dit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = DiTConfig(hidden_size=1024, heads_num=8, mm_double_blocks_depth=2, mm_single_blocks_depth=3)
HELD = ["device", "blocks", "mapped", "fp8", "fp8 blocks"]


def held_model(held: str, device: torch.device, damaged: bool = False) -> HYVideoDiT:
    model = random_dit(CONFIG, seed=1).bfloat16().requires_grad_(False)
    if "fp8" in held:
        keep_in_fp8(model)
    if damaged:
        linear = model.get_submodule("single_blocks.0.linear2")
        linear.weight.data = linear.weight.data.flip(0)
    if held in ("device", "fp8"):
        return model.to(device)
    offload_blocks(model, device, pinned=held != "mapped")
    return model


@pytest.mark.parametrize("held", HELD)
def test_the_self_check_of_one_rank(held):
    """Design section 5: the check passes with offloaded and 8-bit weights, and refuses NaN."""
    device = torch.device("cuda", 0)
    check_group(held_model(held, device), SequenceMesh.single(), device)
    broken = held_model(held, device)
    broken.final_layer.linear.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        check_group(broken, SequenceMesh.single(), device)


def _rank_main(rank: int, folder, addresses: mp.Queue) -> None:
    if rank == 0:
        address = host_store("127.0.0.1", 2)
        addresses.put(address)
    else:
        address = addresses.get()
    spec = RankSpec(
        rank=rank, local_rank=rank, plan=ParallelPlan(ulysses_degree=2), device="cuda", address=address, timeout_s=120.0
    )
    mesh, device = join_group(spec), torch.device("cuda", rank)
    for held in HELD:
        check_group(held_model(held, device), mesh, device)
        try:
            check_group(held_model(held, device, damaged=rank == 1), mesh, device)
        except RuntimeError as error:
            (folder / f"{held}-{rank}").write_text(str(error))
    leave_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_self_check_of_two_ranks(tmp_path):
    """Design section 5, over NCCL: healthy weights in every form pass; damaged weights of one rank are detected."""
    context = mp.get_context("spawn")
    mp.start_processes(_rank_main, (tmp_path, context.Queue()), nprocs=2, start_method="spawn")
    for held in HELD:
        assert any("deviates from what rank" in path.read_text() for path in tmp_path.glob(f"{held}-*")), held
