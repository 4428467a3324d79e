"""Chooses the attention kernel of a group for `attention: auto`, on all ranks together.

The kernels are tried in the order of `hv_batch.attention_kernels`. The first one that every rank can run, and that
passes the self-check, is the group's. All ranks exchange what they found before each decision, so they decide alike.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from hv_batch.attention_kernels import candidates
from hv_batch.engine.attention.kernels import KERNELS, kernel_problem
from hv_batch.engine.parallel.sequence import SequenceMesh
from hv_batch.engine.self_check import check_group, check_kernel
from hv_batch.protocol import DeviceError, UserError

if TYPE_CHECKING:
    from hv_batch.engine.dit.model import HYVideoDiT

logger = logging.getLogger(__name__)


def choose_for_group(model: HYVideoDiT, mesh: SequenceMesh, device: torch.device) -> str:
    """Set the attention kernel of `model` to the fastest one for this group, and return its name.

    Must be called on all ranks at the same time; returns the same name on each. Raises DeviceError if no kernel passes
    the self-check, which means that a device or a link is faulty.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    names = mesh.gather_objects(candidates(major, is_half=model.dtype is not torch.float32))[0]
    refused: dict[str, str] = {}
    for name in names:
        model.attention = name
        reason = _first(mesh.gather_objects(_problem(model, device))) or _first(
            mesh.gather_objects(_problem_of_group(model, mesh, device))
        )
        if reason is None:
            if mesh.world_rank == 0:
                others = "".join(f"; not {other}: {why}" for other, why in refused.items())
                logger.info(f"attention auto: {name}{others}")
            return str(name)
        refused[name] = reason
    raise DeviceError(
        "self-check: no attention kernel passes it: " + "; ".join(f"{name}: {why}" for name, why in refused.items())
    )


def _problem(model: HYVideoDiT, device: torch.device) -> str | None:
    """Why this rank cannot use the model's kernel; None if it can."""
    if problem := kernel_problem(model.attention, device, model.dtype):
        return problem
    try:
        check_kernel(model, device)
    except Exception as error:  # noqa: BLE001  # a kernel that does not fit this GPU raises anything
        return f"{type(error).__name__}: {error}"
    return None


def _problem_of_group(model: HYVideoDiT, mesh: SequenceMesh, device: torch.device) -> str | None:
    """Why the group computes something else with this kernel than this rank alone; None if it does not."""
    try:
        check_group(model, mesh, device)
    except DeviceError as error:
        return str(error)
    return None


def _first(reasons: list[str | None]) -> str | None:
    return next(filter(None, reasons), None)


def check_chosen(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that this rank can use the kernel that its run has chosen.

    Raises DeviceError if it cannot: another node may, so the run must not end. Raises UserError for an unknown name.
    """
    if name not in KERNELS:
        raise UserError(
            f"This run has chosen attention {name!r}, which is unknown; allowed are {', '.join(KERNELS)}. The object "
            "that records the choice was changed, or is that of another version of hv_batch."
        )
    if problem := kernel_problem(name, device, dtype):
        raise DeviceError(
            f"this run has chosen attention {name!r} and keeps it, and this node cannot run it: {problem}"
        )
