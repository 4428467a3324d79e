"""The double-stream and single-stream transformer blocks, and the final layer.

A block processes one item without batch dimension: text [S, C], this rank's image tokens [l, C], conditioning [C]. It
does not depend on the mesh: `attend` takes the packed qkv of text and local image rows and returns the attended rows.

Rounding follows the released run, which uses autocast: LayerNorm and modulation are float32 and are rounded to the
model's dtype at the next Linear; the QK norm is float32 and is rounded before its weight; the rotation is float32.
For inference only: q and k are normalised and rotated in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hv_batch.engine.dit.pointwise import EAGER, Pointwise, modulate

Attend = Callable[[Tensor], Tensor]  # qkv [S + l, 3, H, D] -> [S + l, H * D], text rows first


def gelu_tanh_(x: Tensor) -> Tensor:
    """GELU with tanh approximation, in place: at 720p on one GPU, the activations of one MLP take 3 GB."""
    return torch.ops.aten.gelu_(x, approximate="tanh")


class RMSNorm(nn.Module):
    """The weight of an RMS norm over the channels of one head. `pointwise.normalize_` applies two of them at once."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Modulation(nn.Module):
    """Computes `chunks` modulation vectors from the conditioning vector, for one stream of one block."""

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec)).chunk(self.chunks)


class DoubleStreamBlock(nn.Module):
    """A block with separate weights for image and text. The streams interact only in the joint attention."""

    pointwise: Pointwise = EAGER

    def __init__(self, hidden_size: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.img_mod = Modulation(hidden_size, 6)
        self.img_attn_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.img_attn_q_norm = RMSNorm(hidden_size // heads)
        self.img_attn_k_norm = RMSNorm(hidden_size // heads)
        self.img_attn_proj = nn.Linear(hidden_size, hidden_size)
        self.img_mlp = MLP(hidden_size, mlp_hidden, gelu_tanh_)

        self.txt_mod = Modulation(hidden_size, 6)
        self.txt_attn_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.txt_attn_q_norm = RMSNorm(hidden_size // heads)
        self.txt_attn_k_norm = RMSNorm(hidden_size // heads)
        self.txt_attn_proj = nn.Linear(hidden_size, hidden_size)
        self.txt_mlp = MLP(hidden_size, mlp_hidden, gelu_tanh_)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        do = self.pointwise
        img_qkv = _split_heads(self.img_attn_qkv(do.modulate(img, img_shift1, img_scale1)), self.heads)
        do.normalize_rotate_(img_qkv, 0, self.img_attn_q_norm.weight, self.img_attn_k_norm.weight, rope)
        txt_qkv = _split_heads(self.txt_attn_qkv(do.modulate(txt, txt_shift1, txt_scale1)), self.heads)
        do.normalize_(txt_qkv, self.txt_attn_q_norm.weight, self.txt_attn_k_norm.weight)

        qkv = torch.cat((txt_qkv, img_qkv))
        del img_qkv, txt_qkv  # frees 2 GB before the attention, at 720p on one GPU
        attended = attend(qkv)
        del qkv

        text_len = txt.shape[0]
        img = torch.addcmul(img, self.img_attn_proj(attended[text_len:]), img_gate1)
        img = torch.addcmul(img, self.img_mlp(do.modulate(img, img_shift2, img_scale2)), img_gate2)
        txt = torch.addcmul(txt, self.txt_attn_proj(attended[:text_len]), txt_gate1)
        txt = torch.addcmul(txt, self.txt_mlp(do.modulate(txt, txt_shift2, txt_scale2)), txt_gate2)
        return img, txt


class SingleStreamBlock(nn.Module):
    """A block on text and image as one sequence. Attention and MLP run in parallel between two wide Linears.

    (arXiv 2302.05442)
    """

    pointwise: Pointwise = EAGER

    def __init__(self, hidden_size: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.widths = [3 * hidden_size, mlp_hidden]
        self.linear1 = nn.Linear(hidden_size, sum(self.widths))
        self.linear2 = nn.Linear(hidden_size + mlp_hidden, hidden_size)
        self.q_norm = RMSNorm(hidden_size // heads)
        self.k_norm = RMSNorm(hidden_size // heads)
        self.modulation = Modulation(hidden_size, 3)

    def forward(self, x: Tensor, vec: Tensor, text_len: int, rope: Tensor, attend: Attend) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        do = self.pointwise
        qkv, mlp = self.linear1(do.modulate(x, shift, scale)).split(self.widths, dim=-1)
        qkv = _split_heads(qkv, self.heads)
        do.normalize_rotate_(qkv, text_len, self.q_norm.weight, self.k_norm.weight, rope)
        attended = attend(qkv)
        # Both parts are written directly into the input of linear2, which saves a concatenation.
        width = x.shape[-1]
        joined = x.new_empty(len(x), width + mlp.shape[-1])
        torch.ops.aten.gelu.out(mlp, approximate="tanh", out=joined[:, width:])
        joined[:, :width] = attended
        del qkv, mlp, attended  # frees 6 GB at 720p on one GPU
        return torch.addcmul(x, self.linear2(joined), gate)


class FinalLayer(nn.Module):
    """Converts tokens to patches. The modulation is (shift, scale) in this order; diffusers stores (scale, shift)."""

    def __init__(self, hidden_size: int, patch_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2)
        return self.linear(modulate(x, shift, scale))


def _split_heads(qkv: Tensor, heads: int) -> Tensor:
    """Return a view [L, 3, H, D] of the fused projection."""
    return rearrange(qkv, "l (k h d) -> l k h d", k=3, h=heads)
