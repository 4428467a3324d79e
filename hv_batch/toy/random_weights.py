"""Random weights for the untrained toy checkpoint, with which renders show moving coloured fields.

Weights from a usual initialization render grey noise. With these weights, the prompt determines the colours and the
fields, and the seed their detail. Each part of the model contributes:

- The first half of the DiT's residual stream carries the noisy latents from the first layer to the last, which returns
  them as velocity. The sampler therefore removes the noise within one trajectory. The other half carries the picture.
- The query biases of the image tokens are large. Rotated by position, they make the attention of a token to the words
  of the prompt a smooth function of the position and the frame of the token. The values of the words form the picture.
- The modulation of the last layer, which depends on the pooled vector, tints the picture.
- The kernels of the VAE mix channels at random but are smooth in space and time, so latents decode to soft shapes.

Every value is a function of the seed and the name of the tensor only, computed by exact arithmetic, so all machines get
the same bits. The gains below were chosen by looking at frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from hv_batch.sampling_params import LATENT_CHANNELS

State = dict[str, torch.Tensor]

PATCH = 1 * 2 * 2  # latents per token and channel
QUERY_BIAS = 2.0  # standard deviation; that of the content is 1
# Gains of RMS norms. There are twenty times as many image tokens as words, so the keys of image tokens are damped and
# those of words amplified.
NORM_GAINS = {"img_attn_k_norm": 0.3, "txt_attn_k_norm": 2.5, "q_norm": 1.5}
MODULATION = 0.5  # standard deviation of shifts, scales and gates
NOISE_GAIN = 1.0  # velocity per unit of carried noise
PICTURE_GAIN = 2.0  # velocity per unit of picture
TINT = 1.5  # modulation of the picture in the last layer
TIME_GAIN = 0.3  # timestep and guidance in the modulation vector; with a larger gain they tint all prompts alike
TEXT_ATTENTION = 3.0  # attention of the text towers; with a smaller gain the end token dominates the pooled vector
GRAIN = 0.3  # deviation of a VAE kernel from its smooth shape, relative to the kernel
CONTRAST = 0.8  # gain of the last convolution, so that pixels fill their range of [-1, 1]
BLUR = torch.tensor([1.0, 2.0, 1.0]) / 4
LAG = torch.tensor([0.0, 1.0, 3.0]) / 4  # oldest frame first; a kernel as wide as BLUR would suppress motion


def dit_state(model: nn.Module, seed: int) -> State:
    shapes = dict(_shapes(model))
    hidden = shapes["img_in.proj.bias"].numel()
    return {name: _dit_tensor(name, shape, hidden, seed) for name, shape in shapes.items()}


def vae_state(model: nn.Module, seed: int) -> State:
    return {name: _vae_tensor(name, shape, seed) for name, shape in _shapes(model)}


def text_state(model: nn.Module, seed: int) -> State:
    """Return random weights of a text tower.

    Norms are one and biases zero; every token has a direction of its own and attends strongly to other tokens.
    """
    return {name: _text_tensor(name, shape, seed) for name, shape in _shapes(model)}


def _text_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    if "position_embedding" in name:
        return _draw(name, shape, 0.1, seed)  # larger ones would make the prompt's length dominate its pooled vector
    if "embed" in name:
        return _draw(name, shape, 1.0, seed)
    return (TEXT_ATTENTION if "o_proj" in name or "out_proj" in name else 1.0) * _default(name, shape, seed)


def _dit_tensor(name: str, shape: torch.Size, hidden: int, seed: int) -> torch.Tensor:
    carried = PATCH * LATENT_CHANNELS  # width of the part of the residual stream that holds a token's noisy latents
    if name.endswith("norm.weight"):
        return torch.full(shape, next((gain for part, gain in NORM_GAINS.items() if part in name), 1.0))
    if name.endswith(("img_attn_qkv.bias", "linear1.bias")):  # order: queries, keys, values, MLP
        return torch.cat([_draw(name, (hidden,), QUERY_BIAS, seed), torch.zeros(shape.numel() - hidden)])
    if name == "img_in.proj.weight":
        return torch.eye(hidden, carried).reshape(shape)
    if name == "final_layer.linear.weight":
        # All latents of a token get the same colour: the picture is smoother than the noise and has no grid.
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
    # Rows have the sum zero. SiLU adds the same offset to every channel; otherwise this offset would grow with each
    # layer until all pixels have the same colour.
    mix = _draw(name, shape[:2], (2 * shape[1]) ** -0.5, seed)
    mix = (mix - mix.roll(1, dims=1))[:, :, None, None, None]
    grain = GRAIN * _draw(f"{name}/grain", shape, _fan_in(shape) ** -0.5, seed)
    gain = CONTRAST if name == "decoder.conv_out.conv.weight" else 1.0
    return gain * (mix * (LAG[:, None, None] * BLUR[:, None] * BLUR) + grain)


def _default(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return norms of one, biases of zero, and matrices that preserve the standard deviation of their input."""
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    return _draw(name, shape, _fan_in(shape) ** -0.5, seed)


def _draw(name: str, shape: Sequence[int], std: float, seed: int) -> torch.Tensor:
    """Return values of mean 0 and standard deviation `std`.

    They are uniform, because normal values need a logarithm, whose last bits vary between machines.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    uniform = np.random.default_rng(np.frombuffer(key, np.uint32)).random(tuple(shape), np.float32)
    return torch.from_numpy((uniform * 2 - 1) * np.float32(std * 3**0.5))


def _shapes(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    return ((name, tensor.shape) for name, tensor in model.state_dict().items())


def _fan_in(shape: torch.Size) -> int:
    return shape[1:].numel()
