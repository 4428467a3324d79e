"""Counts of samples by facet: state, shape, failure class, flag, and the category columns of the manifest.

A digest has the counts of one shard, and the report their sums. Both have a bounded number of values; the samples with
any other value are counted as OTHER. The sums do not depend on the order of the shards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from hv_batch.job.documents.report import MAX_FACETS, MAX_VALUES
from hv_batch.job.report.samples import CLASS, FLAGS, RESERVED, SHAPE, STATE, shape_name

OTHER = "other"
MAX_SHOWN = 50  # values of a facet in the report
MAX_COUNTED = 5000  # values of a facet while the report adds up

# A column whose values are mostly different from each other names the samples: it is no category.
FEW = 20
SHARE_OF_DIFFERENT = 0.5

Facets = dict[str, dict[str, int]]


def sample_facets(sample: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The facets of one sample, each with its value. A sample may have several flags."""
    yield STATE, sample["state"]
    if shape := shape_name(sample):
        yield SHAPE, shape
    if sample["class"]:
        yield CLASS, sample["class"]
    for flag in sample["flags"]:
        yield FLAGS, flag
    yield from sample["facets"].items()


def count_facets(samples: Iterable[Mapping[str, Any]]) -> Facets:
    """The counts of one shard, for its digest."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        for facet, value in sample_facets(sample):
            counts[facet][value] += 1
    names = sorted(counts, key=_place)[:MAX_FACETS]
    return {name: _bounded(counts[name], MAX_VALUES) for name in names}


class FacetSums:
    """The counts of many shards."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def add(self, facets: Mapping[str, Mapping[str, int]]) -> None:
        for name, counts in facets.items():
            if name not in self._counts and len(self._counts) >= 4 * MAX_FACETS:
                continue
            total = self._counts[name]
            for value, count in counts.items():
                total[value if value in total or len(total) < MAX_COUNTED else OTHER] += count

    def result(self) -> Facets:
        """The facets of the report, those that every report has first."""
        shown = [name for name in self._counts if name in RESERVED or _is_category(self._counts[name])]
        return {name: _bounded(self._counts[name], MAX_SHOWN) for name in sorted(shown, key=_place)[:MAX_FACETS]}


def restrict(facets: Mapping[str, Mapping[str, int]], shown: Mapping[str, Mapping[str, int]]) -> Facets:
    """The counts of one shard, with only the facets and values that the report shows; the rest is OTHER."""
    restricted: Facets = {}
    for name in shown:
        if name in facets:
            counts: Counter[str] = Counter()
            for value, count in facets[name].items():
                counts[value if value in shown[name] else OTHER] += count
            restricted[name] = dict(counts)
    return restricted


def _place(name: str) -> tuple[int, str]:
    """The order of the facets: those of every report, then the columns of the manifest by name."""
    return RESERVED.index(name) if name in RESERVED else len(RESERVED), name


def _is_category(counts: Counter[str]) -> bool:
    different, samples = len(counts), sum(counts.values())
    if counts.get(OTHER, 0) > SHARE_OF_DIFFERENT * samples:
        return False
    return different <= FEW or different <= SHARE_OF_DIFFERENT * samples


def _bounded(counts: Counter[str], values: int) -> dict[str, int]:
    """The most frequent values, in this order; of equal ones the first by name."""
    ordered = sorted(counts.items(), key=lambda item: (item[0] == OTHER, -item[1], item[0]))
    shown = dict(ordered[:values])
    if rest := sum(count for _, count in ordered[values:]):
        shown[OTHER] = shown.get(OTHER, 0) + rest
    return shown
