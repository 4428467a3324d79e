"""The GPUs that each stage of a sample held, from the run's config and the places in its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ENCODE, DENOISE, DECODE = "encode", "denoise", "decode"


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs of one worker by stage, all 0 on a CPU. Those of a denoise are per rank, for `ranks` ranks by default."""

    rank: float = 0.0
    encoder: float = 0.0
    decoder: float = 0.0
    ranks: int = 1
    groups_decode: bool = False

    def of(self, stage: str, place: Mapping[str, Any]) -> float:
        """The GPUs during a stage of a sample; `place` is what the record says of the stage."""
        ranks: int = place.get("ranks", self.ranks)
        if stage == DENOISE:
            return self.rank * ranks
        if stage == DECODE:
            return self.rank * ranks if self.groups_decode else self.decoder
        return self.encoder if stage == ENCODE else 0.0


def gpus_of(run: Mapping[str, Any]) -> Gpus:
    """The GPUs of the run whose run.json is `run`."""
    config, parallel = run["config"], run["identity"]["parallel"]
    if parallel["device"] != "cuda":
        return Gpus()
    degrees = (parallel.get(degree, 1) for degree in ("ulysses_degree", "ring_degree", "cfg_degree"))
    return Gpus(
        rank=_share(config, "groups", "gpus_per_rank"),
        encoder=_share(config, "encoders", "gpus"),
        decoder=_share(config, "decoders", "gpus"),
        ranks=math.prod(degrees),
        groups_decode=_value(config, "decoders", "placement") == "group",
    )


def _share(config: Mapping[str, Any], section: str, key: str) -> float:
    """A share of a GPU; 1, its default, for an older run.json that lacks it, or one that has no valid share."""
    value = _value(config, section, key)
    is_share = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1000
    return float(value) if is_share else 1.0


def _value(config: Mapping[str, Any], section: str, key: str) -> Any:
    """A value that the schema of run.json does not check."""
    values = config.get(section)
    return values.get(key) if isinstance(values, dict) else None
