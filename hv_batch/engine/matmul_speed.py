"""The speed of this CPU, for an estimate before a long render."""

from __future__ import annotations

import math
import time

import torch

SIDE = 384  # large enough that a product takes milliseconds; in a slow type it takes half a second
ENOUGH_S = 0.2  # a product that takes so long is not repeated


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of one thread, with which the engine computes on a CPU, in a matrix product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = torch.ones(SIDE, SIDE, dtype=dtype)
        best_s = math.inf
        for _ in range(3):  # the first one also loads code
            begun = time.perf_counter()
            matrix @ matrix
            best_s = min(best_s, time.perf_counter() - begun)
            if best_s > ENOUGH_S:
                break
    finally:
        torch.set_num_threads(threads)
    return 2 * SIDE**3 / best_s
