"""Compare the tensors of a file with those that a model needs, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from hv_batch.engine.checkpoint.tensor_files import StoredTensor
from hv_batch.protocol import UserError

Shapes = Mapping[str, tuple[int, ...]]

# Of tensors whose values are used as they are. Integers and 8-bit floats are quantised and mean something else without
# their scales.
PLAIN_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

_NAMES_SHOWN = 4  # number of tensor names in a message: enough to recognise a wrong width, depth or prefix


def check_tensors(
    expected: Shapes,
    tensors: Mapping[str, StoredTensor],
    path: Path,
    remedy: str,
    *,
    may_have_others: bool = False,
    quantised: Iterable[str] = (),
) -> None:
    """Raise UserError unless the tensors match `expected` one to one, by name and shape, and have plain dtypes.

    With `may_have_others`, further tensors are ignored. The dtypes of the tensors `quantised` are not checked. `remedy`
    is the beginning of the last sentence of the message.
    """
    names, skipped = [name for name in expected if name in tensors], set(quantised)
    differences = {
        "missing": [name for name in expected if name not in tensors],
        "not of this model": [] if may_have_others else [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} is {list(tensors[name].shape)}, must be {list(expected[name])}"
            for name in names
            if tensors[name].shape != expected[name]
        ],
        "of a dtype that is not supported": [
            f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}, must be a float of 16 bits or more"
            for name in names
            if tensors[name].dtype not in PLAIN_DTYPES and name not in skipped
        ],
    }
    counts = [f"{len(names)} {what} ({shortened(names)})" for what, names in differences.items() if names]
    if counts:
        raise UserError(
            f"{path} does not fit the configured model. Tensors: {'; '.join(counts)}. {remedy}, or set the path of the "
            "right file."
        )


def shortened(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
