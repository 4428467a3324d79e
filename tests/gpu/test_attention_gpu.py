"""Attention on GPUs: the kernels at the released head size, and xfuser's long-context attention against native."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from hv_batch.architecture import DiTConfig
from hv_batch.attention_kernels import candidates
from hv_batch.attention_methods import QuantizedAttention, SparseAttention
from hv_batch.engine.attention.block_sparse import SparseKernel
from hv_batch.engine.attention.flex_blocks import check_backend
from hv_batch.engine.attention.kernels import KERNELS, attend_math, attend_sdpa, choose_kernel, kernel_problem, merge
from hv_batch.engine.attention.quantized import check_quantized, choose_quantized
from hv_batch.engine.attention.token_order import block_layout
from hv_batch.engine.kernel_choice import choose_for_group
from hv_batch.engine.parallel.process_group import host_store, join_group, leave_group
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.parallel.xfuser import XfuserAttention
from hv_batch.protocol import ParallelPlan, RankSpec, UserError
from tests.support.dit_reference import random_dit, random_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDE = DiTConfig(hidden_size=1024, heads_num=8, mm_double_blocks_depth=1, mm_single_blocks_depth=1, text_states_dim=64)
PLANS = [(2, 1), (1, 2)]


@pytest.mark.parametrize("name", [name for name in sorted(KERNELS) if name != "math"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_merge_to_the_whole(name, dtype):
    """Design section 5: the log-sum-exp is correct for strided inputs, so that partial results merge exactly."""
    torch.manual_seed(0)
    if problem := kernel_problem(name, torch.device("cuda", 0), dtype):
        pytest.skip(problem)
    kernel = choose_kernel(name, torch.device("cuda", 0), dtype)
    q, k, v = torch.randn(1000, 3, 8, 128, device="cuda").to(dtype).unbind(1)
    expected, expected_lse = attend_math(q, k, v)
    whole, lse = kernel(q, k, v)
    (first, first_lse), second = kernel(q, k[:333], v[:333]), kernel(q, k[333:], v[333:])
    merged, merged_lse = merge(first.float(), first_lse, *second)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 3e-3
    for out, out_lse in ((whole, lse), (merged, merged_lse)):
        assert (out.float() - expected.float()).abs().max().item() <= tolerance
        assert (out_lse - expected_lse).abs().max().item() <= 1e-3
    assert torch.equal(whole, kernel(q, k, v)[0])
    assert KERNELS[name] is kernel


def test_auto_chooses_the_fastest_kernel_of_this_gpu():
    """`attention: auto` takes the first kernel of the table that this process can run."""
    device = torch.device("cuda", 0)
    model = random_dit(WIDE, seed=1).to(device, torch.bfloat16)
    names = candidates(torch.cuda.get_device_capability(device)[0], is_half=True)
    able = [name for name in names if kernel_problem(name, device, torch.bfloat16) is None]
    assert choose_for_group(model, SequenceMesh.single(), device) == able[0]


@pytest.mark.skipif(not hasattr(torch.nn.attention, "restore_flash_attention_impl"), reason="needs a newer PyTorch")
def test_an_activated_kernel_is_not_recorded_as_sdpa():
    """P3: after `activate_flash_attention_impl`, `sdpa` is refused; after the restoration it has its bits again."""
    device, q = torch.device("cuda", 0), torch.randn(300, 8, 128, device="cuda", dtype=torch.bfloat16)
    before = choose_kernel("sdpa", device, q.dtype)(q, q, q)[0]
    for name in torch.nn.attention.list_flash_attention_impls():
        try:
            torch.nn.attention.activate_flash_attention_impl(name)
        except (ImportError, RuntimeError):
            continue  # its package is not installed
        assert name in str(kernel_problem("sdpa", device, q.dtype))
        torch.nn.attention.restore_flash_attention_impl()
    assert torch.equal(choose_kernel("sdpa", device, q.dtype)(q, q, q)[0], before)


@pytest.mark.parametrize("backend", ["flex", "flex-flash"])
@pytest.mark.parametrize("text", [1, 77, 256])
def test_compiled_sparse_attention_equals_the_reference(backend, text):
    """flex_attention attends to the chosen blocks only, with its log-sum-exp, for sizes that blocks do not divide."""
    options, device = SparseAttention(density=0.3, backend=backend), torch.device("cuda")
    try:
        check_backend(backend, options.block, device)
    except UserError as error:
        pytest.skip(str(error))
    grid = (9, 21, 38)
    layout = block_layout(grid, options.brick, options.neighbours, device)
    torch.manual_seed(0)
    q, k, v = torch.randn(text + layout.tokens, 3, 4, 128, device=device).bfloat16().unbind(1)
    out, lse = SparseKernel(options, layout, text, attend_sdpa)(2 * q, k, v)
    expected, expected_lse = SparseKernel(replace(options, backend="eager"), layout, text, attend_sdpa)(2 * q, k, v)
    assert ((out - expected).float().norm() / expected.float().norm()).item() <= 2e-2
    assert (lse - expected_lse).abs().max().item() <= 1e-2


@pytest.mark.parametrize(("qk", "backend"), [("int8", "sage"), ("fp8", "fa3")])
def test_8_bit_kernels_equal_the_reference(qk, backend):
    """The kernels have the error of the reference against float32, and the same log-sum-exp."""
    options = QuantizedAttention(qk=qk, backend=backend)
    try:
        check_quantized(options, torch.device("cuda"), torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    q, k, v = torch.randn(1000, 3, 8, 128, device="cuda").bfloat16().unbind(1)
    k, v = k + 4 * torch.randn(8, 128, device="cuda").bfloat16(), v + 1
    out, lse = choose_quantized(options)(q, k, v)
    expected, expected_lse = attend_math(q, k, v)
    assert ((out - expected).float().norm() / expected.float().norm()).item() <= 5e-2
    assert (lse - expected_lse).abs().max().item() <= 0.2


def _rank_main(rank: int, folder: Path, addresses: dict[tuple[int, int], mp.Queue]) -> None:
    for (u, r), queue in addresses.items():
        plan = ParallelPlan(ulysses_degree=u, ring_degree=r)
        if rank == 0:
            queue.put(host_store("127.0.0.1", 2))
        address = queue.get()
        queue.put(address)
        mesh = join_group(
            RankSpec(rank=rank, local_rank=rank, plan=plan, device="cuda", address=address, timeout_s=120.0)
        )
        model = random_dit(WIDE, seed=1).to("cuda", torch.bfloat16)
        given = random_inputs(WIDE, (3, 8, 8), [7, 12], seed=2, padded=12)  # 48 tokens, texts of two lengths
        inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
        native = model(**inputs, mesh=mesh)
        model.joint_attention = XfuserAttention(mesh)
        torch.save((native.cpu(), model(**inputs, mesh=mesh).cpu()), folder / f"u{u}r{r}-{rank}.pt")
        leave_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.skipif(find_spec("xfuser") is None, reason="needs the 'gpu' extra")
def test_xfuser_agrees_with_native_attention(tmp_path):
    """`sequence_parallel: xfuser` over NCCL equals native up to bfloat16 rounding, and both ranks have equal bits."""
    context = mp.get_context("spawn")
    addresses = {plan: context.Queue() for plan in PLANS}
    mp.start_processes(_rank_main, (tmp_path, addresses), nprocs=2, start_method="spawn")
    for u, r in PLANS:
        (native, xfuser), (_, other) = (torch.load(tmp_path / f"u{u}r{r}-{rank}.pt") for rank in range(2))
        assert torch.equal(xfuser, other)
        assert ((xfuser - native).float().norm() / native.float().norm()).item() <= 0.02
