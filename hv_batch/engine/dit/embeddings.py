"""The input embeddings of the DiT: patches, scalars, pooled text, text states and positions.

Module and parameter names are those of the released checkpoint. All functions process one item without batch dimension:
tokens are [L, C], conditioning vectors [C].
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hv_batch.architecture import REFINER_MLP_RATIO, TIMESTEP_WIDTH
from hv_batch.engine.attention.kernels import Kernel
from hv_batch.engine.attention.token_order import token_order
from hv_batch.engine.dit.blocks import MLP

Grid = tuple[int, int, int]  # tokens along t, h, w
Rope = tuple[Tensor, Tensor]  # cos and sin, [L, head_dim / 2] float32

TIMESTEP_MAX_PERIOD = 10_000
ROPE_THETA = 256.0


def patchify(latents: Tensor, patch: Grid) -> tuple[Tensor, Grid]:
    """Split latents [C, T, H, W] into tokens [L, C * pt * ph * pw] in (t, h, w) order; also return the token grid."""
    pt, ph, pw = patch
    _, t, h, w = latents.shape
    tokens = rearrange(latents, "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    return tokens, (t // pt, h // ph, w // pw)


def unpatchify(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """The inverse of `patchify`: returns latents [C, T, H, W]."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(tokens, "(t h w) (c pt ph pw) -> c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


@lru_cache(maxsize=2)  # one sample runs at a time; two entries cover alternating shapes
def rope_table(
    grid: Grid, span: tuple[int, int], axes_dims: tuple[int, ...], device: torch.device, brick: Grid | None = None
) -> Rope:
    """Return rotary cos and sin of the tokens `span` of a (t, h, w) grid, one angle per channel pair.

    Computed on the CPU in float32, so that all devices rotate by the same bits. A span may extend past the end of the
    grid; these rows are padding. With a `brick`, the tokens are counted in the order of `token_order`.
    """
    _, h, w = grid
    token = torch.arange(*span)
    if brick:
        order = token_order(grid, brick)
        token = torch.cat((order, torch.arange(len(order), max(len(order), span[1]))))[slice(*span)]
    angles = []
    for position, dim in zip((token // (h * w), token // w % h, token % w), axes_dims, strict=True):
        frequency = 1.0 / ROPE_THETA ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles.append(torch.outer(position.float(), frequency))
    angle = torch.cat(angles, dim=1)
    return angle.cos().to(device), angle.sin().to(device)


class PatchEmbed(nn.Module):
    """A convolution whose kernel equals its stride, computed as a Linear on the patches of this rank."""

    def __init__(self, patch: Grid, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch, stride=patch)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """The sinusoid of a scalar (float32, cosines first), then a two-layer MLP in the model's dtype."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = TIMESTEP_WIDTH // 2
        # On the CPU, as in the release: devices differ in the last bit of exp, which t amplifies in the sinusoid.
        frequency = torch.exp(-math.log(TIMESTEP_MAX_PERIOD) * torch.arange(half, dtype=torch.float32) / half)
        angle = t.float() * frequency.to(t.device)
        sinusoid = torch.cat((angle.cos(), angle.sin()))
        return self.mlp(sinusoid.to(next(self.parameters()).dtype))


class MLPEmbedder(nn.Module):
    """Projects the pooled text vector into the modulation."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class TextProjection(nn.Module):
    """Projects the mean text state into the modulation of the refiner."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class RefinerBlock(nn.Module):
    """Pre-norm self-attention and MLP over the text, gated (not shifted or scaled) by the conditioning."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.self_attn_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.self_attn_proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = MLP(hidden_size, REFINER_MLP_RATIO * hidden_size, F.silu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor, kernel: Kernel) -> Tensor:
        attention_gate, mlp_gate = self.adaLN_modulation(condition).chunk(2)
        qkv = rearrange(self.self_attn_qkv(self.norm1(x)), "s (k h d) -> s k h d", k=3, h=self.heads)
        attended, _ = kernel(*qkv.unbind(1))
        x = x + self.self_attn_proj(attended.flatten(1)) * attention_gate
        return x + self.mlp(self.norm2(x)) * mlp_gate


class IndividualTokenRefiner(nn.Module):
    """The blocks of the refiner. A separate module only because the parameter names of the checkpoint require it."""

    def __init__(self, hidden_size: int, heads: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(hidden_size, heads) for _ in range(depth))

    def forward(self, x: Tensor, condition: Tensor, kernel: Kernel) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, kernel)
        return x


class TokenRefiner(nn.Module):
    """Projects the text states to the hidden width and refines them, conditioned on the timestep and their mean."""

    def __init__(self, in_dim: int, hidden_size: int, heads: int, depth: int) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(in_dim, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.c_embedder = TextProjection(in_dim, hidden_size)
        self.individual_token_refiner = IndividualTokenRefiner(hidden_size, heads, depth)

    def forward(self, text: Tensor, t: Tensor, kernel: Kernel) -> Tensor:
        """Return [S, hidden_size] for text [S, in_dim] of valid tokens only. Their mean is computed before rounding."""
        dtype = self.input_embedder.weight.dtype
        condition = self.t_embedder(t) + self.c_embedder(text.float().mean(dim=0).to(dtype))
        return self.individual_token_refiner(self.input_embedder(text.to(dtype)), condition, kernel)
