"""Build the three stages of a render as functions to time: text encoding, one DiT step, the tiled VAE decode.

Each builder creates models with random weights on the device. It returns a function that runs hv_batch and, if
diffusers is installed, one that runs diffusers at the same size. A builder runs just before its stage is timed, and its
models are freed before the next stage: only the models of one stage are in memory at a time.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hv_batch.architecture import MAX_TEXT_TOKENS, SKIPPED_LAYERS, VIDEO_TEXT_TOKENS, TileGeometry
from hv_batch.bench.measure import Work
from hv_batch.bench.presets import Preset, TextWidths
from hv_batch.engine.dit.fp8_matmul import multiply_in_fp8_
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.text_encoders import TextTowers
from hv_batch.engine.vae.model import CausalVAE
from hv_batch.engine.vae.tiling import decode_streaming
from hv_batch.sampling_params import LATENT_CHANNELS
from hv_batch.toy import tokenizers

PROMPT = "A cat walks on the grass, realistic style, soft light, the camera follows slowly."


@dataclass(frozen=True, slots=True)
class Stage:
    """The functions of one stage to time."""

    size: str
    dtype: torch.dtype
    ours: Work
    theirs: Callable[[], Work] | None  # builds the model of diffusers and returns its function; None if not installed


def has_diffusers() -> bool:
    return find_spec("diffusers") is not None


def text_stage(preset: Preset, device: torch.device) -> Stage:
    """Encode one prompt with both towers. diffusers runs all layers of the same weights."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        llama_dir, clip_dir = Path(folder, "llama"), Path(folder, "clip")
        llama_words = tokenizers.write_llama_tokenizer(llama_dir)
        clip_words = tokenizers.write_clip_tokenizer(clip_dir)
        llama_tokenizer, clip_tokenizer = (AutoTokenizer.from_pretrained(path) for path in (llama_dir, clip_dir))
    llama = random_module(lambda: _llama(preset.text, llama_words), device, preset.text_dtype)
    clip = random_module(lambda: _clip(preset.text, *clip_words), device, preset.text_dtype)
    towers = TextTowers.of_models(llama_tokenizer, _used_part(llama), clip_tokenizer, clip, device)

    def theirs() -> Work:
        from diffusers import HunyuanVideoPipeline

        pipeline: Any = HunyuanVideoPipeline(llama, llama_tokenizer, None, None, None, clip, clip_tokenizer)
        return _without_grad(lambda: pipeline.encode_prompt(PROMPT, device=device))

    size = f"{preset.text.llama_layers} layers of {preset.text.llama_width}, {_millions(llama, clip)}"
    return Stage(size, preset.text_dtype, lambda: towers.encode([PROMPT], image=False), _if_installed(theirs))


def dit_stage(preset: Preset, device: torch.device) -> Stage:
    """Run one forward pass with embedded guidance and without classifier-free guidance.

    The text is padded to the length of the release, which is larger for an image.
    """
    text_rows = MAX_TEXT_TOKENS if preset.dit_latents[0] == 1 else VIDEO_TEXT_TOKENS
    config, dtype = preset.dit, preset.dit_dtype
    model = random_module(lambda: HYVideoDiT(config, preset.attention), device, dtype)
    if preset.fp8:
        multiply_in_fp8_(model, device)
    latents = torch.randn(1, LATENT_CHANNELS, *preset.dit_latents, device=device).to(dtype)
    states = torch.randn(1, text_rows, config.text_states_dim, device=device).to(dtype)
    pooled = torch.randn(1, config.text_states_dim_2, device=device).to(dtype)
    timestep, guidance = (torch.full((1,), value, device=device) for value in (900.0, 6000.0))

    def ours() -> object:
        return model(latents, timestep, states, [preset.text_tokens], pooled, guidance)

    def theirs() -> Work:
        from diffusers import HunyuanVideoTransformer3DModel

        reference = random_module(
            lambda: HunyuanVideoTransformer3DModel(
                num_attention_heads=config.heads_num,
                attention_head_dim=config.hidden_size // config.heads_num,
                num_layers=config.mm_double_blocks_depth,
                num_single_layers=config.mm_single_blocks_depth,
                mlp_ratio=config.mlp_width_ratio,
                text_embed_dim=config.text_states_dim,
                pooled_projection_dim=config.text_states_dim_2,
                rope_axes_dim=tuple(config.rope_dim_list),
            ),
            device,
            dtype,
        )
        mask = (torch.arange(text_rows, device=device) < preset.text_tokens).long()[None]
        return _without_grad(
            lambda: reference(
                hidden_states=latents,
                timestep=timestep.to(dtype),
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                pooled_projections=pooled,
                guidance=guidance.to(dtype),
            )
        )

    frames, rows, columns = preset.dit_latents
    tokens = frames * rows * columns // 4  # patches of 1 x 2 x 2
    products = ", FP8 products" if preset.fp8 else ""
    text = f"text {preset.text_tokens} of {text_rows}"
    size = f"{tokens:,} tokens, {text}, {_millions(model)}, {preset.attention} attention{products}"
    return Stage(size, dtype, ours, _if_installed(theirs))


def vae_stage(preset: Preset, device: torch.device) -> Stage:
    """Decode in tiles of the released geometry. diffusers uses the same tiles and the same weights."""
    config, dtype, geometry = preset.vae, preset.vae_dtype, TileGeometry()
    vae = random_module(lambda: CausalVAE(config), device, dtype)
    latents = torch.randn(1, LATENT_CHANNELS, *preset.vae_latents, device=device) * config.scaling_factor

    def ours() -> None:
        for _chunk in decode_streaming(vae, latents, geometry):
            pass  # as in a render, which writes each chunk to ffmpeg and frees it

    def theirs() -> Work:
        from diffusers import AutoencoderKLHunyuanVideo

        with torch.device("meta"):
            reference: Any = AutoencoderKLHunyuanVideo(
                block_out_channels=config.block_out_channels,
                layers_per_block=config.layers_per_block,
                norm_num_groups=config.norm_num_groups,
            )
        reference.load_state_dict(vae.state_dict(), assign=True)
        space, time = geometry.space, geometry.time
        reference.requires_grad_(False).eval().enable_tiling(
            geometry.spatial_px,
            geometry.spatial_px,
            geometry.temporal_frames,
            space.stride_px,
            space.stride_px,
            time.stride_px,
        )
        z = (latents / config.scaling_factor).to(dtype)
        return _without_grad(lambda: reference.decode(z))

    frames, rows, columns = preset.vae_latents
    size = (
        f"{4 * frames - 3} frames of {8 * rows}x{8 * columns}, widths {', '.join(map(str, config.block_out_channels))}"
    )
    return Stage(size, dtype, ours, _if_installed(theirs))


STAGES: dict[str, Callable[[Preset, torch.device], Stage]] = {
    "text": text_stage,
    "dit": dit_stage,
    "vae": vae_stage,
}


def random_module(build: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Build a module with PyTorch's initial weights, directly on `device` and in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return build().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def _llama(widths: TextWidths, words: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            vocab_size=words,
            hidden_size=widths.llama_width,
            intermediate_size=widths.llama_mlp,
            num_hidden_layers=widths.llama_layers,
            num_attention_heads=widths.llama_heads,
            num_key_value_heads=widths.llama_kv_heads,
            max_position_embeddings=8192,
        )
    )


def _clip(widths: TextWidths, words: int, start: int, end: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=widths.clip_width,
            intermediate_size=4 * widths.clip_width,
            num_hidden_layers=widths.clip_layers,
            num_attention_heads=widths.clip_heads,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def _used_part(llama: Any) -> Any:
    """Return a view of the model without the last layers and the final norm, as `TextTowers` loads it."""
    part = copy.copy(llama)
    part._modules = dict(llama._modules)
    part.config = copy.deepcopy(llama.config)
    part.config.num_hidden_layers -= SKIPPED_LAYERS
    part.layers, part.norm = llama.layers[:-SKIPPED_LAYERS], nn.Identity()
    return part


def _without_grad(work: Work) -> Work:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run


def _if_installed(theirs: Callable[[], Work]) -> Callable[[], Work] | None:
    return theirs if has_diffusers() else None


def _millions(*models: nn.Module) -> str:
    parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
    return f"{parameters / 1e6:,.1f} M parameters"
