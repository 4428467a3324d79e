"""The spread of the times of stages: mean, smallest, largest and percentiles of any number of samples.

Times are counted in bins that are 1 % wide, so the memory does not grow with the samples, and a percentile is exact to
half a percent. The result does not depend on the order of the samples.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hv_batch.job.documents.report import MAX_NAME_CHARS, MAX_SHAPES
from hv_batch.job.report.facets import OTHER
from hv_batch.job.report.samples import COMMITTED, clamp, shape_name

_BIN = math.log(1.01)
_SHORTEST_S = 0.001  # records have milliseconds; whatever is shorter is in the first bin
PERCENTS = {"p10": 10, "p50": 50, "p90": 90}
MAX_STAGES = 16

Seconds = dict[str, dict[str, list[float]]]


def collect_seconds(samples: Iterable[Mapping[str, Any]]) -> Seconds:
    """The times of committed samples by shape and stage, for a digest."""
    found: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample["state"] != COMMITTED:
            continue
        shape = shape_name(sample) or OTHER
        of_shape = found[shape if shape in found or len(found) < MAX_SHAPES else OTHER]
        for stage, seconds in sample["seconds"].items():
            if (stage := clamp(stage, MAX_NAME_CHARS)) in of_shape or len(of_shape) < MAX_STAGES:
                of_shape[stage].append(seconds)
    return {shape: dict(stages) for shape, stages in found.items()}


class Spread:
    """Some times in seconds."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self._sums: list[float] = []
        self._count = 0
        self._smallest = math.inf
        self._largest = 0.0

    def add(self, seconds: Sequence[float]) -> None:
        if not seconds:
            return
        self._bins.update(map(_bin, seconds))
        self._sums = [math.fsum([*self._sums, *seconds])]
        self._count += len(seconds)
        self._smallest = min(self._smallest, *seconds)
        self._largest = max(self._largest, *seconds)

    def to_dict(self) -> dict[str, float]:
        ordered = sorted(self._bins.items())
        percents = {name: _rounded(self._percentile(ordered, percent)) for name, percent in PERCENTS.items()}
        mean = math.fsum(self._sums) / self._count
        largest, smallest = _rounded(self._largest), _rounded(self._smallest)
        return {"count": self._count, "mean": _rounded(mean), "min": smallest, **percents, "max": largest}

    def _percentile(self, ordered: Sequence[tuple[int, int]], percent: int) -> float:
        """The smallest time that at least `percent` % of the times do not exceed."""
        needed, seen = math.ceil(self._count * percent / 100), 0
        for number, count in ordered:
            seen += count
            if seen >= needed:
                return min(max(_middle(number), self._smallest), self._largest)
        return self._largest


class StageSpreads:
    """The spread of each stage's times, by shape."""

    def __init__(self) -> None:
        self._spreads: defaultdict[str, defaultdict[str, Spread]] = defaultdict(lambda: defaultdict(Spread))

    def add(self, seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        for shape, stages in seconds.items():
            of_shape = self._spreads[shape if shape in self._spreads or len(self._spreads) < MAX_SHAPES else OTHER]
            for stage, values in stages.items():
                if values and (stage in of_shape or len(of_shape) < MAX_STAGES):
                    of_shape[stage].add(values)

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        by_shape = sorted(self._spreads.items())
        return {shape: {stage: spread.to_dict() for stage, spread in stages.items()} for shape, stages in by_shape}


def _bin(seconds: float) -> int:
    return 0 if seconds <= _SHORTEST_S else math.ceil(math.log(seconds / _SHORTEST_S) / _BIN)


def _middle(number: int) -> float:
    return _SHORTEST_S * math.exp((number - 0.5) * _BIN) if number else _SHORTEST_S


def _rounded(seconds: float) -> float:
    """To a millisecond, or to five digits."""
    return round(seconds, 3) if seconds < 100 else float(f"{seconds:.5g}")
