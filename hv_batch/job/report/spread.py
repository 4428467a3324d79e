"""The spread of the times of stages: mean, smallest, largest and percentiles of any number of samples.

Times are counted in bins that are 1 % wide, so the memory does not grow with the samples, and a percentile is exact to
half a percent. The result does not depend on the order of the samples.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hv_batch.job.documents.report import MAX_NAME_CHARS, MAX_SHAPES
from hv_batch.job.report.facets import OTHER
from hv_batch.job.report.samples import COMMITTED, clamp, shape_name

_BIN = math.log(1.01)
PERCENTS = {"p10": 10, "p50": 50, "p90": 90}
MAX_STAGES = 16

Millis = dict[str, dict[str, list[int]]]


def collect_millis(samples: Iterable[Mapping[str, Any]]) -> Millis:
    """The times of committed samples by shape and stage, for a digest, in milliseconds as in records."""
    found: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if sample["state"] != COMMITTED:
            continue
        shape = shape_name(sample) or OTHER
        of_shape = found[shape if shape in found or len(found) < MAX_SHAPES else OTHER]
        for stage, seconds in sample["seconds"].items():
            if (stage := clamp(stage, MAX_NAME_CHARS)) in of_shape or len(of_shape) < MAX_STAGES:
                of_shape[stage].append(round(1000 * seconds))
    return {shape: dict(stages) for shape, stages in found.items()}


class Spread:
    """Some times."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self._sum = 0
        self._count = 0
        self._smallest: float = math.inf
        self._largest = 0

    def add(self, millis: Sequence[int]) -> None:
        if not millis:
            return
        numbers, counts = np.unique(_bins(np.asarray(millis, dtype=np.float64)), return_counts=True)
        self._bins.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
        self._sum += sum(millis)
        self._count += len(millis)
        self._smallest = min(self._smallest, *millis)
        self._largest = max(self._largest, *millis)

    def to_dict(self) -> dict[str, float]:
        """In seconds."""
        ordered = sorted(self._bins.items())
        percents = {name: self._percentile(ordered, percent) for name, percent in PERCENTS.items()}
        millis = {"mean": self._sum / self._count, "min": self._smallest, **percents, "max": self._largest}
        return {"count": self._count} | {name: _seconds(value) for name, value in millis.items()}

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

    def add(self, stage_ms: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        for shape, stages in stage_ms.items():
            of_shape = self._spreads[shape if shape in self._spreads or len(self._spreads) < MAX_SHAPES else OTHER]
            for stage, millis in stages.items():
                if millis and (stage in of_shape or len(of_shape) < MAX_STAGES):
                    of_shape[stage].add(millis)

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        by_shape = sorted(self._spreads.items())
        return {shape: {stage: spread.to_dict() for stage, spread in stages.items()} for shape, stages in by_shape}


def _bins(millis: NDArray[np.float64]) -> NDArray[np.int64]:
    """The number of the bin of each time: 0 for up to a millisecond, then logarithmic."""
    return np.ceil(np.log(np.maximum(millis, 1.0)) / _BIN).astype(np.int64)


def _middle(number: int) -> float:
    return math.exp((number - 0.5) * _BIN) if number else 0.0


def _seconds(millis: float) -> float:
    """To a millisecond, or to five digits."""
    seconds = millis / 1000
    return round(seconds, 3) if seconds < 100 else float(f"{seconds:.5g}")
