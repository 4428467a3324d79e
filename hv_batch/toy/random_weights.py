"""Random weights for the toy checkpoint whose renders show something.

Untrained weights drawn in the usual way render grey noise. These are drawn so that a render is a set of coloured fields
that move. The prompt decides colours and fields, the seed their detail, and each part of the model has its share:

- the first half of the DiT's residual stream carries the noisy latents from the first layer to the last, which returns
  them as velocity: so the noise leaves the latents within one run of the sampler. The other half is for the picture;
- the query biases of the image tokens are large. Rotated by position, they make the attention of a token to the words
  of the prompt a smooth function of where, and in which frame, the token is. What the words' values add is the picture;
- the modulation of the last layer, which follows the pooled vector, tints it;
- the VAE's kernels mix channels at random but are smooth in space and time, so latents become soft shapes.

Every value is a function of the seed and the tensor's name alone, by exact arithmetic: the same bits on every machine.
The gains below were chosen by looking at frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from hv_batch.protocol import LATENT_CHANNELS

State = dict[str, torch.Tensor]

PATCH = 1 * 2 * 2  # latents a token, per channel
QUERY_BIAS = 2.0  # against a content of deviation 1
# Of the RMS norms. Image tokens outnumber words twentyfold, so their keys are damped and those of the words raised.
NORM_GAINS = {"img_attn_k_norm": 0.3, "txt_attn_k_norm": 2.5, "q_norm": 1.5}
MODULATION = 0.5  # deviation of shifts, scales and gates
NOISE_GAIN = 1.0  # velocity a unit of carried noise
PICTURE_GAIN = 2.0  # velocity a unit of picture
TINT = 1.5  # modulation of the picture in the last layer
TIME_GAIN = 0.3  # of timestep and guidance in the modulation vector, which would otherwise tint all prompts alike
TEXT_ATTENTION = 3.0  # of the text towers' attention, so that the pooled vector is not mainly that of the end token
GRAIN = 0.3  # deviation of a VAE kernel from its smooth shape, against that of the kernel
CONTRAST = 0.8  # gain of the last convolution: pixels fill their range of [-1, 1]
BLUR = torch.tensor([1.0, 2.0, 1.0]) / 4
LAG = torch.tensor([0.0, 1.0, 3.0]) / 4  # oldest frame first; as long as the blur, it would freeze what moves


def dit_state(model: nn.Module, seed: int) -> State:
    shapes = dict(_shapes(model))
    hidden = shapes["img_in.proj.bias"].numel()
    return {name: _dit_tensor(name, shape, hidden, seed) for name, shape in shapes.items()}


def vae_state(model: nn.Module, seed: int) -> State:
    return {name: _vae_tensor(name, shape, seed) for name, shape in _shapes(model)}


def text_state(model: nn.Module, seed: int) -> State:
    """Random towers: norms at one, no biases, every token its own direction, and much attention to other tokens."""
    return {name: _text_tensor(name, shape, seed) for name, shape in _shapes(model)}


def _text_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    if "position_embedding" in name:
        return _draw(name, shape, 0.1, seed)  # else the length of a prompt would be most of its pooled vector
    if "embed" in name:
        return _draw(name, shape, 1.0, seed)
    return (TEXT_ATTENTION if "o_proj" in name or "out_proj" in name else 1.0) * _default(name, shape, seed)


def _dit_tensor(name: str, shape: torch.Size, hidden: int, seed: int) -> torch.Tensor:
    carried = PATCH * LATENT_CHANNELS  # the part of the stream that holds the noisy latents of a token
    if name.endswith("norm.weight"):
        return torch.full(shape, next((gain for part, gain in NORM_GAINS.items() if part in name), 1.0))
    if name.endswith(("img_attn_qkv.bias", "linear1.bias")):  # queries come first, then keys, values and the MLP
        return torch.cat([_draw(name, (hidden,), QUERY_BIAS, seed), torch.zeros(shape.numel() - hidden)])
    if name == "img_in.proj.weight":
        return torch.eye(hidden, carried).reshape(shape)
    if name == "final_layer.linear.weight":
        # One colour for all latents of a token: the picture is smoother than the noise, and shows no grid.
        colours = (LATENT_CHANNELS, hidden - carried)
        picture = _draw(name, colours, PICTURE_GAIN * colours[1] ** -0.5, seed).repeat_interleave(PATCH, 0)
        return torch.cat([NOISE_GAIN * torch.eye(carried), picture], dim=1)
    if name == "final_layer.adaLN_modulation.1.weight":  # shifts, then scales
        is_picture = torch.arange(shape[0]) % hidden >= carried
        return TINT * _default(name, shape, seed) * is_picture[:, None]
    if name in ("time_in.mlp.2.weight", "guidance_in.mlp.2.weight"):
        return TIME_GAIN * _default(name, shape, seed)
    gain = MODULATION if "_mod." in name or "modulation." in name else 1.0
    return gain * _default(name, shape, seed)


def _vae_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    if shape[2:] != (3, 3, 3):
        return _default(name, shape, seed)
    # Rows of sum zero: what SiLU leaves in every channel alike would otherwise grow, layer by layer, into one colour.
    mix = _draw(name, shape[:2], (2 * shape[1]) ** -0.5, seed)
    mix = (mix - mix.roll(1, dims=1))[:, :, None, None, None]
    grain = GRAIN * _draw(f"{name}/grain", shape, _fan_in(shape) ** -0.5, seed)
    gain = CONTRAST if name == "decoder.conv_out.conv.weight" else 1.0
    return gain * (mix * (LAG[:, None, None] * BLUR[:, None] * BLUR) + grain)


def _default(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Norms at one, biases at zero, and matrices that keep the deviation of what they multiply."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    return _draw(name, shape, _fan_in(shape) ** -0.5, seed)


def _draw(name: str, shape: Sequence[int], std: float, seed: int) -> torch.Tensor:
    """Values of mean 0 and deviation `std`; uniform, because those take no logarithm: just bits and a product."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    uniform = np.random.default_rng(np.frombuffer(key, np.uint32)).random(tuple(shape), np.float32)
    return torch.from_numpy((uniform * 2 - 1) * np.float32(std * 3**0.5))


def _shapes(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    return ((name, tensor.shape) for name, tensor in model.state_dict().items())


def _fan_in(shape: torch.Size) -> int:
    return shape[1:].numel()
