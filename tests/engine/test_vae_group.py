"""Decoding on all ranks of a group, on real process groups, against one decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from hv_batch.engine.parallel import host_store, join_group, leave_group
from hv_batch.engine.vae import CausalVAE, VAEConfig
from hv_batch.engine.vae_group import decode_in_group
from hv_batch.engine.vae_tiling import TileGeometry, decode_streaming
from hv_batch.protocol import LATENT_CHANNELS, ParallelPlan, RankPlace

RANKS = 3
TILES = TileGeometry(spatial_px=64, temporal_frames=16)
SIZES = [
    (1, 5, 8),  # one tile: two ranks have nothing to do
    (8, 4, 5),  # tiled in time only, fewer tiles than ranks
    (5, 9, 13),  # 2 x 6 tiles
    (3, 11, 9),  # one temporal tile, 4 tiles
]


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    torch.manual_seed(0)
    return CausalVAE(VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)).requires_grad_(False).eval()


def _latents(size: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(1, LATENT_CHANNELS, *size, generator=torch.Generator().manual_seed(1))


def _rank_main(rank: int, folder: Path, vae: CausalVAE, addresses: mp.Queue) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        address = host_store("127.0.0.1", RANKS)
        for _ in range(RANKS - 1):
            addresses.put(address)
    else:
        address = addresses.get()
    plan = ParallelPlan(ulysses_degree=RANKS)
    mesh = join_group(RankPlace(rank=rank, local_rank=rank, plan=plan, device="cpu", address=address, timeout_s=60.0))
    chunks = [list(decode_in_group(vae, _latents(size), TILES, mesh)) for size in SIZES]
    torch.save(chunks, folder / f"{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def decoded(vae, tmp_path_factory) -> list[list[list[torch.Tensor]]]:
    """By rank, the chunks of every size."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["hv_batch.engine.vae_group", "pytest"])
    mp.start_processes(_rank_main, (folder, vae, context.Queue()), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("case", range(len(SIZES)), ids=lambda case: str(SIZES[case]))
def test_a_group_decodes_the_pixels_of_one_decoder(vae, decoded, case):
    """P3: where a video is decoded changes no bit; the frames come from rank 0 alone, in the same chunks."""
    torch.set_num_threads(1)
    alone = list(decode_streaming(vae, _latents(SIZES[case]), TILES))
    assert len(alone) == len(decoded[0][case])
    assert all(torch.equal(one, other) for one, other in zip(alone, decoded[0][case], strict=True))
    assert [decoded[rank][case] for rank in range(1, RANKS)] == [[], []]
