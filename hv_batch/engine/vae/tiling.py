"""Decoding in overlapping tiles, streamed: the tile geometry of the official release (spec section 5).

Tiled pixels differ from untiled ones, so the geometry belongs to a video's identity. With the official numbers:

- time: tiles of 16 latent frames start every 12. Each reads one latent frame more, and each but the first drops its
  first decoded frame, which the decoder took for the start of a video. 16 frames cross-fade. Up to 16 latent frames go
  untiled.
- space: within a temporal tile, tiles of 32 x 32 latents start every 24; 64 pixels cross-fade, first with the tile
  above, then with the tile to the left. If neither side is longer than 32, space goes untiled; else both sides are cut,
  even one that would have fitted.

A cross-fade overwrites the later tile, and what was cross-faded is used for the next cross-fade.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hv_batch.architecture import Axis, TileGeometry
from hv_batch.engine.vae.model import PIXEL_CHANNELS, CausalVAE
from hv_batch.protocol import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, NonFiniteError

DecodeTiles = Callable[[Sequence[Tensor]], Iterable[Tensor]]  # tiles of latents, in order -> their pixels, in order


def decode_streaming(
    vae: CausalVAE, latents: Tensor, geometry: TileGeometry, decode_tiles: DecodeTiles | None = None
) -> Iterator[Tensor]:
    """Frames of `latents` [1, 16, T, h, w] as the sampler leaves them (still scaled), in order.

    Yields chunks [1, 3, n, 8h, 8w], about in [-1, 1], in the VAE's dtype and on its device, each as soon as its
    temporal tile is done; together 4*(T - 1) + 1 frames. Holds the pixels of about one temporal tile, besides the chunk
    that the caller may still have. `decode_tiles` is who decodes; without it, `vae` one tile after the other.
    """
    decode_tiles = decode_tiles or (lambda tiles: map(vae.decode, tiles))
    axis = geometry.time
    tail: Tensor | None = None
    for z in cut_time(unscale(vae, latents), axis):
        pixels = _assemble(decode_tiles, z, geometry.space)
        if latents.shape[2] <= axis.tile:
            yield pixels
            return
        keep = axis.stride_px + 1
        if tail is not None:
            pixels, keep = pixels[:, :, 1:], axis.stride_px
            _cross_fade(tail, pixels, 2, axis.fade_px)
        tail = _last(pixels, 2, axis.fade_px).clone()  # a copy, so that the tile itself can be freed
        yield pixels[:, :, :keep]
        del pixels  # before the next tile is decoded, not after


def unscale(vae: CausalVAE, latents: Tensor) -> Tensor:
    """The latents as the VAE takes them, on its device and in its dtype."""
    return (latents.to(vae.device, torch.float32) / vae.config.scaling_factor).to(vae.dtype)


def cut_time(z: Tensor, axis: Axis) -> Iterator[Tensor]:
    """The temporal tiles of latents, in order; views."""
    if z.shape[2] <= axis.tile:
        yield z
        return
    # A tile that starts at the last latent frame would hold nothing but the frame that is dropped.
    for start in range(0, z.shape[2] - 1, axis.stride):
        yield z[:, :, start : start + axis.tile + 1]


def cut_space(z: Tensor, axis: Axis) -> list[list[Tensor]]:
    """The rows of spatial tiles of one temporal tile; views."""
    height, width = z.shape[3:]
    if max(height, width) <= axis.tile:
        return [[z]]
    return [
        [z[..., top : top + axis.tile, left : left + axis.tile] for left in range(0, width, axis.stride)]
        for top in range(0, height, axis.stride)
    ]


def tile_pixels(z: Tensor) -> tuple[int, ...]:
    """The shape [B, 3, 4*(T - 1) + 1, 8h, 8w] of what a tile of latents becomes."""
    batch, _, frames, height, width = z.shape
    side = SPATIAL_COMPRESSION
    return batch, PIXEL_CHANNELS, (frames - 1) * TEMPORAL_COMPRESSION + 1, height * side, width * side


def _assemble(decode_tiles: DecodeTiles, z: Tensor, axis: Axis) -> Tensor:
    """Pixels of latents that are decoded whole in time and tiled in space."""
    rows = cut_space(z, axis)
    decoded = iter(decode_tiles([tile for row in rows for tile in row]))
    if len(rows) == len(rows[0]) == 1:
        return next(decoded)
    out = z.new_empty(tile_pixels(z))
    above: list[Tensor] = []  # the lower edge of every tile of the row above
    for y, row in enumerate(rows):
        lower_edges = []
        left: Tensor | None = None  # the right edge of the tile before
        for x, _ in enumerate(row):
            pixels = next(decoded)
            if above:
                _cross_fade(above[x], pixels, -2, axis.fade_px)
            if left is not None:
                _cross_fade(left, pixels, -1, axis.fade_px)
            left = _last(pixels, -1, axis.fade_px).clone()
            lower_edges.append(_last(pixels, -2, axis.fade_px).clone())
            kept = pixels[..., : axis.stride_px, : axis.stride_px]
            top, start = y * axis.stride_px, x * axis.stride_px
            out[..., top : top + kept.shape[-2], start : start + kept.shape[-1]] = kept
        above = lower_edges
    return out


def _last(pixels: Tensor, dim: int, length: int) -> Tensor:
    length = min(length, pixels.shape[dim])
    return pixels.narrow(dim, pixels.shape[dim] - length, length)


def _cross_fade(before: Tensor, after: Tensor, dim: int, length: int) -> None:
    """Overwrites the head of `after` along `dim` by a linear fade from the end of `before`.

    A product is rounded to the pixels' dtype before the two are added, as the release does: half precisions agree too.
    """
    length = min(before.shape[dim], after.shape[dim], length)
    if length == 0:
        return
    shape = [1] * after.ndim
    shape[dim] = length
    ramp = torch.tensor([step / length for step in range(length)], device=after.device).view(shape)
    fading = (_last(before, dim, length) * (1 - ramp)).to(after.dtype)
    after.narrow(dim, 0, length).mul_(ramp).add_(fading)


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames [1, 3, n, H, W] in [-1, 1] as uint8 [n, H, W, 3].

    As released: brought to 0 ... 1 in the dtype they come in, then truncated, not rounded.

    Raises NonFiniteError for frames that are not finite, which a cast would turn into plausible black.
    """
    if not bool(torch.isfinite(frames).all()):
        raise NonFiniteError("the decoded frames are not finite")
    unit = (frames[0] * 0.5).add_(0.5).clamp_(0, 1)
    return unit.float().mul_(255).to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
