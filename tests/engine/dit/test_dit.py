"""The DiT against the tensor list of the released checkpoint and against diffusers' implementation."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.architecture import DiTConfig
from hv_batch.engine.attention.kernels import KERNELS, attend_math, choose_kernel, merge
from hv_batch.engine.dit.embeddings import patchify, rope_table, unpatchify
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.dit.pointwise import modulate
from hv_batch.protocol import UserError
from tests.support.dit_reference import random_dit, random_inputs, reference_model
from tests.support.repository import DATA

TINY = DiTConfig(
    hidden_size=32,
    heads_num=2,
    mm_double_blocks_depth=2,
    mm_single_blocks_depth=2,
    rope_dim_list=(4, 6, 6),
    text_states_dim=24,
    text_states_dim_2=12,
)
NARROW_HEADS = DiTConfig(
    hidden_size=48,
    heads_num=6,
    mlp_width_ratio=3.0,
    mm_double_blocks_depth=1,
    mm_single_blocks_depth=3,
    rope_dim_list=(2, 4, 2),
    text_states_dim=20,
    text_states_dim_2=8,
    refiner_depth=1,
)
UNDISTILLED = DiTConfig(
    in_channels=4,
    out_channels=6,
    hidden_size=40,
    heads_num=1,
    mm_double_blocks_depth=1,
    mm_single_blocks_depth=1,
    rope_dim_list=(8, 12, 20),
    text_states_dim=16,
    text_states_dim_2=16,
    guidance_embed=False,
)
PADDED = 9  # text tokens after padding


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def test_state_dict_is_the_released_one():
    """Spec section 2: at the default config, names and shapes are exactly those of the released checkpoint."""
    released = json.loads((DATA / "dit_state_dict.json").read_text())
    with torch.device("meta"):
        model = HYVideoDiT(DiTConfig())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == released


@pytest.mark.parametrize("config", [TINY, NARROW_HEADS, UNDISTILLED], ids=["tiny", "narrow-heads", "undistilled"])
@pytest.mark.parametrize(
    ("size", "text_lengths"),
    [((3, 6, 10), [PADDED]), ((1, 2, 2), [1]), ((2, 8, 4), [4, 7]), ((5, 4, 6), [PADDED, 1])],
)
def test_velocity_equals_diffusers(config, size, text_lengths):
    """Spec section 2: equal weights and inputs give diffusers' velocity, including padded text and a batch of two."""
    model = random_dit(config, seed=1)
    inputs = random_inputs(config, size, text_lengths, seed=2, padded=PADDED)
    mask = torch.arange(PADDED) < torch.tensor(text_lengths)[:, None]
    with torch.no_grad():
        expected = reference_model(model)(
            hidden_states=inputs["latents"],
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["text_states"],
            encoder_attention_mask=mask.long(),
            pooled_projections=inputs["pooled"],
            guidance=inputs["guidance"],
        ).sample
    assert expected.std() > 0.1, "a velocity near zero would compare equal to anything"
    assert _largest_difference(model(**inputs), expected) <= 1e-4


@pytest.mark.parametrize(("grid", "dims"), [((3, 4, 5), (16, 56, 56)), ((33, 2, 7), (4, 6, 6)), ((1, 1, 1), (2, 4, 2))])
def test_rope_equals_diffusers(grid, dims):
    """Spec section 2: theta 256, three axes, one angle per pair of channels."""
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

    t, h, w = grid
    cos, sin = HunyuanVideoRotaryPosEmbed(2, 1, list(dims), 256.0)(torch.empty(1, 16, t, 2 * h, 2 * w))
    ours = rope_table(grid, (0, t * h * w), dims, torch.device("cpu"))
    for table, expected in zip(ours, (cos, sin), strict=True):
        assert _largest_difference(table.repeat_interleave(2, dim=1), expected) <= 1e-6


def test_rope_of_a_span_is_the_slice():
    """Design section 5: a rank computes only its own rows, and they equal those of the whole table."""
    cpu = torch.device("cpu")
    whole = rope_table((3, 4, 5), (0, 60), (4, 6, 6), cpu)
    part = rope_table((3, 4, 5), (45, 63), (4, 6, 6), cpu)
    assert all(torch.equal(a[45:], b[:15]) for a, b in zip(whole, part, strict=True))


@given(st.tuples(*[st.integers(1, 3)] * 3), st.sampled_from([(1, 2, 2), (1, 1, 1), (2, 1, 3)]), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_unpatchify_inverts_patchify(grid, patch, channels):
    """Spec section 2: tokens are in (t, h, w) order, patches in (c, pt, ph, pw) order, and no value is lost."""
    latents = torch.randn(channels, *(n * p for n, p in zip(grid, patch, strict=True)))
    tokens, token_grid = patchify(latents, patch)
    assert token_grid == grid
    assert torch.equal(unpatchify(tokens, token_grid, patch), latents)


def test_padding_is_never_read():
    """Spec section 2: padded text never affects a valid token, even if the padding is NaN."""
    model = random_dit(TINY, seed=3)
    inputs = random_inputs(TINY, (2, 4, 6), [3, 8], seed=4, padded=PADDED)
    poisoned = inputs | {"text_states": inputs["text_states"].clone()}
    poisoned["text_states"][0, 3:] = float("nan")
    poisoned["text_states"][1, 8:] = float("inf")
    assert torch.equal(model(**inputs), model(**poisoned))


def test_an_item_does_not_depend_on_its_batch():
    """P3: the velocity of an item has equal bits alone and with another item of another text length."""
    model = random_dit(TINY, seed=5)
    both = random_inputs(TINY, (2, 4, 6), [3, 8], seed=6, padded=PADDED)
    alone = {name: value[1:] for name, value in both.items()}
    assert torch.equal(model(**both)[1:], model(**alone))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_stays_close(dtype, tolerance):
    """Half precision returns its own dtype and is within its rounding of float32. The released run is bfloat16."""
    model = random_dit(TINY, seed=7)
    inputs = random_inputs(TINY, (3, 6, 10), [7], seed=8, padded=PADDED)
    inputs["guidance"] = torch.tensor([6016.0])  # representable in both dtypes; another test covers its rounding
    expected = model(**inputs)
    velocity = model.to(dtype)(**inputs)
    assert velocity.dtype is dtype
    assert 0.0 < _largest_difference(velocity, expected) <= tolerance * expected.abs().max().item()


def test_modulation_is_rounded_once():
    """As under the release's autocast: LayerNorm and modulation are float32 and are rounded once before a Linear."""
    torch.manual_seed(12)
    x, shift, scale = (torch.randn(*size).bfloat16() for size in ((50, 64), (64,), (64,)))
    normed = torch.nn.functional.layer_norm(x.float(), (64,), eps=1e-6)
    expected = (normed * (1 + scale).float() + shift.float()).bfloat16()
    assert torch.equal(modulate(x, shift, scale), expected)


def test_guidance_is_rounded_before_the_embedder():
    """Spec section 4: in bfloat16, guidance 6000 and 6016 round to the same number; in float32 they differ."""
    model = random_dit(TINY, seed=9)
    inputs = random_inputs(TINY, (1, 4, 4), [5], seed=10, padded=PADDED)
    nearby = inputs | {"guidance": torch.tensor([6016.0])}
    assert not torch.equal(model(**inputs), model(**nearby))
    model.to(torch.bfloat16)
    assert torch.equal(model(**inputs), model(**nearby))


def test_float16_takes_every_allowed_guidance():
    """float16 ends at 65504: the guidance of a scale above 65.5 stays finite and has an effect."""
    model = random_dit(TINY, seed=9).to(torch.float16)
    inputs = random_inputs(TINY, (1, 4, 4), [5], seed=10, padded=PADDED)
    first, second = (model(**inputs | {"guidance": torch.tensor([value])}) for value in (80_000.0, 100_000.0))
    assert first.isfinite().all()
    assert second.isfinite().all()
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 3070}, "heads_num"),
        ({"rope_dim_list": (16, 56, 54)}, "rope_dim_list"),
        ({"rope_dim_list": (15, 57, 56)}, "rope_dim_list"),
    ],
)
def test_config_that_does_not_fit_is_refused(changes, named):
    """P6: inconsistent widths are found when the config is read; the error names the field."""
    with pytest.raises(UserError, match=named):
        DiTConfig(**changes)


@pytest.mark.parametrize(
    "changes", [{"text_lengths": [0]}, {"text_lengths": [PADDED + 1]}, {"text_lengths": [2, 2]}, {"guidance": None}]
)
def test_inputs_that_break_the_contract_are_refused(changes):
    """Invalid text lengths and a missing guidance raise ValueError; they would crash a kernel or change the video."""
    inputs = random_inputs(TINY, (1, 2, 2), [3], seed=0, padded=PADDED)
    with pytest.raises(ValueError, match=r"text lengths|guidance"):
        random_dit(TINY, seed=0)(**(inputs | changes))


def _device_kernels():
    """Yield (kernel, device, dtype) for all combinations that this machine supports."""
    yield from (("sdpa", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    if torch.cuda.is_available():
        yield from (("sdpa", "cuda", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
        for dtype in (torch.bfloat16, torch.float16):
            yield "cudnn", "cuda", dtype
            if find_spec("flash_attn"):
                yield "flash", "cuda", dtype


@pytest.mark.parametrize(("backend", "device", "dtype"), list(_device_kernels()))
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 70), (70, 1), (45, 33), (300, 130)])
def test_kernels_agree_with_plain_attention(backend, device, dtype, q_len, k_len):
    """Every kernel returns softmax attention and its true log-sum-exp, for strided slices of a packed qkv."""
    torch.manual_seed(11)
    q = torch.randn(q_len, 3, 3, 16, device=device).to(dtype)[:, 0]
    k, v = torch.randn(k_len, 3, 3, 16, device=device).to(dtype)[:, 1:].unbind(1)
    out, lse = KERNELS[backend](q, k, v)
    expected_out, expected_lse = attend_math(q, k, v)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert out.dtype is dtype
    assert lse.dtype is torch.float32
    assert lse.shape == (q_len, 3)
    assert _largest_difference(out, expected_out) <= tolerance
    assert _largest_difference(lse, expected_lse) <= max(tolerance / 10, 1e-5)


@given(
    st.integers(1, 12), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.floats(0.1, 40.0), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_merging_parts_equals_the_whole(q_len, parts, sharpness, seed):
    """Design section 5: merging the attention over any partition of the keys gives the attention over all keys."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(q_len, 2, 8, generator=draw) * sharpness
    k, v = torch.randn(2, sum(parts), 2, 8, generator=draw).unbind(0)
    expected_out, expected_lse = attend_math(q, k, v)
    pieces = [attend_math(q, *piece) for piece in zip(k.split(parts), v.split(parts), strict=True)]
    out, lse = pieces[0]
    for piece in pieces[1:]:
        out, lse = merge(out, lse, *piece)
    assert _largest_difference(out, expected_out) <= 2e-5
    assert torch.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flash3", "flash", "cudnn"])
def test_backend_that_cannot_run_is_refused(name):
    """P6: the error for an unknown kernel, or for a GPU kernel on a CPU, names the kernel and the remedy."""
    with pytest.raises(UserError, match="sdpa"):
        choose_kernel(name, torch.device("cpu"), torch.float32)
