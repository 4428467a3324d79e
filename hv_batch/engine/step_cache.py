"""The step cache: a step that changes little reuses the output of the blocks (engine option `step_cache`).

Each step computes the first block and compares its residual (output minus input) with that of the last step that was
computed completely:

    relative change below the threshold:  skip the other blocks and add their cached residual
    otherwise:                            compute the other blocks and cache their residual

The method is known as first-block cache and is implemented in ParaAttention; TeaCache (arXiv 2411.19108) decides by the
input of the first block. It changes the pixels, so the threshold is part of a video's identity.

Two of every `REFRESH` steps, and the last step, are always computed completely. This bounds the drift of a trajectory.
The first of the two discards the cache, so all later steps depend only on the latents before it, and a step checkpoint
does not have to store the cache. After the second one, the duration of a complete step is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hv_batch.engine.parallel.sequence import SequenceMesh

REFRESH = 5  # steps


def is_fresh(step: int, steps: int) -> bool:
    """Return whether step number `step` (from 0) of `steps` computes all blocks."""
    return step % REFRESH < 2 or step == steps - 1


def can_resume(step: int) -> bool:
    """Return whether the steps after `step` finished steps depend only on the latents."""
    return step % REFRESH == 0


class StepCache:
    """The cache of one batch item: one guidance branch of one video.

    Holds two residuals, each as large as the rank's image tokens [l, C].
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._tokens: Tensor | None = None  # input of the current block or blocks
        self._first: Tensor | None = None  # residual of the first block at the last complete step
        self._others: Tensor | None = None  # residual of the other blocks at the last complete step

    def clear(self) -> None:
        """Discard the residuals, so that the next step computes all blocks."""
        self._first = self._others = None

    def begin(self, tokens: Tensor) -> None:
        """Store the image tokens before the first block."""
        self._tokens = tokens

    def lookup(self, tokens: Tensor, image_len: int, mesh: SequenceMesh) -> Tensor | None:
        """Return the tokens after all blocks, given those after the first; None if the others must be computed.

        Rows past `image_len` (counted over all ranks) are padding. All ranks of the mesh return the same decision,
        because they compare the change over the tokens of all ranks.
        """
        assert self._tokens is not None
        first = tokens - self._tokens
        if self._first is not None and self._others is not None and self._is_near(first, self._first, image_len, mesh):
            self._tokens = None
            return tokens + self._others
        self._tokens, self._first, self._others = tokens, first, None
        return None

    def store(self, tokens: Tensor) -> None:
        """Store the residual of the other blocks, given the tokens after all blocks."""
        assert self._tokens is not None
        self._others, self._tokens = tokens - self._tokens, None

    def _is_near(self, now: Tensor, before: Tensor, image_len: int, mesh: SequenceMesh) -> bool:
        begin, end = mesh.span(image_len)
        rows = max(0, min(end, image_len) - begin)
        sizes = [torch.linalg.vector_norm(x[:rows], ord=1, dtype=torch.float32) for x in (now - before, before)]
        # Every rank sums in rank order, so all ranks decide by the same bits.
        change, size = mesh.gather(torch.stack(sizes)[None], mesh.size).sum(0).tolist()
        return bool(change < self._threshold * size)
