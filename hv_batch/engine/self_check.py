"""The self-check of a group: the ranks together must compute what one rank computes alone.

A group runs the check before it renders, and again if the latents of a sample are not finite, to find out whether the
sample or a device is the cause. Every rank holds all weights, so each rank runs the model alone and compares. The check
detects a GPU that computes wrong results, a faulty link, a collective library that mixes up ranks, and weights that
differ between nodes. It costs three forward passes over a few tokens.
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
from hv_batch.protocol import DeviceError
from hv_batch.sampling_params import LATENT_CHANNELS

if TYPE_CHECKING:
    from hv_batch.engine.dit.model import HYVideoDiT
    from hv_batch.engine.vae.model import CausalVAE

# 49 tokens: no degree except 7 divides them, so shards are padded. At degree 8 and above, the last shards contain only
# padding.
FRAMES, ROWS = 7, 7  # tokens

TEXT_LENGTHS = (5, 3)  # two texts of unequal length, so that one is padded

# The group and a single rank sum in different orders, so their results differ by rounding. The blocks amplify rounding
# by a factor that depends on their number, dtype and quantisation. The check measures this factor for each model: it
# perturbs the latents by one rounding error. Healthy groups deviate at most as much as the perturbed run (toy width:
# 2e-7 in float32, 6e-4 and 5e-3 in 16 bits, 2e-2 with FP8 products). A missing chunk of the ring deviates by 8e-2,
# mixed-up shards by 1.
MARGIN = 6.0

# Lower bound of the limit: a sum that rounds to another FP8 value may deviate more than the perturbed run. Real faults
# deviate more than this.
FLOOR = 1e-3


@torch.no_grad()
def check_group(model: HYVideoDiT, mesh: SequenceMesh, device: torch.device) -> None:
    """Compare the DiT on the mesh with the DiT on this rank alone.

    Raises DeviceError on the ranks that find a deviation beyond rounding, or values that are not finite.
    """
    # Only native sequence parallelism supports a token count that the ranks do not divide.
    latents, *others = _small_inputs(model, device, 1 if model.joint_attention is attend_jointly else mesh.size)
    alone = model(latents, *others, SequenceMesh.single()).float()
    if not torch.isfinite(alone).all():
        raise DeviceError(
            f"self-check: rank {mesh.world_rank} alone computes values that are not finite; its device or its copy "
            "of the weights is damaged"
        )
    if mesh.world_size == 1:
        return
    eps = torch.finfo(model.dtype).eps
    perturbed = latents * (1.0 + eps * _noise(1, latents.shape).to(device))
    rounding = _deviation(model(perturbed, *others, SequenceMesh.single()).float(), alone)
    # With cfg_degree 2, both halves of the group compute the same branch here and gather the results.
    halves = mesh.all_gather_branches(model(latents, *others, mesh)).float().chunk(mesh.cfg_degree)
    deviations, limit = [_deviation(half, alone) for half in halves], max(MARGIN * rounding, FLOOR)
    if not all(deviation <= limit for deviation in deviations):  # written so that NaN fails too
        raise DeviceError(
            f"self-check: the group's result deviates from what rank {mesh.world_rank} computes alone by "
            f"{max(deviations):.2g} (relative RMS); rounding explains at most {limit:.2g}. With Ulysses "
            f"{mesh.ulysses_degree} x ring {mesh.ring_degree}, a device, a link or the weights of one rank are damaged"
        )


@torch.no_grad()
def check_kernel(model: HYVideoDiT, device: torch.device) -> None:
    """Compare the DiT with its attention kernel on this rank alone with the DiT with plain attention.

    Raises DeviceError if the difference is beyond rounding, or values are not finite, and whatever the kernel raises.
    """
    name = model.attention
    latents, *others = _small_inputs(model, device, 1)
    computed = model(latents, *others, SequenceMesh.single()).float()
    perturbed = latents * (1.0 + torch.finfo(model.dtype).eps * _noise(1, latents.shape).to(device))
    model.attention = "math"
    try:
        plain = model(latents, *others, SequenceMesh.single()).float()
        rounding = _deviation(model(perturbed, *others, SequenceMesh.single()).float(), plain)
    finally:
        model.attention = name
    deviation, limit = _deviation(computed, plain), max(MARGIN * rounding, FLOOR)
    if not deviation <= limit:  # written so that NaN fails too
        raise DeviceError(
            f"self-check: attention {name!r} deviates from plain attention by {deviation:.2g} (relative RMS); rounding "
            f"explains at most {limit:.2g}"
        )


@torch.no_grad()
def check_decoding(vae: CausalVAE, mesh: SequenceMesh) -> None:
    """Compare a small picture, of which every rank decodes one tile, with what rank 0 decodes alone.

    Raises DeviceError on rank 0 if they differ. This is also the first point-to-point communication over the process
    group of all ranks.
    """
    if mesh.world_size == 1:
        return
    tiles = TileGeometry(spatial_px=64, temporal_frames=16)
    picture = _noise(5, (1, LATENT_CHANNELS, 1, tiles.space.stride, tiles.space.stride * mesh.world_size))
    together = list(decode_in_group(vae, picture, tiles, mesh))
    if mesh.world_rank > 0:
        return
    alone = torch.cat(list(decode_streaming(vae, picture, tiles)), dim=2).float()
    deviation, limit = _deviation(torch.cat(together, dim=2).float(), alone), max(torch.finfo(vae.dtype).eps, FLOOR)
    if not deviation <= limit:  # written so that NaN fails too
        raise DeviceError(
            f"self-check: the pixels that the group decodes deviate from those of rank 0 alone by {deviation:.2g} "
            f"(relative RMS); rounding explains at most {limit:.2g}. A device, a link or the VAE of one rank is damaged"
        )


def _deviation(x: Tensor, reference: Tensor) -> float:
    """Relative root mean square."""
    return float((x - reference).square().mean().sqrt() / reference.square().mean().sqrt())


def _noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Draw on the CPU, so that all ranks have equal values on any device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _small_inputs(
    model: HYVideoDiT, device: torch.device, columns: int
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], Tensor, Tensor | None]:
    """Return the arguments of `HYVideoDiT.forward`, except the mesh."""
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
