"""The two kinds of transformer block, and the final layer (spec section 2).

Blocks see one item without batch dimension: text [S, C], this rank's image tokens [l, C], conditioning [C]. They do not
know the mesh: `attend` takes the packed qkv of text and local image rows and returns the attended rows.

Rounding follows the released run, which is under autocast: LayerNorm and modulation in float32, rounded to the model's
dtype where a Linear takes over; QK norm in float32, rounded before its weight; rotation in float32.
Inference only: q and k are normalised and rotated in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor], Tensor]  # qkv [S + l, 3, H, D] -> [S + l, H * D], text rows first

NORM_EPS = 1e-6


def gelu_tanh_(x: Tensor) -> Tensor:
    """In place: at 720p on one GPU, the activations of one MLP take 3 GB."""
    return torch.ops.aten.gelu_(x, approximate="tanh")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift; float32 inside, x's dtype outside."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    return normed.mul_(1 + scale).add_(shift).to(x.dtype)


def rotate_(x: Tensor, rope: Tensor) -> None:
    """Turn each channel pair of [L, ..., D] by its token's angle, in place: a product of complex numbers.

    rope [L, D / 2] complex64, of modulus 1; see `embeddings.rope_table`.
    """
    wide = x.float()  # x itself in float32
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    pairs.mul_(rope.view(len(rope), *[1] * (x.dim() - 2), -1))
    if wide is not x:
        x.copy_(wide)


class RMSNorm(nn.Module):
    """The weight of a root-mean-square norm over one head's channels; `normalize_qk_` applies two of them at once."""

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
    """The conditioning vector's `chunks` modulation vectors for one stream of one block."""

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(hidden_size, chunks * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec)).chunk(self.chunks)


class DoubleStreamBlock(nn.Module):
    """Image and text with weights of their own, meeting only in the joint attention."""

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

        img_qkv = _split_heads(self.img_attn_qkv(modulate(img, img_shift1, img_scale1)), self.heads)
        normalize_qk_(img_qkv, self.img_attn_q_norm, self.img_attn_k_norm)
        rotate_(img_qkv[:, :2], rope)
        txt_qkv = _split_heads(self.txt_attn_qkv(modulate(txt, txt_shift1, txt_scale1)), self.heads)
        normalize_qk_(txt_qkv, self.txt_attn_q_norm, self.txt_attn_k_norm)

        qkv = torch.cat((txt_qkv, img_qkv))
        del img_qkv, txt_qkv  # 2 GB at 720p on one GPU, not to be held through the attention
        attended = attend(qkv)
        del qkv

        text_len = txt.shape[0]
        img = torch.addcmul(img, self.img_attn_proj(attended[text_len:]), img_gate1)
        img = torch.addcmul(img, self.img_mlp(modulate(img, img_shift2, img_scale2)), img_gate2)
        txt = torch.addcmul(txt, self.txt_attn_proj(attended[:text_len]), txt_gate1)
        txt = torch.addcmul(txt, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)), txt_gate2)
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side between two wide Linears (arXiv 2302.05442)."""

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
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        qkv = _split_heads(qkv, self.heads)
        normalize_qk_(qkv, self.q_norm, self.k_norm)
        rotate_(qkv[text_len:, :2], rope)
        attended = attend(qkv)
        # Both halves are written where linear2 reads them, instead of being joined there afterwards.
        width = x.shape[-1]
        joined = x.new_empty(len(x), width + mlp.shape[-1])
        torch.ops.aten.gelu.out(mlp, approximate="tanh", out=joined[:, width:])
        joined[:, :width] = attended
        del qkv, mlp, attended  # 6 GB at 720p on one GPU
        return torch.addcmul(x, self.linear2(joined), gate)


class FinalLayer(nn.Module):
    """Tokens back to patches. Its modulation is (shift, scale) in this order; diffusers stores the two swapped."""

    def __init__(self, hidden_size: int, patch_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2)
        return self.linear(modulate(x, shift, scale))


def normalize_qk_(qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> None:
    """Normalise q and k of [L, 3, H, D] in place: rounded after the scale, and again after the weight."""
    qk = qkv[:, :2]
    length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True, dtype=torch.float32)
    qk.mul_(torch.rsqrt(length.square_().div_(qk.shape[-1]).add_(NORM_EPS)))
    qk.mul_(torch.stack((q_norm.weight, k_norm.weight)).unsqueeze(1))


def _split_heads(qkv: Tensor, heads: int) -> Tensor:
    """A view [L, 3, H, D] of the fused projection."""
    return rearrange(qkv, "l (k h d) -> l k h d", k=3, h=heads)
