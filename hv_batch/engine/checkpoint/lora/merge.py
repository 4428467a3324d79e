"""Merge LoRAs into the weights of a loaded DiT, and take them out again.

A merged weight is computed anew from the weight in the checkpoint, in float32:

    merged = base + strength * alpha / rank * B A,     rounded once, to the dtype in which the model holds the weight

A weight is restored by reading it from the checkpoint again, not by subtracting what was added. So the weights, and
therefore the bits of a video, depend only on the LoRAs of that video, not on those of the videos before it (P3).

FP8 weights are dequantised, merged and quantised again with a new scale. The files stay memory-mapped: the pages of the
checkpoint are shared by all ranks of a node, and no second copy of a weight is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hv_batch.engine.checkpoint.loading import aligned
from hv_batch.engine.checkpoint.lora.adapter import Addition, open_adapter
from hv_batch.engine.checkpoint.matching import Shapes, shortened
from hv_batch.engine.checkpoint.tensor_files import Tensors
from hv_batch.engine.dit.fp8_matmul import Fp8MatmulLinear, quantise_rows
from hv_batch.engine.dit.fp8_storage import FP8, Fp8Linear, dequantise, quantise
from hv_batch.protocol import UserError
from hv_batch.sampling_params import parse_lora


@dataclass(frozen=True, slots=True)
class LoraFile:
    """One entry of the engine option `loras`: the file, and the strength that applies if a video gives none."""

    path: Path
    strength: float = 1.0


def chosen_strengths(text: str, files: Mapping[str, LoraFile]) -> dict[str, float]:
    """Return the strength of each LoRA that `SamplingParams.lora` names; a strength of 0 is left out.

    Raises UserError for a name that is not in `files`.
    """
    given = parse_lora(text)
    if unknown := [name for name in given if name not in files]:
        raise UserError(
            f"lora = {text!r}: the engine has no LoRA {', '.join(map(repr, unknown))}; its option loras has "
            f"{', '.join(files) or 'none'}."
        )
    strengths = {name: files[name].strength if value is None else value for name, value in given.items()}
    return {name: value for name, value in strengths.items() if value}


class LoraMerger:
    """Keeps the LoRAs of the current video merged into `model`.

    `base` are the tensors that the model was loaded from, by name. `device` computes the merges. Tensors whose names
    begin with one of `in_place` keep their memory, which is required if that is pinned. `model` must have the modules
    that quantisation leaves, and no blocks that offloading has wrapped. `on_change` is called after each change of
    weights. Raises UserError if a file does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Tensors,
        shapes: Shapes,
        files: Mapping[str, LoraFile],
        dtype: torch.dtype,
        device: torch.device,
        *,
        in_place: tuple[str, ...] = (),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._modules = dict(model.named_modules())
        self._base = base
        self._files = files
        self._additions = {name: open_adapter(file.path, shapes) for name, file in files.items()}
        self._dtype = dtype
        self._device = device
        self._in_place = in_place
        self.on_change = on_change
        self._merged: dict[str, float] | None = {}  # None after an error: the weights are those of no set
        self._touched: set[str] = set()

    @torch.no_grad()
    def use(self, text: str) -> None:
        """Merge the LoRAs that `text` names (`SamplingParams.lora`), and no others, into the weights.

        Only the weights that the old or the new LoRAs change are read. Raises UserError if a name is unknown, or if a
        merged weight is not finite.
        """
        chosen = chosen_strengths(text, self._files)
        if chosen == self._merged:
            return
        terms: dict[str, list[tuple[float, Addition]]] = {}
        for name, strength in chosen.items():
            for addition in self._additions[name]:
                terms.setdefault(addition.tensor, []).append((strength, addition))
        stale = self._touched | terms.keys()
        self._merged, self._touched = None, stale
        try:
            for tensor in sorted(stale):
                self._write(tensor, terms.get(tensor, ()))
        finally:
            self.on_change()
        self._merged, self._touched = chosen, set(terms)

    def _write(self, tensor: str, terms: Sequence[tuple[float, Addition]]) -> None:
        module_name, _, parameter = tensor.rpartition(".")
        module = self._modules[module_name]
        if parameter == "weight" and isinstance(module, Fp8Linear | Fp8MatmulLinear):
            weight, scale = self._fp8_weight(module, tensor, terms)
            self._set(tensor, module.weight, weight)
            self._set(tensor, module.scale, scale.to(module.scale.dtype))
            return
        target = getattr(module, parameter)
        if terms:
            value = self._merge(tensor, terms).to(self._dtype)
            self._require_finite(value, tensor, terms)
        else:
            value = aligned(self._base[tensor].read(target.device, self._dtype))
        self._set(tensor, target, value)

    def _fp8_weight(
        self, module: Fp8Linear | Fp8MatmulLinear, tensor: str, terms: Sequence[tuple[float, Addition]]
    ) -> tuple[Tensor, Tensor]:
        """Return an 8-bit weight and its scale: those of the checkpoint, or those of the merged weight."""
        stored, where = self._base[tensor], module.weight.device
        stored_scale = self._base.get(f"{tensor.removesuffix('weight')}scale")
        if terms:
            merged = self._merge(tensor, terms)
            self._require_finite(merged, tensor, terms)
            return quantise(merged) if isinstance(module, Fp8Linear) else quantise_rows(merged)
        if stored_scale is None:  # `fp8: matmul` has quantised the weight itself
            return quantise_rows(stored.read(where, self._dtype).float())
        weight, scale = aligned(stored.read(where, FP8)), stored_scale.read(where, self._dtype)
        return weight, scale.expand_as(module.scale)

    def _merge(self, tensor: str, terms: Sequence[tuple[float, Addition]]) -> Tensor:
        stored, scale = self._base[tensor], self._base.get(f"{tensor.removesuffix('weight')}scale")
        if stored.dtype == FP8 and scale is not None:
            merged = dequantise(stored.read(self._device, FP8), scale.read(self._device, torch.float32), torch.float32)
        else:
            merged = stored.read(self._device, torch.float32).clone()  # it may be a view of the file
        for strength, addition in terms:
            rows = merged[addition.start : addition.stop]
            rows += strength * addition.compute(self._device).reshape(rows.shape)
        return merged

    def _require_finite(self, value: Tensor, tensor: str, terms: Sequence[tuple[float, Addition]]) -> None:
        if not torch.isfinite(value).all():
            files = shortened(sorted({str(addition.file) for _, addition in terms}))
            dtype = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"The weight {tensor} is not finite in {dtype} after the LoRAs {files} are merged. Choose a lower "
                "strength, or precision bf16."
            )

    def _set(self, tensor: str, target: Tensor, value: Tensor) -> None:
        if tensor.startswith(self._in_place):
            target.data.copy_(value)
        else:  # a weight on the CPU may be a page of the checkpoint file, which must not be written
            target.data = value.to(target.device).contiguous()


def check_adapters(files: Mapping[str, LoraFile], shapes: Shapes, check: Callable[[Path], None]) -> list[str]:
    """Return one message for each LoRA that cannot be used with a model of these shapes; empty if all can.

    `check` is called with the path of each file that fits; it may raise UserError.
    """
    problems = []
    for name, file in files.items():
        try:
            open_adapter(file.path, shapes)
            check(file.path)
        except UserError as error:
            problems.append(f"loras.{name}: {error}")
    return problems
