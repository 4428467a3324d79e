"""Streamed decoding in overlapping tiles with the tile geometry of the release.

Tiled pixels differ from untiled pixels, so the geometry is part of a video's identity. With the numbers of the release:

- Time: tiles of 16 latent frames start every 12 latent frames. Each tile reads one latent frame more. Each tile except
  the first drops its first decoded frame, because the decoder treats it as the start of a video. 16 frames are
  cross-faded. Up to 16 latent frames are not tiled.
- Space: within a temporal tile, tiles of 32 x 32 latents start every 24 latents. 64 pixels are cross-faded, first with
  the tile above, then with the tile to the left. If neither side is longer than 32, space is not tiled; otherwise both
  sides are tiled, even a side that would fit.

A cross-fade overwrites the later tile. The next cross-fade uses the cross-faded pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hv_batch.architecture import Axis, TileGeometry
from hv_batch.engine.vae.model import PIXEL_CHANNELS, CausalVAE
from hv_batch.protocol import NonFiniteError
from hv_batch.sampling_params import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION

DecodeTiles = Callable[[Sequence[Tensor]], Iterable[Tensor]]  # tiles of latents, in order -> their pixels, in order


def decode_streaming(
    vae: CausalVAE, latents: Tensor, geometry: TileGeometry, decode_tiles: DecodeTiles | None = None
) -> Iterator[Tensor]:
    """Yield the frames of `latents` [1, 16, T, h, w] in order. The latents are those of the sampler, still scaled.

    Yields chunks [1, 3, n, 8h, 8w], about in [-1, 1], in the VAE's dtype and on its device, each after its temporal
    tile is decoded; together 4*(T - 1) + 1 frames. Holds the pixels of about one temporal tile, besides the chunk that
    the caller holds. `decode_tiles` decodes the tiles; by default `vae` decodes them one by one.
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
        tail = _last(pixels, 2, axis.fade_px).clone()  # a copy, so that the tile can be freed
        yield pixels[:, :, :keep]
        del pixels  # free the tile before the next one is decoded


def unscale(vae: CausalVAE, latents: Tensor) -> Tensor:
    """Divide the latents by the scaling factor; returns the VAE's dtype on its device."""
    return (latents.to(vae.device, torch.float32) / vae.config.scaling_factor).to(vae.dtype)


def cut_time(z: Tensor, axis: Axis) -> Iterator[Tensor]:
    """Yield the temporal tiles of latents, in order, as views."""
    if z.shape[2] <= axis.tile:
        yield z
        return
    # A tile that starts at the last latent frame would contain only the frame that is dropped.
    for start in range(0, z.shape[2] - 1, axis.stride):
        yield z[:, :, start : start + axis.tile + 1]


def cut_space(z: Tensor, axis: Axis) -> list[list[Tensor]]:
    """Return the spatial tiles of one temporal tile, row by row, as views."""
    height, width = z.shape[3:]
    if max(height, width) <= axis.tile:
        return [[z]]
    return [
        [z[..., top : top + axis.tile, left : left + axis.tile] for left in range(0, width, axis.stride)]
        for top in range(0, height, axis.stride)
    ]


def tile_pixels(z: Tensor) -> tuple[int, ...]:
    """Return the shape [B, 3, 4*(T - 1) + 1, 8h, 8w] of the pixels of a tile of latents [B, 16, T, h, w]."""
    batch, _, frames, height, width = z.shape
    side = SPATIAL_COMPRESSION
    return batch, PIXEL_CHANNELS, (frames - 1) * TEMPORAL_COMPRESSION + 1, height * side, width * side


def _assemble(decode_tiles: DecodeTiles, z: Tensor, axis: Axis) -> Tensor:
    """Decode one temporal tile: untiled in time, tiled in space."""
    rows = cut_space(z, axis)
    decoded = iter(decode_tiles([tile for row in rows for tile in row]))
    if len(rows) == len(rows[0]) == 1:
        return next(decoded)
    out = z.new_empty(tile_pixels(z))
    above: list[Tensor] = []  # lower edges of the tiles of the previous row
    for y, row in enumerate(rows):
        lower_edges = []
        left: Tensor | None = None  # right edge of the previous tile
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
    """Overwrite the first `length` entries of `after` along `dim` by a linear fade from the end of `before`.

    The products are rounded to the pixels' dtype before they are added, as in the release, so that half-precision
    results agree as well.
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
    """Convert frames [1, 3, n, H, W] in [-1, 1] to uint8 [n, H, W, 3].

    As in the release, frames are mapped to 0 ... 1 in their own dtype, then truncated, not rounded.

    Raises NonFiniteError if the frames are not finite; a cast would convert such values to black.
    """
    if not bool(torch.isfinite(frames).all()):
        dtype = str(frames.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"the decoded frames are not finite: {dtype} of the VAE overflowed, or its weights are damaged"
        )
    unit = (frames[0] * 0.5).add_(0.5).clamp_(0, 1)
    return unit.float().mul_(255).to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
