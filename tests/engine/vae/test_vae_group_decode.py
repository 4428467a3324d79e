"""Group decoding on real process groups, against a single decoder."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from hv_batch.architecture import TileGeometry, VAEConfig
from hv_batch.engine.decoder import HunyuanDecoder
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.self_check import check_decoding
from hv_batch.engine.vae.model import CausalVAE
from hv_batch.protocol import NonFiniteError, ParallelPlan
from hv_batch.sampling_params import LATENT_CHANNELS
from tests.support.rank_processes import joined

TILES = TileGeometry(spatial_px=64, temporal_frames=16)
SIZES = [
    (1, 5, 8),  # an image of one tile: the other ranks have no tile
    (8, 4, 5),  # tiled in time only, fewer tiles than ranks
    (5, 9, 13),  # 2 x 6 tiles
    (3, 11, 9),  # one temporal tile, 4 tiles
]
PLANS = [
    pytest.param(ParallelPlan(ring_degree=2), marks=pytest.mark.slow),
    pytest.param(ParallelPlan(ulysses_degree=2, cfg_degree=2), marks=pytest.mark.slow),
    ParallelPlan(ulysses_degree=3),
]


def make_vae(seed: int = 0) -> CausalVAE:
    torch.manual_seed(seed)
    return CausalVAE(VAEConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)).requires_grad_(False).eval()


def latents_of(size: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((LATENT_CHANNELS, *size)).astype(np.float32)


def error_of(decoder: HunyuanDecoder, latents: np.ndarray) -> str:
    try:
        list(decoder.decode(latents))
    except NonFiniteError as error:
        return str(error)
    return "none"


def rank_main(rank: int, folder: Path, plan: ParallelPlan, addresses: mp.Queue) -> None:
    torch.set_num_threads(1)
    with joined(rank, plan, addresses) as mesh:
        decoder = HunyuanDecoder(make_vae(), TILES, mesh)
        decoder.self_check()
        chunks = [list(decoder.decode(latents_of(size))) for size in SIZES]
        broken = latents_of(SIZES[2])
        broken[:, 0] = 3e38  # finite latents, whose frames overflow
        decode_error = error_of(decoder, broken)
        partial = decoder.decode(latents_of(SIZES[1]))
        partial_chunks = list(islice(partial, 1))
        if rank == 0:
            partial.close()
        else:
            list(partial)
        again = list(decoder.decode(latents_of(SIZES[2])))
        other = make_vae(seed=1 if rank == 1 else 0)
        try:
            check_decoding(other, mesh)
            check_error = "none"
        except RuntimeError as error:
            check_error = str(error)
    torch.save((chunks, decode_error, partial_chunks, again, check_error), folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=PLANS, ids=str)
def ranks(request, tmp_path_factory):
    """The results of `rank_main` on every rank of a group."""
    plan, folder = request.param, tmp_path_factory.mktemp("ranks")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["hv_batch.engine.denoiser", "pytest"])
    mp.start_processes(rank_main, (folder, plan, context.Queue()), nprocs=plan.world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(plan.world_size)]


@pytest.fixture(scope="module")
def alone() -> list[list[np.ndarray]]:
    """The chunks of each size, from a single decoder."""
    torch.set_num_threads(1)
    decoder = HunyuanDecoder(make_vae(), TILES, SequenceMesh.single())
    return [list(decoder.decode(latents_of(size))) for size in SIZES]


def test_a_group_decodes_the_pixels_of_one_decoder(ranks, alone):
    """P3: group decoding changes no bit; only rank 0 yields frames, in the same chunks."""
    chunks = ranks[0][0]
    for expected, decoded in zip(alone, chunks, strict=True):
        assert len(expected) == len(decoded)
        assert all(np.array_equal(one, other) for one, other in zip(expected, decoded, strict=True))
    assert all(rank[0] == [[]] * len(SIZES) for rank in ranks[1:])


def test_a_group_stays_usable_after_an_error_or_an_early_close(ranks, alone):
    """P5: after frames that are not finite, and after an early close, no rank waits and no tile is left over."""
    assert ranks[0][1].startswith("the decoded frames are not finite")
    assert [rank[1] for rank in ranks[1:]] == ["none"] * (len(ranks) - 1)
    assert np.array_equal(ranks[0][2][0], alone[1][0])
    assert all(np.array_equal(one, other) for one, other in zip(alone[2], ranks[0][3], strict=True))


def test_a_rank_with_other_weights_is_detected(ranks):
    """The self-check covers group decoding: rank 0 raises an error for tiles that it decodes differently."""
    assert "self-check: the pixels that the group decodes deviate" in ranks[0][4]
    assert {rank[4] for rank in ranks[1:]} == {"none"}
