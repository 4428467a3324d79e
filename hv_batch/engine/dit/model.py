"""The HunyuanVideo diffusion transformer: predicts the velocity from latents, timestep and text.

The module runs in the order of its code. Parameter names and shapes are those of the released checkpoint
("HYVideo-T/2-cfgdistill"), so its state dict loads without changes.

The items of a batch (two with classifier-free guidance) run one by one. At video lengths one item fills any device, so
this costs no speed. Each item uses only its own valid text tokens, so no padding must be masked, and the bits of an
item do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hv_batch.architecture import DiTConfig
from hv_batch.attention_methods import DENSE, StepAttention
from hv_batch.engine.attention.block_sparse import SparseKernel
from hv_batch.engine.attention.kernels import choose_kernel
from hv_batch.engine.attention.quantized import choose_quantized
from hv_batch.engine.attention.token_order import block_layout
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
from hv_batch.protocol import UserError

ONE_RANK = SequenceMesh.single()


class HYVideoDiT(nn.Module):
    """The transformer. `attention` names the kernel: sdpa, cudnn, flash or math.

    `joint_attention` computes the attention across the ranks of a mesh; `XfuserAttention` may replace it.
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
        """The dtype of the arithmetic. Quantised blocks may store their weights in another dtype."""
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
        attention: StepAttention = DENSE,
    ) -> Tensor:
        """Return the velocity [B, out_channels, T, h, w] in the model's dtype, equal on every rank of the mesh.

        All inputs must be equal on all ranks:

        - latents [B, in_channels, T, h, w]; h and w must be multiples of the patch
        - timestep [B]: sigma * 1000
        - text_states [B, S, text_states_dim], right-padded; the first text_lengths[b] >= 1 rows of item b are read
        - pooled [B, text_states_dim_2]
        - guidance [B]: scale * 1000; must be given if and only if the model has a guidance embedding
        - attention: the methods of this step, which change the result

        Raises ValueError if the inputs break these rules, and UserError if the Ulysses degree does not divide the
        heads.
        """
        if (guidance is None) == self.config.guidance_embed:
            raise ValueError(f"guidance must be given if and only if guidance_embed is set; it is {guidance}")
        batch, longest = text_states.shape[:2]
        if len(text_lengths) != batch or not all(1 <= length <= longest for length in text_lengths):
            raise ValueError(f"text lengths {list(text_lengths)} must be {batch} numbers from 1 to {longest}")
        if self.config.heads_num % mesh.ulysses_degree:
            raise UserError(
                f"parallel.ulysses_degree {mesh.ulysses_degree} does not divide the model's {self.config.heads_num} "
                f"attention heads; choose a divisor, and use parallel.ring_degree for the other ranks."
            )
        velocities = []
        for item, text_len in enumerate(text_lengths):
            vec = self._conditioning(timestep[item], pooled[item], None if guidance is None else guidance[item])
            text = text_states[item, :text_len]
            velocities.append(self._velocity(latents[item], timestep[item], text, vec, mesh, attention))
        return torch.stack(velocities)

    def _conditioning(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector that modulates every block."""
        vec = self.time_in(timestep) + self.vector_in(pooled.to(self.dtype))
        if self.guidance_in is not None and guidance is not None:
            # Rounded to the model's dtype before the sinusoid, as in the released run (bfloat16 cannot represent 6000).
            # float16 cannot represent all of its range: above 65504, it stays as it is.
            rounded = guidance.to(self.dtype)
            vec = vec + self.guidance_in(torch.where(rounded.isfinite(), rounded.float(), guidance.float()))
        return vec

    def _velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        vec: Tensor,
        mesh: SequenceMesh,
        attention: StepAttention,
    ) -> Tensor:
        kernel = choose_kernel(self.attention, latents.device, self.dtype)

        patches, grid = patchify(latents.to(self.dtype), self.config.patch_size)
        image_len, text_len = patches.shape[0], text.shape[0]
        sparse, layout = attention.sparse, None
        if sparse:
            layout = block_layout(grid, sparse.brick, sparse.neighbours, latents.device)
            patches = patches[layout.order]
        img = self.img_in(mesh.shard(patches))
        txt = self.txt_in(text, timestep, kernel)
        brick = sparse.brick if sparse else None
        table = rope_table(grid, mesh.span(image_len), tuple(self.config.rope_dim_list), latents.device, brick)
        rope = torch.complex(*table)
        if sparse and layout:
            kernel = SparseKernel(sparse, layout, text_len, kernel)
        elif attention.quantized:
            kernel = choose_quantized(attention.quantized)
        attend = partial(self.joint_attention, text_len=text_len, image_len=image_len, mesh=mesh, kernel=kernel)

        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope, attend)
        x = torch.cat((txt, img))
        del txt, img
        for block in self.single_blocks:
            x = block(x, vec, text_len, rope, attend)
        tokens = mesh.gather(self.final_layer(x[text_len:], vec), image_len)
        return unpatchify(tokens if layout is None else tokens[layout.inverse], grid, self.config.patch_size)
