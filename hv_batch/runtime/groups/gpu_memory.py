"""Waits until the memory of a GPU is free.

Ray counts reservations only. The memory of a killed process is released later, when the GPU driver has cleaned up. A
rank that loads 26 GB before that runs out of memory, and the failure would be charged to a sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hv_batch.runtime.classify import NodeError

# CUDA contexts and displays use much less than a tenth of a GPU. Any process that computes uses more.
FREE_SHARE = 0.9

# The cleanup of a killed process takes seconds. Memory that is held longer is not released without intervention.
TIMEOUT_S = 60.0
POLL_S = 0.5


def await_free_memory(memory: Callable[[], tuple[int, int]], where: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until nearly all memory of a GPU is free. `memory()` returns its (free, total) bytes; `where` is its name.

    Raises NodeError after `timeout_s`, so that the group can be placed on another node.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        free, total = memory()
        if free >= FREE_SHARE * total:
            return
        if time.monotonic() >= deadline:
            raise NodeError(
                f"only {free / 2**30:.1f} of {total / 2**30:.1f} GiB of {where} are free after {timeout_s:g} s: "
                "another process, perhaps one that could not be killed, uses the rest. Find it with nvidia-smi and end "
                "it: a rank with groups.gpus_per_rank = 1 needs the whole GPU"
            )
        time.sleep(POLL_S)
