"""Settings that make a process deterministic (the official `--reproduce`)."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def make_deterministic(seed: int) -> None:
    """Seed all generators and make operations without a deterministic kernel raise. Call it before any work on a GPU.

    The engine never draws from the global generators, so this changes no bit on a CPU. On CUDA it prevents cuBLAS and
    cuDNN from choosing kernels by measured speed.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first cuBLAS handle is created
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
