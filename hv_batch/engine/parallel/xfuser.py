"""xfuser's long-context attention as a replacement of `attend_jointly` (engine option `sequence_parallel: xfuser`).

xfuser communicates the tokens and merges the partial results of the ring. The kernel is the one that `attention` names;
it is passed as xfuser's attention processor, because some of xfuser's own kernels do not return the log-sum-exp that a
ring needs. xfuser does not support padding, so the number of ranks must divide the token count. It supports one text
length per batch, which is sufficient because the engine runs items one by one.

xfuser can be imported only on a machine with a GPU, so it is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hv_batch.engine.attention.kernels import Kernel
from hv_batch.engine.parallel.sequence import SequenceMesh, attend_jointly
from hv_batch.protocol import UserError

# The tested pair of versions. xfuser 0.5 to 0.7 import a name from yunchang that exists in no release of yunchang.
PINNED = {"xfuser": "0.4.5", "yunchang": "0.6.4"}


def check_xfuser(device: torch.device) -> None:
    """Raise UserError if `device` is not a GPU, or xfuser or yunchang is missing or has another version than PINNED."""
    remedy = "install the 'gpu' extra on the nodes that run the ranks, or choose sequence_parallel 'native'."
    if device.type != "cuda":
        raise UserError(f"sequence_parallel 'xfuser' needs a CUDA device, but this process has {device.type}; {remedy}")
    for package, pinned in PINNED.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed = "none"
        if installed != pinned:
            raise UserError(f"sequence_parallel 'xfuser' needs {package} {pinned}, installed is {installed}; {remedy}")


def uneven_problem(tokens: int, ranks: int) -> str | None:
    """Return the reason why xfuser cannot divide `tokens` image tokens over `ranks` ranks, or None if it can."""
    if tokens % ranks == 0:
        return None
    return (
        f"{tokens} image tokens do not divide by {ranks} ranks, and sequence_parallel 'xfuser' would attend to the "
        "padding; choose 'native', which trims it, or degrees that divide the tokens"
    )


class XfuserAttention:
    """A `JointAttention` for the ranks of one mesh."""

    def __init__(self, mesh: SequenceMesh) -> None:
        """Register the mesh's process groups with xfuser. All ranks of the group must call this at the same time."""
        from xfuser.core.long_ctx_attention import xFuserLongContextAttention
        from yunchang.globals import PROCESS_GROUP

        # The engine's groups have the configured timeouts. xfuser needs one group per axis, also for an axis of one
        # rank, because it reads None as all ranks.
        alone = dist.new_subgroups(group_size=1)[0]
        PROCESS_GROUP.ULYSSES_PG = alone if mesh.ulysses is None else mesh.ulysses
        PROCESS_GROUP.RING_PG = alone if mesh.ring is None else mesh.ring
        self._new_attention: Callable[..., Any] = xFuserLongContextAttention
        self._attentions: dict[Kernel, Any] = {}

    def __call__(self, qkv: Tensor, text_len: int, image_len: int, mesh: SequenceMesh, kernel: Kernel) -> Tensor:
        """See `attend_jointly`. Raises UserError if the number of ranks does not divide the tokens."""
        if mesh.size == 1:  # a single rank, as in the self-check
            return attend_jointly(qkv, text_len, image_len, mesh, kernel)
        if problem := uneven_problem(image_len, mesh.size):
            raise UserError(f"This size cannot be rendered: {problem}.")
        if kernel not in self._attentions:
            self._attentions[kernel] = self._new_attention(attn_type="hv_batch", attn_processor=_adapt(kernel))
        text, image = (part.unsqueeze(0).unbind(2) for part in qkv.split((text_len, qkv.shape[0] - text_len)))
        out = self._attentions[kernel](
            None,  # the layer of a key cache, which is not used
            *image,
            joint_tensor_query=text[0],
            joint_tensor_key=text[1],
            joint_tensor_value=text[2],
            joint_strategy="rear",  # text keys are attended once, at the last hop; text rows are returned last
        )[0]
        # Each rank has computed its own text rows, and ring ranks merged in different orders. All ranks use those of
        # the first rank.
        attended = torch.cat((out[-text_len:], out[:-text_len])).flatten(1)
        dist.broadcast(attended[:text_len], group_src=0, group=mesh.sequence)
        return attended


def _adapt(kernel: Kernel) -> Callable[..., tuple[Tensor, Tensor]]:
    """Adapt a kernel to xfuser's interface: q, k, v [1, L, H, D] -> out in the same layout, log-sum-exp [1, H, L]."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **_flash_options: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernel(q[0], k[0], v[0])
        return out.unsqueeze(0), lse.transpose(0, 1).unsqueeze(0)

    return attend
