"""Selections: the part of a run that one command renders (`--limit`, `--where`, `--shards`, `--failed-only`).

A selection is not part of the run's identity: the output root belongs to the whole manifest, and later commands render
the rest. It depends on the manifest alone and not on the state of the output root, so the same command selects the same
samples each time (P2). The exception is `--failed-only`, which no longer selects samples that were committed since.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hv_batch.job.config.field_rules import KNOWN_COLUMNS, parse_text
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.samples import Sample
from hv_batch.protocol import UserError

# A sample does not record num_videos.
SELECTABLE = tuple(name for name in KNOWN_COLUMNS if name != "num_videos")
NUMBER_OR_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True, slots=True)
class Selection:
    """The first `limit` samples that are in one of `shards`, match `where` and are in `failed`.

    A value of None, or an empty one of `where` or `shards`, does not restrict the selection.
    """

    limit: int | None = None
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column -> allowed values, as text
    shards: tuple[range, ...] = ()
    failed: frozenset[str] | None = None  # keys of quarantined samples

    @property
    def is_whole(self) -> bool:
        """Whether all samples are selected."""
        return self.limit is None and not self.where and not self.shards and self.failed is None

    def matches(self, sample: Sample) -> bool:
        """Whether the sample fulfils `where` and `failed`; shards and limit are not considered.

        Known columns are compared by value, further columns as text or JSON. An empty text matches a null.
        """
        return (self.failed is None or sample.key in self.failed) and all(
            any(equals_text(name, _value(sample, name), text) for text in texts) for name, texts in self.where.items()
        )


def parse_selection(limit: int | None = None, where: Sequence[str] = (), shards: str | None = None) -> Selection:
    """Parse command-line options: `where` as "column=value", `shards` as "3,17-20".

    Raises UserError if an option is malformed.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; allowed is a whole number from 1. Omit the option to render all samples.")
    columns: dict[str, tuple[str, ...]] = {}
    for condition in where:
        name, equals, text = condition.partition("=")
        if not name or not equals:
            raise UserError(f"--where is {condition!r}; allowed is column=value, for example category=landscape.")
        columns[name] = (*columns.get(name, ()), text)
    return Selection(limit, columns, parse_ranges(shards) if shards is not None else ())


def parse_ranges(shards: str) -> tuple[range, ...]:
    """Parse a list of shards such as "3,17-20". Raises UserError if it is malformed."""
    return tuple(map(_parse_range, shards.split(",")))


def _parse_range(text: str) -> range:
    match = NUMBER_OR_RANGE.fullmatch(text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first:
        raise UserError(f"--shards: {text!r} is no shard; allowed are numbers and ranges, for example 3,17-20.")
    return range(first, last + 1)


def count_selected(index: Index, selection: Selection) -> array[int]:
    """The number of selected samples of each shard. Reads the samples only if `where` or `failed` needs their values.

    Raises UserError if the selection names a column or shard that the manifest does not have, or selects no sample.
    """
    _check_columns(index, selection)
    for shards in selection.shards:
        if shards[-1] >= index.shards:
            raise UserError(
                f"--shards names shard {shards[-1]}, but the manifest has {index.shards} shards: allowed are 0 to "
                f"{index.shards - 1}."
            )
    room = index.summary.samples if selection.limit is None else selection.limit
    counts = array("l", bytes(array("l").itemsize * index.shards))
    chosen = sorted({shard for shards in selection.shards for shard in shards}) or range(index.shards)
    for shard in chosen:
        if room == 0:
            break
        needs_samples = selection.where or selection.failed is not None
        matching = sum(map(selection.matches, index.samples(shard))) if needs_samples else index.size(shard)
        counts[shard] = min(matching, room)
        room -= counts[shard]
    if not any(counts):
        raise UserError(f"No sample of the manifest matches {_describe(selection.where)}. Check columns and values.")
    return counts


def _check_columns(index: Index, selection: Selection) -> None:
    further = index.summary.extra_kinds
    if unknown := sorted(selection.where.keys() - {*SELECTABLE, *further}):
        allowed = ", ".join((*sorted(further), *SELECTABLE))
        raise UserError(f"--where names the column {unknown[0]}, which the manifest does not have; allowed: {allowed}.")


def _describe(where: Mapping[str, tuple[str, ...]]) -> str:
    return " and ".join(" or ".join(f"{name}={text}" for text in texts) for name, texts in where.items())


def _value(sample: Sample, name: str) -> Any:
    match name:
        case "id" | "fps":
            return getattr(sample, name)
        case _ if name in KNOWN_COLUMNS:
            return getattr(sample.params, name)
    return sample.extra.get(name)


def equals_text(name: str, value: Any, text: str) -> bool:
    """Whether the value of a column equals a text of the command line: known columns by value, others as text or JSON.

    An empty text matches a null.
    """
    if value is None:
        return text == ""
    if name in KNOWN_COLUMNS:
        return bool(value == (parse_text(name, text) if text else ""))
    return text == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
