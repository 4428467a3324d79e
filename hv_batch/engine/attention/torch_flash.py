"""Finds out whether PyTorch's own flash attention was replaced in this process.

`torch.nn.attention.activate_flash_attention_impl("FA3")` registers another kernel for the operator that the kernel
"sdpa" calls, and so would any library that registers its own. Results would then be recorded as those of "sdpa".
"""

from __future__ import annotations

import re

import torch
from torch.nn import attention

_OPERATOR = "aten::_scaled_dot_product_flash_attention"
# The registration that the dispatcher uses for CUDA. Kernels in Python are boxed only, those of PyTorch also unboxed.
_IN_PYTHON = re.compile(r"^CUDA: registered at (?P<where>\S+) :: .*\[ boxed \]", re.MULTILINE)


def replaced_flash_attention() -> str | None:
    """Return what has replaced PyTorch's flash attention for CUDA in this process; None if nothing has."""
    current = getattr(attention, "current_flash_attention_impl", None)  # since PyTorch 2.11
    if current is not None and (name := current()):
        return str(name)
    found = _IN_PYTHON.search(torch._C._dispatch_dump(_OPERATOR))
    return f"a kernel that was registered at {found['where']}" if found else None


def replaced_problem() -> str | None:
    """Return the reason why results on CUDA would be recorded under the wrong kernel, and the remedy; None if not."""
    if (other := replaced_flash_attention()) is None:
        return None
    return (
        "PyTorch's own flash attention, which is the kernel 'sdpa' and also that of the text encoders, was replaced in "
        f"this process by {other}, so the videos would be recorded under the wrong kernel. Call "
        "torch.nn.attention.restore_flash_attention_impl(). For FlashAttention-3 or 4, choose attention 'fa3' or "
        "'fa4', which need no activation."
    )
