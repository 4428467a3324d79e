"""diffusers' HunyuanVideo transformer with hv_batch's weights, as an independent implementation to compare with."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from hv_batch.architecture import DiTConfig
from hv_batch.engine.dit.fp8_storage import block_linears, hold_in_fp8, quantise
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.protocol import ParallelPlan, RankSpec
from hv_batch.sampling_params import SamplingParams

# The smallest video with several latent frames, and the place of a rank that renders alone.
SMALL_VIDEO = SamplingParams(
    prompt="a",
    negative_prompt="",
    height=32,
    width=48,
    num_frames=5,
    num_inference_steps=2,
    seed=0,
    guidance_scale=6.0,
    cfg_scale=1.0,
    guidance_rescale=0.0,
    flow_shift=7.0,
)
ALONE = RankSpec(rank=0, local_rank=0, plan=ParallelPlan(), device="cpu", address="", timeout_s=0.0)

# Released name -> diffusers name; the first match applies.
RENAMES = [
    (r"^img_in\.proj", "x_embedder.proj"),
    (r"^txt_in\.input_embedder", "context_embedder.proj_in"),
    (r"^txt_in\.t_embedder\.mlp\.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
    (r"^txt_in\.t_embedder\.mlp\.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
    (r"^txt_in\.c_embedder", "context_embedder.time_text_embed.text_embedder"),
    (r"^txt_in\.individual_token_refiner\.blocks", "context_embedder.token_refiner.refiner_blocks"),
    (r"^time_in\.mlp\.0", "time_text_embed.timestep_embedder.linear_1"),
    (r"^time_in\.mlp\.2", "time_text_embed.timestep_embedder.linear_2"),
    (r"^guidance_in\.mlp\.0", "time_text_embed.guidance_embedder.linear_1"),
    (r"^guidance_in\.mlp\.2", "time_text_embed.guidance_embedder.linear_2"),
    (r"^vector_in\.in_layer", "time_text_embed.text_embedder.linear_1"),
    (r"^vector_in\.out_layer", "time_text_embed.text_embedder.linear_2"),
    (r"^final_layer\.linear", "proj_out"),
    (r"^final_layer\.adaLN_modulation\.1", "norm_out.linear"),
    (r"^double_blocks", "transformer_blocks"),
    (r"^single_blocks", "single_transformer_blocks"),
]
WITHIN_BLOCKS = [
    (r"self_attn_proj", "attn.to_out.0"),
    (r"adaLN_modulation\.1", "norm_out.linear"),
    (r"img_mod\.linear", "norm1.linear"),
    (r"txt_mod\.linear", "norm1_context.linear"),
    (r"img_attn_([qk])_norm", r"attn.norm_\1"),
    (r"txt_attn_([qk])_norm", r"attn.norm_added_\1"),
    (r"img_attn_proj", "attn.to_out.0"),
    (r"txt_attn_proj", "attn.to_add_out"),
    (r"img_mlp", "ff"),
    (r"txt_mlp", "ff_context"),
    (r"\.mlp\.fc", ".ff.fc"),
    (r"ff(_context)?\.fc1", r"ff\1.net.0.proj"),
    (r"ff(_context)?\.fc2", r"ff\1.net.2"),
    (r"modulation\.linear", "norm.linear"),
    (r"linear2", "proj_out"),
    (r"(single_transformer_blocks\.\d+)\.([qk])_norm", r"\1.attn.norm_\2"),
]
FUSED = {
    "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def to_diffusers(state: dict[str, Tensor], hidden_size: int) -> dict[str, Tensor]:
    """Translate a state dict of the released layout to diffusers' names."""
    converted = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMES:
            name, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        if "blocks." in name:
            for pattern, replacement in WITHIN_BLOCKS:
                name = re.sub(pattern, replacement, name)
        if name.startswith("norm_out"):  # (shift, scale) in the release, (scale, shift) in diffusers
            tensor = torch.cat(tensor.chunk(2)[::-1])
        fused = next((part for part in FUSED if f".{part}." in name and "time_text_embed" not in name), None)
        if fused is None:
            converted[name] = tensor
            continue
        sizes = [hidden_size] * 3 + [tensor.shape[0] - 3 * hidden_size] * (len(FUSED[fused]) == 4)
        for part, piece in zip(FUSED[fused], tensor.split(sizes), strict=True):
            converted[name.replace(fused, part)] = piece
    return converted


def reference_model(model: HYVideoDiT) -> Any:
    """Return diffusers' transformer with the config and weights of `model`."""
    # Imported here, because the ranks of a group import this module and importing diffusers takes seconds.
    from diffusers import HunyuanVideoTransformer3DModel

    config = model.config
    reference = HunyuanVideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.heads_num,
        attention_head_dim=config.hidden_size // config.heads_num,
        num_layers=config.mm_double_blocks_depth,
        num_single_layers=config.mm_single_blocks_depth,
        num_refiner_layers=config.refiner_depth,
        mlp_ratio=config.mlp_width_ratio,
        patch_size=config.patch_size[1],
        patch_size_t=config.patch_size[0],
        guidance_embeds=config.guidance_embed,
        text_embed_dim=config.text_states_dim,
        pooled_projection_dim=config.text_states_dim_2,
        rope_axes_dim=tuple(config.rope_dim_list),
    )
    reference.load_state_dict(to_diffusers(model.state_dict(), config.hidden_size), strict=True)
    return reference.eval()


def random_dit(config: DiTConfig, seed: int, attention: str = "sdpa") -> HYVideoDiT:
    """Return a model with random parameters only: norms and gates are not 0 or 1, so every parameter has an effect."""
    model = HYVideoDiT(config, attention=attention)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.dim() > 1:
            noise *= parameter[0].numel() ** -0.5  # keeps the activations near unit size at any depth
        else:
            noise = noise * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0)
        parameter.data.copy_(noise)
    return model.eval()


def random_inputs(config: DiTConfig, size: tuple[int, int, int], text_lengths: list[int], seed: int, padded: int):
    """Return keyword arguments of HYVideoDiT.forward. Text rows beyond an item's length are random, not zero."""
    draw = torch.Generator().manual_seed(seed)
    batch = len(text_lengths)
    return {
        "latents": torch.randn(batch, config.in_channels, *size, generator=draw),
        "timestep": torch.rand(batch, generator=draw) * 1000,
        "text_states": torch.randn(batch, padded, config.text_states_dim, generator=draw),
        "text_lengths": text_lengths,
        "pooled": torch.randn(batch, config.text_states_dim_2, generator=draw),
        "guidance": torch.full((batch,), 6000.0) if config.guidance_embed else None,
    }


def keep_in_fp8(model: HYVideoDiT) -> None:
    """Quantise the blocks' Linears in place. The result equals an FP8 checkpoint loaded with `fp8: storage`."""
    linears = block_linears(model)
    hold_in_fp8(model, linears)
    for name, linear in linears.items():
        weight, scale = quantise(linear.weight)
        state = {"weight": weight, "bias": linear.bias, "scale": scale.to(linear.weight.dtype)}
        model.get_submodule(name).load_state_dict(state, assign=True)
