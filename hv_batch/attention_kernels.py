"""The names of the attention kernels, and which one is the fastest on which device. Without torch.

The engine chooses by this table if the option `attention` is "auto", and the cost model assumes a kernel by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

AUTO = "auto"
DEFAULT = "sdpa"

# Kernels that compute in half precision only.
HALF_ONLY = ("fa3", "fa4", "cudnn", "flash")

# Kernels that need a package besides PyTorch.
PACKAGES: Mapping[str, str] = {"fa3": "flash_attn_3", "fa4": "flash-attn-4", "flash": "flash-attn"}

# Kernels by the major compute capability of the GPU, fastest first. None of the figures for fa3 and fa4 is our own.
# - 9, Hopper, TFLOP/s at the 119,000 tokens of 720x1280x129: fa3 610 to 660 (H100: the paper of Sliding Tile Attention,
#   arXiv 2502.04507, and sglang's pull request 22814, from the time of whole steps), cudnn 563 to 572 and sdpa 359 to
#   363 (H200, `hv-batch bench engine`, 2026-11-26). No figure of fa4 on Hopper is known, so it is not preferred.
# - 10, Blackwell: fa4 is up to 1.3 times as fast as cuDNN 9.13 (arXiv 2603.05451). fa3 does not run there.
# - 12, consumer and workstation Blackwell: cudnn before FlashAttention-2 (sglang #36525, 14.0 for 14.4 s).
FASTEST: Mapping[int, Sequence[str]] = {
    9: ("fa3", "cudnn", "fa4", "sdpa"),
    10: ("fa4", "cudnn", "sdpa"),
    12: ("cudnn", "sdpa"),
}


def candidates(major: int | None, *, is_half: bool) -> Sequence[str]:
    """Return the kernels that "auto" tries on a device, in order.

    `major` is its major compute capability, None for a CPU. `is_half` is whether the model computes in 16 bits.
    """
    kernels = (DEFAULT,) if major is None else FASTEST.get(major, (DEFAULT,))
    return kernels if is_half else tuple(name for name in kernels if name not in HALF_ONLY)


def assumed_kernel(option: str, major: int | None, *, is_half: bool = True) -> str:
    """Return the kernel that a plan assumes for the option `attention`.

    For "auto", that is the fastest one which needs no package, because a plan does not see the nodes.
    """
    if option != AUTO:
        return option
    return next(name for name in candidates(major, is_half=is_half) if name not in PACKAGES)
