"""The VAE decoder of one process: latents in, uint8 frames out."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor

from hv_batch.architecture import TileGeometry
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.self_check import check_decoding
from hv_batch.engine.vae.group_decode import decode_in_group
from hv_batch.engine.vae.model import CausalVAE
from hv_batch.engine.vae.tiling import to_uint8
from hv_batch.protocol import LATENT_CHANNELS


class HunyuanDecoder:
    """The VAE with its tiling, which the ranks of a mesh share out (satisfies `hv_batch.protocol.Decoder`)."""

    def __init__(self, vae: CausalVAE, geometry: TileGeometry, mesh: SequenceMesh) -> None:
        self._vae = vae
        self._geometry = geometry
        self._mesh = mesh

    def self_check(self) -> None:
        """Raises DeviceError where the ranks together decode other pixels than one alone."""
        check_decoding(self._vae, self._mesh)

    def decode(self, latents: np.ndarray) -> Generator[np.ndarray, None, None]:
        """Frames of latents [16, T, h, w], in order, as uint8 chunks [frames, 8h, 8w, 3]; nothing but on rank 0.

        Raises ValueError for latents of another shape, NotFiniteError when the VAE yields such values.
        """
        if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS:
            raise ValueError(f"latents must be shaped [{LATENT_CHANNELS}, T, h, w], not {list(latents.shape)}")
        # A copy: what the object store hands out is read-only, which torch.from_numpy warns of.
        z = torch.from_numpy(np.array(latents, np.float32))[None]
        return self._frames(decode_in_group(self._vae, z, self._geometry, self._mesh))

    def _frames(self, chunks: Iterator[Tensor]) -> Generator[np.ndarray, None, None]:
        try:
            yield from map(to_uint8, chunks)
        finally:
            if self._mesh.world_size > 1:  # what the other ranks still decode is sent here: see Denoiser.decode
                deque(chunks, maxlen=0)
