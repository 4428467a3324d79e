"""Measures the peak memory of live tensors, to verify the memory model.

Every storage that an operation allocates is counted until its last tensor is freed, on any device. On the `meta`
device, which computes nothing, a forward at the released width and size takes one second. Memory that a kernel
allocates and frees internally is not counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Use as `with LiveBytes() as traced: ...`, then read `traced.peak` (bytes).

    Tensors that existed before, such as weights and inputs, are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._drop, size)
        return result

    def _drop(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
