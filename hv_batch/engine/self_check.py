"""A group proves itself: before it renders, what its ranks compute together must be what one of them computes alone. It
does so again when a sample's latents are not finite, which may be the sample's fault or a device's.

Every rank holds all weights, so each can run the model by itself and compare. That finds a GPU that computes wrongly, a
broken link between two, a collective library that mixes up ranks, and weights that differ between nodes, at the price
of three forward passes over a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hv_batch.architecture import TileGeometry
from hv_batch.engine.parallel.sequence import SequenceMesh, attend_jointly
from hv_batch.engine.vae.group_decode import decode_in_group
from hv_batch.engine.vae.tiling import decode_streaming
from hv_batch.protocol import LATENT_CHANNELS, DeviceError

if TYPE_CHECKING:
    from hv_batch.engine.dit.model import HYVideoDiT
    from hv_batch.engine.vae.model import CausalVAE

# A prime number of tokens times 7: no degree but 7 divides it, so shards are padded; at degree 8 and above the last
# shards are nothing but padding.
FRAMES, ROWS = 7, 7  # tokens

TEXT_LENGTHS = (5, 3)  # two texts of unequal length, so that one is padded

# Together and alone sum in another order, so they differ by rounding, which the blocks amplify by an amount that
# depends on their number, dtype and quantisation. Each model tells itself how much: by what becomes of latents that are
# a rounding error away. Healthy groups deviate at most as far as those (toy width: 2e-7 in float32, 6e-4 and 5e-3 in 16
# bits, 2e-2 with FP8 products); a forgotten chunk of the ring deviates by 8e-2, mixed-up shards by 1.
MARGIN = 6.0

# A sum that rounds to another FP8 value moves more than the nudge below may show; nothing that is wrong moves less.
FLOOR = 1e-3


@torch.no_grad()
def check_group(model: HYVideoDiT, mesh: SequenceMesh, device: torch.device) -> None:
    """Raises DeviceError on the ranks that see a deviation, or values that are not finite."""
    # Only our own attention takes tokens that no degree divides.
    latents, *others = _small_inputs(model, device, 1 if model.joint_attention is attend_jointly else mesh.size)
    alone = model(latents, *others, SequenceMesh.single()).float()
    if not torch.isfinite(alone).all():
        raise DeviceError(
            f"self-check: rank {mesh.world_rank} alone computes values that are not finite; its device or its copy "
            "of the weights is damaged"
        )
    if mesh.world_size == 1:
        return
    unit = torch.finfo(model.dtype).eps
    nudged = latents * (1.0 + unit * _noise(1, latents.shape).to(device))
    rounding = _deviation(model(nudged, *others, SequenceMesh.single()).float(), alone)
    # Where halves of the group compute a guidance branch each, both are given the same one here, and exchange it.
    halves = mesh.exchange(model(latents, *others, mesh)).float().chunk(mesh.cfg_degree)
    found, limit = [_deviation(half, alone) for half in halves], max(MARGIN * rounding, FLOOR)
    if not all(deviation <= limit for deviation in found):  # also where one is not a number
        raise DeviceError(
            f"self-check: the group's result deviates from what rank {mesh.world_rank} computes alone by "
            f"{max(found):.2g} (relative RMS), and rounding explains {limit:.2g}. With Ulysses "
            f"{mesh.ulysses_degree} x ring {mesh.ring_degree}, a device, a link or the weights of one rank are damaged"
        )


@torch.no_grad()
def check_decoding(vae: CausalVAE, mesh: SequenceMesh) -> None:
    """Raises DeviceError on rank 0 where a small picture, of which every rank decodes a tile, is not what it decodes
    alone. Also the first time that ranks send each other something without the rest of the group.
    """
    if mesh.world_size == 1:
        return
    tiles = TileGeometry(spatial_px=64, temporal_frames=16)
    picture = _noise(5, (1, LATENT_CHANNELS, 1, tiles.space.stride, tiles.space.stride * mesh.world_size))
    together = list(decode_in_group(vae, picture, tiles, mesh))
    if mesh.world_rank > 0:
        return
    alone = torch.cat(list(decode_streaming(vae, picture, tiles)), dim=2).float()
    found, limit = _deviation(torch.cat(together, dim=2).float(), alone), max(torch.finfo(vae.dtype).eps, FLOOR)
    if not found <= limit:  # also where it is not a number
        raise DeviceError(
            f"self-check: what the group decodes deviates from what its rank 0 decodes alone by {found:.2g} (relative "
            f"RMS), and rounding explains {limit:.2g}; a device, a link or the VAE of one rank is damaged"
        )


def _deviation(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).square().mean().sqrt() / reference.square().mean().sqrt())


def _noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Drawn on the CPU: the same on every rank, whatever its device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _small_inputs(
    model: HYVideoDiT, device: torch.device, columns: int
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], Tensor, Tensor | None]:
    """What `HYVideoDiT.forward` takes, but the mesh."""
    config, videos = model.config, len(TEXT_LENGTHS)
    sides = [tokens * patch for tokens, patch in zip((FRAMES, ROWS, columns), config.patch_size, strict=True)]
    timestep = torch.full((videos,), 500.0, device=device)
    guidance = torch.full((videos,), 6000.0, device=device) if config.guidance_embed else None
    return (
        _noise(2, (videos, config.in_channels, *sides)).to(device),
        timestep,
        _noise(3, (videos, max(TEXT_LENGTHS), config.text_states_dim)).to(device),
        TEXT_LENGTHS,
        _noise(4, (videos, config.text_states_dim_2)).to(device),
        guidance,
    )
