"""Group decoding: each of the n ranks of a denoise group decodes every n-th tile; rank 0 assembles the video.

The pixels of a tile do not depend on the rank that decodes it, and rank 0 blends the tiles in the order of a single
decoder, so the pixels are identical. Tiles are assigned round-robin over the whole video, so a video that is tiled only
in time is divided as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count

import torch
import torch.distributed as dist
from torch import Tensor

from hv_batch.architecture import TileGeometry
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.vae.model import CausalVAE
from hv_batch.engine.vae.tiling import cut_space, cut_time, decode_streaming, tile_pixels, unscale


def decode_in_group(vae: CausalVAE, latents: Tensor, geometry: TileGeometry, mesh: SequenceMesh) -> Iterator[Tensor]:
    """On rank 0, yield the chunks of `decode_streaming`; on other ranks, yield nothing.

    All ranks must call it with equal `latents` and geometry, and iterate it to its end.
    """
    if mesh.world_rank == 0:
        yield from decode_streaming(vae, latents, geometry, Rank0Tiles(vae, mesh).decode)
    else:
        send_tiles(vae, latents, geometry, mesh)


class Rank0Tiles:
    """The side of rank 0. Rank i % world_size decodes tile i of the video; rank 0 decodes the first of each round."""

    def __init__(self, vae: CausalVAE, mesh: SequenceMesh) -> None:
        self._vae, self._mesh = vae, mesh
        self._numbers = count()

    def decode(self, tiles: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the pixels of each tile, in order; decodes own tiles and receives the others."""
        for tile in tiles:
            rank = next(self._numbers) % self._mesh.world_size
            if rank == 0:
                yield self._vae.decode(tile)
            else:
                pixels = tile.new_empty(tile_pixels(tile))
                dist.recv(pixels, group=self._mesh.world, group_src=rank)
                yield pixels


def send_tiles(vae: CausalVAE, latents: Tensor, geometry: TileGeometry, mesh: SequenceMesh) -> None:
    """Decode this rank's tiles and send them to rank 0.

    At most one tile is being sent while the next one is decoded. This bounds the memory if rank 0 is slower.
    """
    tiles = chain.from_iterable(
        chain.from_iterable(cut_space(z, geometry.space)) for z in cut_time(unscale(vae, latents), geometry.time)
    )
    sending: tuple[Tensor, dist.Work] | None = None  # keeps the tensor alive until it is sent
    for number, tile in enumerate(tiles):
        if number % mesh.world_size == mesh.world_rank:
            pixels = vae.decode(tile).contiguous()
            if sending is not None:
                sending[1].wait()
            work = dist.isend(pixels, group=mesh.world, group_dst=0)
            assert work is not None
            sending = pixels, work
    if sending is not None:
        sending[1].wait()
        if vae.device.type == "cuda":
            torch.cuda.synchronize(vae.device)  # NCCL's wait only orders streams, and `pixels` is freed on return
