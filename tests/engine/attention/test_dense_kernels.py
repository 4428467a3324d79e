"""Dense attention kernels: those of packages, and the order in which `attention: auto` tries them.

The packages need a GPU, so small modules with their interface stand in for them here; tests/gpu has the real ones.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.library import Library
from torch.nn import attention as torch_attention

from hv_batch.attention_kernels import AUTO, FASTEST, HALF_ONLY, PACKAGES, assumed_kernel, candidates
from hv_batch.engine.attention import kernels
from hv_batch.engine.attention.kernels import KERNELS, attend_math, kernel_problem
from hv_batch.engine.attention.torch_flash import replaced_flash_attention
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.protocol import UserError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def batched(q, k, v):
    """Attention in the layout of the packages: out [1, L, H, D], log-sum-exp [1, H, L]."""
    assert q.dim() == k.dim() == v.dim() == 4
    out, lse = attend_math(q[0], k[0], v[0])
    return out[None], lse.T[None]


def fa3(calls):
    def flash_attn_func(q, k, v, softmax_scale=None, num_splits=1, return_attn_probs=False):
        calls.append(num_splits)
        return batched(q, k, v) if return_attn_probs else batched(q, k, v)[0]

    return flash_attn_func


def fa3_before_2025_08(calls):
    def flash_attn_func(q, k, v, softmax_scale=None, num_splits=0):
        calls.append(num_splits)
        return batched(q, k, v)

    return flash_attn_func


def fa4(calls):
    def flash_attn_func(q, k, v, *, num_splits=0, return_lse=False):
        calls.append(num_splits)
        return batched(q, k, v) if return_lse else (batched(q, k, v)[0], None)

    return flash_attn_func


PACKAGE_CASES = {
    "fa3": ("fa3", "flash_attn_interface", fa3),
    "fa3 before 2025-08": ("fa3", "flash_attn_interface", fa3_before_2025_08),
    "fa4": ("fa4", "flash_attn.cute", fa4),
}


@pytest.mark.parametrize(("name", "module", "make"), list(PACKAGE_CASES.values()), ids=list(PACKAGE_CASES))
def test_package_kernels_return_the_log_sum_exp_and_sum_in_one_order(monkeypatch, name, module, make):
    """P3: one split, so that the order of the sums is fixed. Results have the shapes of the other kernels."""
    calls = []
    for part in ("flash_attn", module):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[module].flash_attn_func = make(calls)
    q, k, v = torch.randn(70, 3, 3, 16).unbind(1)
    out, lse = KERNELS[name](q, k[:33], v[:33])
    expected_out, expected_lse = attend_math(q, k[:33], v[:33])
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    assert calls == [1]


@pytest.mark.parametrize("name", sorted(HALF_ONLY))
def test_gpu_kernels_say_why_they_cannot_run(monkeypatch, name):
    """P6: the error names the kernel, what it needs, and another kernel."""
    assert "'sdpa'" in kernel_problem(name, CPU, torch.bfloat16)
    assert "half precision" in kernel_problem(name, CUDA, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    text = kernel_problem(name, CUDA, torch.bfloat16)
    if name in ("fa3", "fa4"):
        assert "8.6" in text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    if name in PACKAGES:
        assert PACKAGES[name] in kernel_problem(name, CUDA, torch.bfloat16)


def test_a_package_with_a_broken_build_is_a_reason(monkeypatch):
    """An undefined symbol of a library must not end a rank: another kernel may run."""

    def fail(_name):
        raise OSError("undefined symbol: _ZN3c104cuda")

    monkeypatch.setattr(kernels, "import_module", fail)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert "undefined symbol" in kernel_problem("fa3", CUDA, torch.bfloat16)


def test_sdpa_is_refused_if_another_kernel_has_replaced_it():
    """P3: a process in which FlashAttention-3 was activated must not record the kernel "sdpa". The CPU's is another
    operator."""
    assert replaced_flash_attention() is None
    assert kernel_problem("sdpa", CUDA, torch.bfloat16) is None

    class Handle:
        def remove(self):
            pass

    torch_attention.register_flash_attention_impl("FA-test", register_fn=lambda: Handle())
    torch_attention.activate_flash_attention_impl("FA-test")
    try:
        assert "replaced in this process by FA-test" in kernel_problem("sdpa", CUDA, torch.bfloat16)
        assert kernel_problem("sdpa", CPU, torch.bfloat16) is None
        assert kernel_problem("sdpa", CUDA, torch.float32) is None
        with pytest.raises(UserError, match="restore_flash_attention_impl"):
            HunyuanVideo(model_base="nowhere").text_encoder("cuda")
        with pytest.raises(UserError, match="restore_flash_attention_impl"):
            kernels.choose_kernel("sdpa", CUDA, torch.bfloat16)
    finally:
        torch_attention.restore_flash_attention_impl()
    assert replaced_flash_attention() is None


def test_a_kernel_registered_without_activation_is_found_as_well():
    library = Library("aten", "IMPL", "CUDA")
    library.impl("_scaled_dot_product_flash_attention", lambda *_args, **_options: None, "CUDA")
    assert "registered at" in str(replaced_flash_attention())
    del library
    assert replaced_flash_attention() is None


def test_the_order_of_auto_ends_with_a_kernel_that_always_runs():
    """Every device has a kernel without packages, and every kernel of the table exists."""
    for major in (None, 7, 8, *FASTEST):
        for is_half in (True, False):
            names = candidates(major, is_half=is_half)
            assert set(names) <= KERNELS.keys()
            assert names[-1] == "sdpa"
            if not is_half:
                assert names == ("sdpa",)
    assert candidates(None, is_half=True) == ("sdpa",)
    assert candidates(9, is_half=True)[0] == "fa3"
    assert candidates(10, is_half=True)[0] == "fa4"


def test_a_plan_assumes_a_kernel_without_packages():
    assert assumed_kernel(AUTO, 9) == "cudnn"
    assert assumed_kernel(AUTO, 8) == "sdpa"
    assert assumed_kernel(AUTO, 9, is_half=False) == "sdpa"
    assert assumed_kernel("fa3", 9) == "fa3"


def test_half_precision_kernels_are_refused_in_float32_before_anything_loads():
    for name in HALF_ONLY:
        with pytest.raises(UserError, match="half precision only"):
            HunyuanVideo(model_base="nowhere", precision="fp32", attention=name)
