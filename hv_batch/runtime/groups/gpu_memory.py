"""Is a GPU really free? Ray counts reservations; a killed process's memory comes back when the GPU's driver is done.

A rank that loads 26 GB beside what is left of the last life runs out of memory, and a sample would be blamed for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hv_batch.runtime.classify import NodeError

# Contexts and displays take well below a tenth of a GPU; whatever else computes there takes more.
FREE_SHARE = 0.9

# Tearing down a killed process with all its memory takes seconds; what holds it longer does not let go by itself.
PATIENCE_S = 60.0
LOOK_EVERY_S = 0.5


def await_free_memory(memory: Callable[[], tuple[int, int]], where: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until `memory()`, the bytes (free, in all) of the GPU called `where`, is nearly all free.

    Raises NodeError, which sends the group elsewhere, when it is not after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while (found := memory())[0] < FREE_SHARE * found[1]:
        if time.monotonic() >= deadline:
            free, total = (amount / 2**30 for amount in found)
            raise NodeError(
                f"only {free:.1f} of {total:.1f} GiB of {where} are free, and stayed so for {patience_s:g} s: another "
                "process, perhaps one that could not be killed, holds the rest. See nvidia-smi there and end it: a "
                "rank with groups.gpus_per_rank = 1 needs its GPU whole"
            )
        time.sleep(LOOK_EVERY_S)
