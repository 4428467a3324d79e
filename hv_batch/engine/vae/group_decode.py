"""Decoding one video on all ranks of a denoise group: every rank decodes every n-th tile, rank 0 puts them together.

A tile's pixels are the same whoever decodes it, and rank 0 blends them in the order of a single decoder: identical
pixels. Tiles are dealt out over the whole video, so a video that is cut in time only is shared out, too.
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
    """What `decode_streaming` yields, on rank 0; the other ranks yield nothing, and must be iterated all the same.

    Every rank is called with equal `latents` and geometry.
    """
    if mesh.world_rank == 0:
        yield from decode_streaming(vae, latents, geometry, Rank0Tiles(vae, mesh).decode)
    else:
        send_tiles(vae, latents, geometry, mesh)


class Rank0Tiles:
    """Rank 0's side. Tile i of the video is rank i % world_size's: the first of each round is its own."""

    def __init__(self, vae: CausalVAE, mesh: SequenceMesh) -> None:
        self._vae, self._mesh = vae, mesh
        self._numbers = count()

    def decode(self, tiles: Sequence[Tensor]) -> Iterator[Tensor]:
        for tile in tiles:
            rank = next(self._numbers) % self._mesh.world_size
            if rank == 0:
                yield self._vae.decode(tile)
            else:
                pixels = tile.new_empty(tile_pixels(tile))
                dist.recv(pixels, group=self._mesh.world, group_src=rank)
                yield pixels


def send_tiles(vae: CausalVAE, latents: Tensor, geometry: TileGeometry, mesh: SequenceMesh) -> None:
    """Decode this rank's tiles. One is on its way to rank 0 while the next is decoded, and no more: rank 0 blends at
    its own pace, and pixels must not pile up here.
    """
    tiles = chain.from_iterable(
        chain.from_iterable(cut_space(z, geometry.space)) for z in cut_time(unscale(vae, latents), geometry.time)
    )
    sending: tuple[Tensor, dist.Work] | None = None  # the tensor is kept until it has been sent
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
            torch.cuda.synchronize(vae.device)  # NCCL's wait orders streams only, and `pixels` is about to be freed
