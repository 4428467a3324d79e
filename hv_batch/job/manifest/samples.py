"""Make samples from manifest rows.

The keys of a manifest's samples are unique, also on a store that ignores case. The seed, key and shard of a sample
depend on manifest and config alone, so every pass gives the same samples (P2, P3).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hv_batch.job.config.run_config import RunConfig
from hv_batch.sampling_params import SamplingParams

if TYPE_CHECKING:  # every rank and decoder imports this module, and none of them needs Arrow
    from hv_batch.job.manifest.extra_columns import ColumnType


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One video to render."""

    key: str  # name of the sample's objects in the output root
    id: str  # the row's id as written; if it has none, the hash of the row's content
    row: int  # number in the manifest, from 1, over all its files
    video_index: int  # among the row's num_videos, from 0
    shard: int
    params: SamplingParams
    fps: int
    extra: Mapping[str, Any]  # further columns as JSON values, copied to the metadata unchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRow:
    """One valid row, without the config's defaults."""

    number: int  # in the manifest, from 1, over all its files
    key: str
    id: str | None  # as written
    values: Mapping[str, Any]  # of the known columns except `id`
    extra: Mapping[str, Any]  # of the further columns


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestSummary:
    """Totals of a valid manifest. The index document stores the fields under these names."""

    digest: str  # `Manifest.digest`
    rows: int
    samples: int
    shards: int
    shapes: Mapping[tuple[int, int, int], int]  # (height, width, frames) -> samples
    extra_kinds: Mapping[str, ColumnType]  # further column -> common type of its values
    warnings: tuple[str, ...]
    prompt_hook: Mapping[str, Any] | None = None  # the results of the prompt hook, if there is one


def make_samples(
    row: CheckedRow, first: int, config: RunConfig, defaults: Mapping[str, Any], only: int | None = None
) -> Iterator[Sample]:
    """The samples of one row, or only that of video `only`. `first` is the number of its first sample in the manifest,
    from 0.

    `defaults` is `config.defaults` as a dict, which the caller dumps once: one dump a row would dominate the cost.
    """
    values = {**defaults, **row.values}
    if "seed" not in row.values:
        values["seed"] = derive_seed(config.seed, row.key)
    fps, num_videos, first_seed = values.pop("fps"), values.pop("num_videos"), values.pop("seed")
    for index, key in enumerate(sample_keys(row.key, num_videos)):
        if only not in (None, index):
            continue
        yield Sample(
            key=key,
            id=row.id or row.key,
            row=row.number,
            video_index=index,
            shard=(first + index) // config.output.shard_size,
            params=SamplingParams(seed=first_seed + index, **values),
            fps=fps,
            extra=row.extra,
        )


def derive_seed(run_seed: int, row_key: str) -> int:
    """The seed of the first video of a row without a seed: 31 bits, which every generator accepts."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{row_key}".encode()).digest()[:4], "big") >> 1


def sample_keys(row_key: str, num_videos: int) -> Iterator[str]:
    """The keys of the videos of one row."""
    if num_videos == 1:
        yield row_key
    else:
        for index in range(num_videos):
            yield f"{row_key}-v{index}"


def group_by_lora(samples: Iterable[Sample], shard: int) -> list[Sample]:
    """The samples of a shard in the order in which they are admitted: those with equal LoRAs one after the other.

    Every second shard has the reverse order of LoRAs, so that the next shard begins with those of the last. Without
    LoRAs, the order is that of the plan.
    """
    return sorted(samples, key=lambda sample: sample.params.lora, reverse=shard % 2 == 1)


def count_lora_changes(samples: Iterable[Sample]) -> tuple[Counter[str], int]:
    """The number of samples of each choice of LoRAs, and how often one group that denoises all of them changes it.

    `samples` come shard by shard.
    """
    counts: Counter[str] = Counter()
    changes, current = 0, ""
    for shard, of_shard in groupby(samples, key=lambda sample: sample.shard):
        own = Counter(sample.params.lora for sample in of_shard)
        counts += own
        for lora in sorted(own, reverse=shard % 2 == 1):
            changes += lora != current
            current = lora
    return counts, changes
