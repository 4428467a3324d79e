"""The causal 3D VAE: its names against the release, its output against diffusers, its tiling against the release."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hv_batch.architecture import TileGeometry, VAEConfig
from hv_batch.engine.vae.blocks import FrameCausalAttention
from hv_batch.engine.vae.model import CausalVAE, parse_vae_config
from hv_batch.engine.vae.tiling import decode_streaming, to_uint8
from hv_batch.protocol import UserError
from tests.support.vae_reference import NARROW, relative_error, under_autocast, vae_pair

TOLERANCE = 1e-4  # fp32, on outputs of the order of 1

TWO_LAYERS = VAEConfig(block_out_channels=(32, 64, 64, 64), layers_per_block=2, norm_num_groups=32)
SMALL_TILES = TileGeometry(spatial_px=64, temporal_frames=16)  # 8 x 8 and 4 latents; strides 6 and 3


@pytest.fixture(scope="module", params=[NARROW, TWO_LAYERS], ids=["narrow", "two-layers"])
def pair(request) -> tuple[CausalVAE, AutoencoderKLHunyuanVideo]:
    return vae_pair(request.param)


@pytest.fixture(scope="module")
def narrow() -> tuple[CausalVAE, AutoencoderKLHunyuanVideo]:
    return vae_pair(NARROW)


def _latents(*size: int) -> Tensor:
    return torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(1))


def _worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def _all_frames(vae: CausalVAE, z: Tensor, geometry: TileGeometry) -> Tensor:
    """Return the streamed frames of latents that are already divided by the scaling factor."""
    return torch.cat(list(decode_streaming(vae, z * vae.config.scaling_factor, geometry)), dim=2)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.004), (torch.bfloat16, 0.032)])
def test_half_precision_is_as_accurate_as_the_release(dtype, bound):
    """Spec sections 1 and 5, `--vae-precision`: the error against float32 is at most 1.1 times that of the release.

    Measured on a CPU: float16 0.0027 (release 0.0027), bfloat16 0.024 (release 0.027).
    """
    ours, theirs = vae_pair(NARROW)
    z = _latents(2, 4, 6)
    expected = ours.decode(z)
    released = relative_error(under_autocast(theirs, dtype).decode(z.to(dtype), return_dict=False)[0], expected)
    assert relative_error(ours.to(dtype).decode(z.to(dtype)), expected) <= 1.1 * released < bound


# ---- names and configuration


def test_decoder_and_encoder_have_the_released_names_and_shapes(released_vae_shapes):
    """Spec sections 5 and 7: released weights load strictly into the default config."""
    with torch.device("meta"):
        vae = CausalVAE(VAEConfig())
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == released_vae_shapes


@pytest.fixture
def released_vae_shapes() -> dict[str, list[int]]:
    """The tensor list of the released checkpoint, from diffusers' module, which has the same names."""
    with torch.device("meta"):
        reference = AutoencoderKLHunyuanVideo()
    return {name: list(tensor.shape) for name, tensor in reference.state_dict().items()}


RELEASED_JSON = {
    "_class_name": "AutoencoderKLCausal3D",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "sample_tsize": 64,
    "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
    "scaling_factor": 0.476986,
    "time_compression_ratio": 4,
    "mid_block_add_attention": True,
}


def test_config_reads_the_released_json():
    """Spec section 7: the released vae/config.json gives the defaults."""
    assert parse_vae_config(json.loads(json.dumps(RELEASED_JSON))) == VAEConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "relu"),
        ("latent_channels", 4),
        ("time_compression_ratio", 8),
        ("mid_block_add_attention", False),
        ("up_block_types", ["UpDecoderBlock2D"] * 4),
        ("block_out_channels", [128, 256, 512]),
        ("block_out_channels", [128, 256, 512, 500]),
        ("shift_factor", 0.1),
    ],
)
def test_config_refuses_another_architecture(key, value):
    """P6: an unsupported VAE is refused; the error names the key."""
    with pytest.raises(UserError, match=key):
        parse_vae_config(RELEASED_JSON | {key: value})


# ---- the network


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_untiled_decode_equals_diffusers(pair, frames):
    """Spec section 5: the decoder equals the released one, including one frame and odd sizes."""
    ours, theirs = pair
    theirs.use_framewise_decoding = False
    z = _latents(frames, 5, 6)
    decoded = ours.decode(z)
    assert decoded.shape == (1, 3, 4 * (frames - 1) + 1, 40, 48)
    assert decoded.std() > 0.1
    assert _worst(decoded, theirs.decode(z).sample) <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 9])
def test_encode_equals_diffusers(pair, frames):
    """Spec section 5: the mode of the encoder equals that of the released one."""
    ours, theirs = pair
    theirs.use_framewise_encoding = False
    x = torch.rand(2, 3, frames, 40, 56, generator=torch.Generator().manual_seed(2)) * 2 - 1
    encoded = ours.encode(x)
    assert encoded.shape == (2, 16, (frames - 1) // 4 + 1, 5, 7)
    assert _worst(encoded, theirs.encode(x).latent_dist.mode()) <= TOLERANCE


def test_attention_equals_dense_attention_under_the_frame_mask():
    """Spec section 5: attention is frame-causal: a token attends to its own frame and earlier frames only."""
    torch.manual_seed(0)
    attention = FrameCausalAttention(16, groups=4).requires_grad_(False)
    x = torch.randn(2, 16, 3, 2, 5)
    tokens = attention.group_norm(x).flatten(2).transpose(1, 2)
    frame = torch.arange(3).repeat_interleave(10)
    scores = attention.to_q(tokens) @ attention.to_k(tokens).transpose(1, 2) / 16**0.5
    weights = scores.masked_fill(frame[None, :] > frame[:, None], -torch.inf).softmax(-1)
    dense = attention.to_out[0](weights @ attention.to_v(tokens)).transpose(1, 2).reshape(x.shape) + x
    assert _worst(attention(x), dense) <= 1e-6


def test_upsampler_never_looks_ahead(narrow):
    """Spec section 5: the convolutions are causal (GroupNorm, which covers all frames of a tile, is not)."""
    upsampler = narrow[0].decoder.up_blocks[1].upsamplers[0]
    x = torch.randn(1, 32 * 2, 4, 3, 3)
    changed = x.clone()
    changed[:, :, 3] += 1
    before, after = upsampler(x), upsampler(changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 0.02), pytest.param(torch.bfloat16, 0.15, marks=pytest.mark.slow)],  # slow on most CPUs
)
def test_half_precisions_stay_close_to_fp32(narrow, dtype, tolerance):
    """Spec section 1: the VAE runs in fp16 by default; a tiled decode in half precision equals fp32 up to rounding."""
    z, geometry = _latents(5, 5, 3), TileGeometry(spatial_px=32, temporal_frames=16)
    reference = _all_frames(narrow[0], z, geometry)
    half = CausalVAE(NARROW).to(dtype)
    half.load_state_dict(narrow[0].state_dict())
    frames = _all_frames(half.requires_grad_(False), z, geometry)
    assert frames.dtype == dtype
    assert _worst(frames.float(), reference) <= tolerance


# ---- tiling


def _fade(before: Tensor, after: Tensor, dim: int, length: int) -> Tensor:
    """The cross-fade of the release, one index at a time."""
    length = min(before.shape[dim], after.shape[dim], length)
    after = after.clone()
    for i in range(length):
        old = before.select(dim, before.shape[dim] - length + i)
        new = after.select(dim, i)
        after.select(dim, i).copy_(old * (1 - i / length) + new * (i / length))
    return after


def _reference_space(vae: CausalVAE, z: Tensor, tile: int) -> Tensor:
    if z.shape[-1] <= tile and z.shape[-2] <= tile:
        return vae.decode(z)
    stride, fade = tile * 3 // 4, tile * 8 // 4
    tops, lefts = range(0, z.shape[-2], stride), range(0, z.shape[-1], stride)
    tiles = [[vae.decode(z[..., top : top + tile, left : left + tile]) for left in lefts] for top in tops]
    rows = []
    for i, row in enumerate(tiles):
        for j in range(len(row)):
            if i:
                row[j] = _fade(tiles[i - 1][j], row[j], -2, fade)
            if j:
                row[j] = _fade(row[j - 1], row[j], -1, fade)
        rows.append(torch.cat([pixels[..., : stride * 8, : stride * 8] for pixels in row], dim=-1))
    return torch.cat(rows, dim=-2)


def _reference_tiled(vae: CausalVAE, z: Tensor, tile: int, tile_t: int) -> Tensor:
    """The geometry of the release with overlap 0.25, written out, with all tiles in memory."""
    if z.shape[2] <= tile_t:
        return _reference_space(vae, z, tile)
    stride = tile_t * 3 // 4
    tiles = [_reference_space(vae, z[:, :, i : i + tile_t + 1], tile) for i in range(0, z.shape[2], stride)]
    tiles[1:] = [pixels[:, :, 1:] for pixels in tiles[1:]]
    for i in range(1, len(tiles)):
        tiles[i] = _fade(tiles[i - 1], tiles[i], 2, tile_t)
    kept = [pixels[:, :, : stride * 4 + (i == 0)] for i, pixels in enumerate(tiles)]
    return torch.cat(kept, dim=2)


@pytest.mark.parametrize(
    "size",
    [
        (1, 5, 8),  # one frame, fits
        (1, 9, 13),  # one frame, tiled in space
        (4, 8, 8),  # exactly one tile
        (5, 4, 5),  # tiled in time only
        (7, 7, 9),  # tiles a height that would fit, with a last row of one latent; the last temporal tile has no frame
        (8, 4, 9),  # a last temporal tile of one frame group
    ],
    ids=str,
)
def test_streamed_decode_equals_the_official_geometry(narrow, size):
    """Spec section 5, P3: the chunks equal the release's tiled decode, at sizes that tiles do and do not divide."""
    z = _latents(*size)
    expected = _reference_tiled(narrow[0], z, tile=8, tile_t=4)
    assert expected.shape == (1, 3, 4 * size[0] - 3, 8 * size[1], 8 * size[2])
    assert _worst(_all_frames(narrow[0], z, SMALL_TILES), expected) <= TOLERANCE


@pytest.mark.parametrize("size", [(3, 11, 9), (6, 10, 6)], ids=str)
def test_streamed_decode_equals_diffusers_at_the_same_geometry(narrow, size):
    """Spec section 5: diffusers' implementation of the same geometry agrees."""
    ours, theirs = narrow
    theirs.use_framewise_decoding = True
    theirs.enable_tiling(64, 64, 16, 48, 48, 12)
    z = _latents(*size)
    expected = theirs.decode(z).sample
    theirs.disable_tiling()
    assert _worst(_all_frames(ours, z, SMALL_TILES), expected) <= TOLERANCE


def _nearest(z: Tensor) -> Tensor:
    """A decoder stand-in without receptive field: tiles agree where they overlap, so tiling must change nothing."""
    pixels = z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2).repeat_interleave(4, 2)
    return pixels[:, :, 3:].clone()


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 11), st.integers(1, 13), st.integers(1, 13)),
    tiles=st.tuples(st.sampled_from([4, 8]), st.sampled_from([4, 8])),
    overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_tiles_cover_every_pixel_once_and_in_place(size, tiles, overlap):
    """Spec section 5: at any size and geometry, no frame or pixel is lost, duplicated or moved."""
    vae = SimpleNamespace(
        config=VAEConfig(scaling_factor=1.0), dtype=torch.float32, device=torch.device("cpu"), decode=_nearest
    )
    geometry = TileGeometry(spatial_px=8 * tiles[0], temporal_frames=4 * tiles[1], overlap=overlap)
    z = _latents(*size)
    assert _worst(torch.cat(list(decode_streaming(vae, z, geometry)), dim=2), _nearest(z)) <= 1e-6


def test_official_tiles_of_720p_are_84():
    """Spec section 5: the default geometry decodes 720x1280x129 in 84 tiles, in chunks of 49, 48 and 32 frames."""
    decoded: list[tuple[int, ...]] = []

    def decode(z: Tensor) -> Tensor:
        decoded.append(tuple(z.shape[2:]))
        return torch.empty(1, 3, 4 * (z.shape[2] - 1) + 1, 8 * z.shape[3], 8 * z.shape[4], device="meta")

    vae = SimpleNamespace(config=VAEConfig(), dtype=torch.float32, device=torch.device("meta"), decode=decode)
    latents = torch.empty(1, 16, 33, 90, 160, device="meta")
    chunks = [tuple(chunk.shape) for chunk in decode_streaming(vae, latents, TileGeometry())]
    assert chunks == [(1, 3, n, 720, 1280) for n in (49, 48, 32)]
    assert len(decoded) == 84
    assert decoded[0] == (17, 32, 32)


def test_chunks_come_before_later_tiles_are_decoded(narrow):
    """P7: a chunk is yielded before the next temporal tile is decoded."""
    events: list[str] = []

    def decode(z: Tensor) -> Tensor:
        events.append("decode")
        return narrow[0].decode(z)

    vae = SimpleNamespace(config=NARROW, dtype=torch.float32, device=torch.device("cpu"), decode=decode)
    chunks = decode_streaming(vae, _latents(8, 4, 4), SMALL_TILES)
    events.extend(f"{chunk.shape[2]} frames" for chunk in chunks)
    assert events == ["decode", "13 frames", "decode", "12 frames", "decode", "4 frames"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"overlap": 0.6}, "overlap"),
        ({"overlap": -0.1}, "overlap"),
        ({"spatial_px": 100}, "spatial_px"),
        ({"temporal_frames": 0}, "temporal_frames"),
        ({"spatial_px": 40}, "spatial_px"),
    ],
)
def test_geometry_that_would_not_meet_is_refused(options, field):
    """P6: a geometry whose tiles do not align is refused before anything is decoded."""
    with pytest.raises(UserError, match=field):
        TileGeometry(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_uint8_is_truncated_as_released(dtype):
    """Spec section 1, step 5: (x / 2 + 0.5) clamped in its dtype, times 255 in float32, truncated, as [n, H, W, 3]; the
    input is not modified."""
    values = torch.linspace(-1.2, 1.2, 2 * 3 * 4 * 5).reshape(1, 3, 2, 4, 5).to(dtype)
    before = values.clone()
    frames = to_uint8(values)
    expected = ((before / 2 + 0.5).clamp(0, 1).float() * 255).numpy().astype(np.uint8)[0].transpose(1, 2, 3, 0)
    assert torch.equal(values, before)
    assert frames.dtype == np.uint8
    assert frames.shape == (2, 4, 5, 3)
    assert frames.flags.c_contiguous
    np.testing.assert_array_equal(frames, expected)
    assert [to_uint8(torch.full((1, 3, 1, 1, 1), x))[0, 0, 0, 0] for x in (-1.0, 0.0, 1.0)] == [0, 127, 255]


def test_frames_that_are_not_finite_are_refused():
    """P5: an overflow raises an error; it does not become a black video."""
    with pytest.raises(ValueError, match="finite"):
        to_uint8(torch.full((1, 3, 1, 2, 2), torch.nan))
