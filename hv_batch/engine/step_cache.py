"""A step that changes little takes over what the blocks computed before: the engine option `step_cache`.

    tokens --first block--> what it adds;  how far is that from what it added at the last step that was computed?
        nearer than the threshold:  the other blocks are left out, and what they added then is added again
        else:                       they are computed, and what they add is kept

Known as first-block cache: ParaAttention has it, and TeaCache (arXiv 2411.19108) decides alike, by the first block's
input. The pixels are others, so the threshold is part of a video's identity.

Two in every `REFRESH` steps, and the last one, are computed whatever changes, which bounds how far a trajectory can
drift. All that comes after the first of the two depends on the latents before it alone, so that a step checkpoint need
not hold the cache; and whoever starts or resumes knows after the second how long a whole step takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hv_batch.engine.parallel.sequence import SequenceMesh

REFRESH = 5  # steps


def is_fresh(step: int, steps: int) -> bool:
    """Whether the step after `step` others, of `steps`, computes all blocks."""
    return step % REFRESH < 2 or step == steps - 1


def can_resume(step: int) -> bool:
    """Whether what comes after `step` steps depends on their latents alone."""
    return step % REFRESH == 0


class StepCache:
    """Of one item: a video, and a branch of its guidance. Holds twice what a rank has of the image tokens, [l, C]."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._tokens: Tensor | None = None  # where the block or blocks under way began
        self._first: Tensor | None = None
        self._others: Tensor | None = None

    def forget(self) -> None:
        self._first = self._others = None

    def begin(self, tokens: Tensor) -> None:
        """The image tokens before the first block."""
        self._tokens = tokens

    def recall(self, tokens: Tensor, image_len: int, mesh: SequenceMesh) -> Tensor | None:
        """The tokens after all blocks, given those after the first; None where the others are to be computed.

        Rows past `image_len` (counted over all ranks) are padding. Every rank of the mesh comes to the same answer: the
        change is that of all tokens.
        """
        assert self._tokens is not None
        first = tokens - self._tokens
        if self._first is not None and self._others is not None and self._is_near(first, self._first, image_len, mesh):
            self._tokens = None
            return tokens + self._others
        self._tokens, self._first, self._others = tokens, first, None
        return None

    def keep(self, tokens: Tensor) -> None:
        """The tokens after all blocks, which have been computed."""
        assert self._tokens is not None
        self._others, self._tokens = tokens - self._tokens, None

    def _is_near(self, now: Tensor, before: Tensor, image_len: int, mesh: SequenceMesh) -> bool:
        begin, end = mesh.span(image_len)
        rows = max(0, min(end, image_len) - begin)
        sizes = [torch.linalg.vector_norm(x[:rows], ord=1, dtype=torch.float32) for x in (now - before, before)]
        # Summed in the order of the ranks by each of them, so that all have the same bits to decide by.
        change, size = mesh.gather(torch.stack(sizes)[None], mesh.size).sum(0).tolist()
        return bool(change < self._threshold * size)
