"""The VAE decoder of one process: converts latents to uint8 frames."""

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
from hv_batch.protocol import NonFiniteError
from hv_batch.sampling_params import LATENT_CHANNELS


class HunyuanDecoder:
    """The tiled VAE decoder; the ranks of `mesh` divide the tiles (satisfies `hv_batch.protocol.Decoder`)."""

    def __init__(self, vae: CausalVAE, geometry: TileGeometry, mesh: SequenceMesh) -> None:
        self._vae = vae
        self._geometry = geometry
        self._mesh = mesh

    def self_check(self) -> None:
        """Raise DeviceError if the group decodes other pixels than one rank alone."""
        check_decoding(self._vae, self._mesh)

    def decode(self, latents: np.ndarray) -> Generator[np.ndarray, None, None]:
        """On rank 0, yield the frames of latents [16, T, h, w], in order, as uint8 chunks [frames, 8h, 8w, 3].

        On other ranks, yields nothing. Raises ValueError if the shape is wrong, and NonFiniteError if the latents or
        the decoded frames are not finite.
        """
        if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS:
            raise ValueError(f"latents must be shaped [{LATENT_CHANNELS}, T, h, w], not {list(latents.shape)}")
        if not np.isfinite(latents).all():
            raise NonFiniteError("the latents to decode are not finite, so the VAE is not the cause")
        # A copy: arrays from the object store are read-only, and torch.from_numpy warns about read-only arrays.
        z = torch.from_numpy(np.array(latents, np.float32))[None]
        return self._frames(decode_in_group(self._vae, z, self._geometry, self._mesh))

    def _frames(self, chunks: Iterator[Tensor]) -> Generator[np.ndarray, None, None]:
        try:
            yield from map(to_uint8, chunks)
        finally:
            if self._mesh.world_size > 1:  # receive the tiles that other ranks still send; see Denoiser.decode
                deque(chunks, maxlen=0)
