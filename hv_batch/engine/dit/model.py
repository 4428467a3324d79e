"""The HunyuanVideo diffusion transformer: latents, timestep and text in, velocity out.

Reads from top to bottom as the model runs. Parameter names and shapes are those of the released checkpoint
("HYVideo-T/2-cfgdistill", spec section 2), so its state dict loads as it is.

A batch (two items, with classifier-free guidance) is run item by item. At video lengths one item fills any device, so
nothing is lost; each item keeps only its own valid text tokens, no padding exists to be masked, and an item's
result is the same bits whatever it is batched with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hv_batch.architecture import DiTConfig
from hv_batch.engine.attention import choose_kernel
from hv_batch.engine.dit.blocks import DoubleStreamBlock, FinalLayer, SingleStreamBlock
from hv_batch.engine.dit.embeddings import (
    MLPEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    TokenRefiner,
    patchify,
    rope_table,
    unpatchify,
)
from hv_batch.engine.parallel.sequence import JointAttention, SequenceMesh, attend_jointly
from hv_batch.engine.step_cache import StepCache
from hv_batch.protocol import UserError

ONE_RANK = SequenceMesh.single()


class HYVideoDiT(nn.Module):
    """The network. `attention` names the kernel: sdpa, cudnn, flash or math.

    `joint_attention` is how the ranks of a mesh attend together; `XfuserAttention` may take its place.
    """

    def __init__(self, config: DiTConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.joint_attention: JointAttention = attend_jointly
        width, heads = config.hidden_size, config.heads_num
        pt, ph, pw = config.patch_size

        self.img_in = PatchEmbed(config.patch_size, config.in_channels, width)
        self.txt_in = TokenRefiner(config.text_states_dim, width, heads, config.refiner_depth)
        self.time_in = TimestepEmbedder(width)
        self.vector_in = MLPEmbedder(config.text_states_dim_2, width)
        self.guidance_in = TimestepEmbedder(width) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(width, heads, config.mlp_width) for _ in range(config.mm_double_blocks_depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(width, heads, config.mlp_width) for _ in range(config.mm_single_blocks_depth)
        )
        self.final_layer = FinalLayer(width, pt * ph * pw * config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic (quantised blocks may store another)."""
        return self.img_in.proj.weight.dtype

    @torch.no_grad()
    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text_states: Tensor,
        text_lengths: Sequence[int],
        pooled: Tensor,
        guidance: Tensor | None,
        mesh: SequenceMesh = ONE_RANK,
        caches: Sequence[StepCache] = (),
    ) -> Tensor:
        """Velocity [B, out_channels, T, h, w] in the model's dtype, the same bits on every rank of the mesh.

        All inputs are equal on all ranks. latents [B, in_channels, T, h, w], h and w multiples of the patch; timestep
        [B], sigma * 1000; text_states [B, S, text_states_dim], right-padded, of which the first text_lengths[b] >= 1
        are read; pooled [B, text_states_dim_2]; guidance [B], scale * 1000, given exactly when the model embeds it.
        `caches`, one an item or none, may spare it blocks, and then change the result; see `engine.step_cache`.
        Raises ValueError for inputs that break this, UserError when the heads do not split over the mesh.
        """
        if (guidance is None) == self.config.guidance_embed:
            raise ValueError(f"guidance_embed is {self.config.guidance_embed}, but guidance is {guidance}")
        batch, longest = text_states.shape[:2]
        if len(text_lengths) != batch or not all(1 <= length <= longest for length in text_lengths):
            raise ValueError(f"text lengths {list(text_lengths)} must be {batch} numbers from 1 to {longest}")
        if self.config.heads_num % mesh.ulysses_degree:
            raise UserError(
                f"parallel.ulysses_degree {mesh.ulysses_degree} does not divide the model's {self.config.heads_num} "
                f"attention heads; choose a divisor, and put the other ranks into parallel.ring_degree."
            )
        velocities = []
        for item, text_len in enumerate(text_lengths):
            vec = self._conditioning(timestep[item], pooled[item], None if guidance is None else guidance[item])
            cache = caches[item] if caches else None
            text = text_states[item, :text_len]
            velocities.append(self._velocity(latents[item], timestep[item], text, vec, mesh, cache))
        return torch.stack(velocities)

    def _conditioning(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector that modulates every block."""
        vec = self.time_in(timestep) + self.vector_in(pooled.to(self.dtype))
        if self.guidance_in is not None and guidance is not None:
            # Rounded to the model's dtype before the sinusoid, as the released run does (6000 is no bfloat16).
            vec = vec + self.guidance_in(guidance.to(self.dtype))
        return vec

    def _velocity(
        self, latents: Tensor, timestep: Tensor, text: Tensor, vec: Tensor, mesh: SequenceMesh, cache: StepCache | None
    ) -> Tensor:
        kernel = choose_kernel(self.attention, latents.device, self.dtype)

        patches, grid = patchify(latents.to(self.dtype), self.config.patch_size)
        image_len, text_len = patches.shape[0], text.shape[0]
        img = self.img_in(mesh.shard(patches))
        txt = self.txt_in(text, timestep, kernel)
        rope = torch.complex(*rope_table(grid, mesh.span(image_len), tuple(self.config.rope_dim_list), latents.device))
        attend = partial(self.joint_attention, text_len=text_len, image_len=image_len, mesh=mesh, kernel=kernel)

        if cache:
            cache.begin(img)
        for number, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, vec, rope, attend)
            if cache and number == 0:
                recalled = cache.recall(img, image_len, mesh)
                if recalled is not None:
                    return self._output(recalled, vec, grid, mesh)
        x = torch.cat((txt, img))
        del txt, img
        for block in self.single_blocks:
            x = block(x, vec, text_len, rope, attend)
        if cache:
            cache.keep(x[text_len:])
        return self._output(x[text_len:], vec, grid, mesh)

    def _output(self, img: Tensor, vec: Tensor, grid: tuple[int, int, int], mesh: SequenceMesh) -> Tensor:
        """The velocity that this rank's image tokens and the others' come to."""
        return unpatchify(mesh.gather(self.final_layer(img, vec), math.prod(grid)), grid, self.config.patch_size)
