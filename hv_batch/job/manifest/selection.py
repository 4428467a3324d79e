"""Which part of a run one command is to render: `--limit`, `--where`, `--shards`, `--failed-only`.

A selection is no part of the run's identity: the output root stays that of the whole manifest, and later commands
render the rest. It depends on the manifest alone and not on what is done already, so the same command twice means the
same samples (P2); but for `--failed-only`, which twice means what has not been committed of them since.
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

# A sample no longer tells of how many videos it is one.
SELECTABLE = tuple(name for name in KNOWN_COLUMNS if name != "num_videos")
NUMBER_OR_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True, slots=True)
class Selection:
    """Samples that are in one of `shards`, match `where` and are in `failed`, and of these the first `limit`.

    None or empty shards and conditions: all.
    """

    limit: int | None = None
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column -> any of these values, as text
    shards: tuple[range, ...] = ()
    failed: frozenset[str] | None = None  # keys of samples that were given up

    @property
    def is_whole(self) -> bool:
        return self.limit is None and not self.where and not self.shards and self.failed is None

    def matches(self, sample: Sample) -> bool:
        """Whether `where` is fulfilled: by value in a column of ours, by text or JSON in another; no text is a null."""
        return (self.failed is None or sample.key in self.failed) and all(
            any(_equals(name, _value(sample, name), text) for text in texts) for name, texts in self.where.items()
        )


def parse_selection(limit: int | None = None, where: Sequence[str] = (), shards: str | None = None) -> Selection:
    """From what a command line says: `where` as "column=value", `shards` as "3,17-20". Raises UserError."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: allowed is a whole number from 1. Leave it out to render everything.")
    columns: dict[str, tuple[str, ...]] = {}
    for condition in where:
        name, equals, text = condition.partition("=")
        if not name or not equals:
            raise UserError(f"--where {condition}: allowed is column=value, as category=landscape.")
        columns[name] = (*columns.get(name, ()), text)
    return Selection(limit, columns, parse_ranges(shards) if shards is not None else ())


def parse_ranges(shards: str) -> tuple[range, ...]:
    """Of a list of shards such as "3,17-20". Raises UserError for anything else."""
    return tuple(map(_parse_range, shards.split(",")))


def _parse_range(text: str) -> range:
    found = NUMBER_OR_RANGE.fullmatch(text.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if last < first:
        raise UserError(f"--shards: {text!r} is no shard; allowed are numbers and ranges of them, as 3,17-20.")
    return range(first, last + 1)


def count_selected(index: Index, selection: Selection) -> array[int]:
    """Of every shard, how many of its samples are selected; by what they are, from a look at all of the shards.

    Raises UserError for a column or a shard that the manifest does not have, and when nothing is selected.
    """
    _check_columns(index, selection)
    for shards in selection.shards:
        if shards[-1] >= index.shards:
            raise UserError(
                f"--shards names shard {shards[-1]}, but the manifest has {index.shards}: allowed are 0 to "
                f"{index.shards - 1}."
            )
    room = index.summary.samples if selection.limit is None else selection.limit
    counts = array("l", bytes(array("l").itemsize * index.shards))
    chosen = sorted({shard for shards in selection.shards for shard in shards}) or range(index.shards)
    for shard in chosen:
        if room == 0:
            break
        by_sample = selection.where or selection.failed is not None
        found = sum(map(selection.matches, index.samples(shard))) if by_sample else index.size(shard)
        counts[shard] = min(found, room)
        room -= counts[shard]
    if not any(counts):
        raise UserError(f"No sample of the manifest matches {_describe(selection.where)}. Compare columns and values.")
    return counts


def _check_columns(index: Index, selection: Selection) -> None:
    own = index.summary.extra_kinds
    if unknown := sorted(selection.where.keys() - {*SELECTABLE, *own}):
        allowed = ", ".join((*sorted(own), *SELECTABLE))
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


def _equals(name: str, value: Any, text: str) -> bool:
    if value is None:
        return text == ""
    if name in KNOWN_COLUMNS:
        return bool(value == (parse_text(name, text) if text else ""))
    return text == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
