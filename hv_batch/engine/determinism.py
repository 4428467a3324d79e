"""What in a process could make equal work end in unequal bits, switched off (the official `--reproduce`)."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def make_deterministic(seed: int) -> None:
    """Seed every generator and refuse every operation without a deterministic kernel; before any work on a GPU.

    Nothing here draws from the global generators, so on a CPU this changes no bit. On CUDA it keeps cuBLAS and cuDNN
    from choosing their kernels by what is fastest at the moment.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
