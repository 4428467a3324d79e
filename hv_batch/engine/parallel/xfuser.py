"""xfuser's long-context attention in the place of `attend_jointly`: the engine option `sequence_parallel: xfuser`.

xfuser moves the tokens and merges what the ring brings; the kernel is the one that `attention` names, which xfuser
takes as its attention processor (its own choices of kernel do not all return the log-sum-exp that a ring needs). It
knows no padding, so only sizes whose tokens divide by the ranks are allowed. It knows one text length for a whole
batch, which is as good as any here: items are attended one by one.

xfuser can be imported only where a GPU is, so nothing here is until it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hv_batch.engine.attention import Kernel
from hv_batch.engine.parallel.sequence import SequenceMesh, attend_jointly
from hv_batch.protocol import UserError

# The pair that is known to work. xfuser 0.5 to 0.7 import a name from yunchang that no release of it has.
PINNED = {"xfuser": "0.4.5", "yunchang": "0.6.4"}


def check_xfuser(device: torch.device) -> None:
    """Raises UserError where xfuser cannot be imported, or another version than the pinned one would be."""
    remedy = "install the 'gpu' extra where the ranks run, or choose sequence_parallel 'native'."
    if device.type != "cuda":
        raise UserError(f"sequence_parallel 'xfuser' needs a CUDA device, and this process has {device.type}; {remedy}")
    for package, pinned in PINNED.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed = "none"
        if installed != pinned:
            raise UserError(f"sequence_parallel 'xfuser' needs {package} {pinned}, and there is {installed}; {remedy}")


def find_uneven(tokens: int, ranks: int) -> str | None:
    """Why xfuser cannot share out so many image tokens; None if it can."""
    if tokens % ranks == 0:
        return None
    return (
        f"{tokens} image tokens do not divide by {ranks} ranks, and sequence_parallel 'xfuser' would attend to the "
        "padding; choose 'native', which trims it, or degrees that divide them"
    )


class XfuserAttention:
    """A `JointAttention` for the ranks of one mesh."""

    def __init__(self, mesh: SequenceMesh) -> None:
        """All ranks of the group must do this at the same time."""
        from xfuser.core.long_ctx_attention import xFuserLongContextAttention
        from yunchang.globals import PROCESS_GROUP

        # Our own groups, with their timeouts. xfuser wants one for each dimension, of a single rank where it has to be;
        # None would mean all ranks.
        alone = dist.new_subgroups(group_size=1)[0]
        PROCESS_GROUP.ULYSSES_PG = alone if mesh.ulysses is None else mesh.ulysses
        PROCESS_GROUP.RING_PG = alone if mesh.ring is None else mesh.ring
        self._new_attention: Callable[..., Any] = xFuserLongContextAttention
        self._attentions: dict[Kernel, Any] = {}

    def __call__(self, qkv: Tensor, text_len: int, image_len: int, mesh: SequenceMesh, kernel: Kernel) -> Tensor:
        """See `attend_jointly`. Raises UserError for tokens that do not divide by the ranks."""
        if mesh.size == 1:  # a rank by itself, to compare with
            return attend_jointly(qkv, text_len, image_len, mesh, kernel)
        if fault := find_uneven(image_len, mesh.size):
            raise UserError(f"This size cannot be rendered: {fault}.")
        if kernel not in self._attentions:
            self._attentions[kernel] = self._new_attention(attn_type="hv_batch", attn_processor=_adapt(kernel))
        text, image = (part.unsqueeze(0).unbind(2) for part in qkv.split((text_len, qkv.shape[0] - text_len)))
        out = self._attentions[kernel](
            None,  # the layer that a cache of keys would belong to
            *image,
            joint_tensor_query=text[0],
            joint_tensor_key=text[1],
            joint_tensor_value=text[2],
            joint_strategy="rear",  # text keys are joined once, at the last hop, and text rows are returned last
        )[0]
        # Each rank has attended its own copy of the text, and ring ranks merged in unlike orders: one of them for all.
        attended = torch.cat((out[-text_len:], out[:-text_len])).flatten(1)
        dist.broadcast(attended[:text_len], group_src=0, group=mesh.sequence)
        return attended


def _adapt(kernel: Kernel) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel as xfuser calls one: q, k, v [1, L, H, D] -> out in the same layout, log-sum-exp [1, H, L]."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **_flash_options: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernel(q[0], k[0], v[0])
        return out.unsqueeze(0), lse.transpose(0, 1).unsqueeze(0)

    return attend
