"""From manifest rows to samples, and the check of a whole manifest before anything starts.

A sample's key is unique whatever a store thinks of upper and lower case. Its seed, key and shard follow from manifest
and config alone, so every pass gives the same samples (P2, P3), and no pass holds more than one row and, for the check
of unique keys, 8 bytes a sample (P7).
"""

from __future__ import annotations

import difflib
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hv_batch.job.columns import Kind, learn
from hv_batch.job.config import RunConfig
from hv_batch.job.inputs import shorten
from hv_batch.job.manifest import Manifest
from hv_batch.job.rows import KNOWN_COLUMNS, Row, find_fault, read_row
from hv_batch.protocol import MAX_SEED, FieldProblem, SamplingParams, UserError

MAX_REPORTED = 1000  # problems told in full; a manifest with more is broken as a whole
MAX_COLUMNS = 1000  # further columns looked at for typing errors
TYPO_LIKENESS = 0.85  # difflib ratio: "num_frame" and "heights" are above it, "steps" and "frames" below


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One video to render."""

    key: str  # names the sample's objects in the output root
    id: str  # the row's id as written; without one, the row's content hash
    row: int  # number in the manifest, from 1
    video_index: int  # of the row's num_videos, from 0
    shard: int
    params: SamplingParams
    fps: int
    extra: Mapping[str, Any]  # further columns, JSON-able, carried into the metadata untouched


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestSummary:
    """What one pass over a good manifest tells."""

    digest: str  # sha256 of the file
    rows: int
    samples: int
    shards: int
    shapes: Mapping[tuple[int, int, int], int]  # (height, width, frames) -> samples
    extra_kinds: Mapping[str, Kind]  # further column -> what all its values have in common
    warnings: tuple[str, ...]


def iter_samples(manifest: Manifest, config: RunConfig) -> Iterator[Sample]:
    """Every sample in manifest order, lazily; shards fill up in that order.

    Raises UserError at a bad row: `check_manifest` is what finds all of them.
    """
    running = 0
    for number, written in manifest.rows():
        row = None if isinstance(written, FieldProblem) else read_row(number, written)
        values, found = _complete(row, config) if row else ({}, ())
        if row is None or found:
            raise UserError(
                f"Row {number} of the manifest {manifest.url} is not as it was checked. Leave it unchanged."
            )
        fps, num_videos, first_seed = values.pop("fps"), values.pop("num_videos"), values.pop("seed")
        for index, key in enumerate(_sample_keys(row.key, num_videos)):
            yield Sample(
                key=key,
                id=row.id or row.key,
                row=number,
                video_index=index,
                shard=running // config.output.shard_size,
                params=SamplingParams(seed=first_seed + index, **values),
                fps=fps,
                extra=row.extra,
            )
            running += 1


def derive_seed(run_seed: int, row_key: str) -> int:
    """The first of a row's seeds where it names none: 31 bits, which every generator takes."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{row_key}".encode()).digest()[:4], "big") >> 1


def check_manifest(manifest: Manifest, config: RunConfig) -> ManifestSummary:
    """Judge every row in one streaming pass, and a second one only where two keys seem to be equal (P6).

    Raises UserError that lists every bad row with field, value and what is allowed.
    """
    check = _Check()
    for number, written in manifest.rows():
        check.rows += 1
        if isinstance(written, FieldProblem):
            check.report(number, written)
        else:
            check.judge(read_row(number, written), config)
    check.report_equal_keys(manifest, config)
    if check.problem_count:
        raise UserError(check.describe(manifest.url))
    return ManifestSummary(
        digest=manifest.digest,
        rows=check.rows,
        samples=len(check.key_hashes),
        shards=-(-len(check.key_hashes) // config.output.shard_size),
        shapes=dict(check.shapes),
        extra_kinds=dict(check.extra_kinds),
        warnings=tuple(check.warn_of_typos()),
    )


def _complete(row: Row, config: RunConfig) -> tuple[dict[str, Any], tuple[FieldProblem, ...]]:
    """The row's values with seed and defaults filled in, and everything that is wrong with them."""
    values = {**config.defaults.model_dump(), "seed": derive_seed(config.seed, row.key), **row.values}
    if row.problems:
        return values, row.problems
    found = []
    if values["seed"] + values["num_videos"] - 1 > MAX_SEED:
        allowed = f"at most 2^63 - {values['num_videos']}, because video i is rendered with seed + i"
        found.append(FieldProblem("seed", values["seed"], allowed))
    if config.parallel.cfg_degree > 1 and values["cfg_scale"] <= 1.0:
        allowed = (
            f"above 1, because with parallel.cfg_degree = {config.parallel.cfg_degree} half of a group would compute "
            "nothing; render such rows with cfg_degree 1, in a run of their own"
        )
        found.append(FieldProblem("cfg_scale", values["cfg_scale"], allowed))
    return values, tuple(found)


def _sample_keys(row_key: str, num_videos: int) -> Iterator[str]:
    if num_videos == 1:
        yield row_key
    else:
        for index in range(num_videos):
            yield f"{row_key}-v{index}"


def _keys_of(row: Row, values: Mapping[str, Any]) -> Iterator[str]:
    """Keys as a store without upper and lower case sees them; also of a bad row, whose clash is worth telling too."""
    num_videos = values["num_videos"] if find_fault("num_videos", values["num_videos"]) is None else 1
    for key in _sample_keys(row.key, num_videos):
        yield key.lower()


@dataclass(slots=True)
class _Check:
    """What the pass over a manifest gathers."""

    rows: int = 0
    problem_count: int = 0
    told: list[str] = field(default_factory=list)  # the first MAX_REPORTED problems, as lines
    key_hashes: array[int] = field(default_factory=lambda: array("q"))
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    columns: dict[str, int] = field(default_factory=dict)  # further column -> its first row
    extra_kinds: dict[str, Kind] = field(default_factory=dict)

    def report(self, number: int, problem: FieldProblem) -> None:
        self.problem_count += 1
        if len(self.told) < MAX_REPORTED:
            value = "is missing" if problem.value is None else f"= {shorten(problem.value)}"
            self.told.append(f"row {number}: {problem.field} {value}; allowed: {problem.allowed}")

    def judge(self, row: Row, config: RunConfig) -> None:
        values, found = _complete(row, config)
        for problem in found:
            self.report(row.number, problem)
        self.key_hashes.extend(map(hash, _keys_of(row, values)))
        if not found:
            self.shapes[values["height"], values["width"], values["num_frames"]] += values["num_videos"]
        learn(self.extra_kinds, row.extra)
        for name in row.extra:
            if name not in self.columns and len(self.columns) < MAX_COLUMNS:
                self.columns[name] = row.number

    def report_equal_keys(self, manifest: Manifest, config: RunConfig) -> None:
        """Equal hashes are confirmed by a second pass; of a flood of them, only as many as will be told."""
        hashes = np.sort(np.frombuffer(self.key_hashes, dtype=np.int64))
        repeats = hashes[1:][hashes[1:] == hashes[:-1]]
        suspects = set(np.unique(repeats)[:MAX_REPORTED].tolist())
        untold = len(repeats) - int(np.isin(repeats, list(suspects)).sum())
        first_rows: dict[str, int] = {}
        for number, written in manifest.rows() if suspects else ():
            if isinstance(written, FieldProblem):
                continue
            row = read_row(number, written)
            for key in _keys_of(row, _complete(row, config)[0]):
                if hash(key) not in suspects:
                    continue
                if key in first_rows:
                    self.report(number, _clash(row, key, first_rows[key]))
                first_rows.setdefault(key, number)
        self.problem_count += untold

    def warn_of_typos(self) -> Iterator[str]:
        for name, number in self.columns.items():
            near = difflib.get_close_matches(name.lower(), KNOWN_COLUMNS, n=1, cutoff=TYPO_LIKENESS)
            if near:
                yield (
                    f"column {shorten(name)} (first in row {number}) is not {near[0]!r} and is only carried into the "
                    f"metadata; rename it if {near[0]!r} is meant"
                )

    def describe(self, url: str) -> str:
        lines = [*self.told, *(f"note: {warning}" for warning in self.warn_of_typos())]
        if self.problem_count > len(self.told):
            lines.insert(len(self.told), f"and {self.problem_count - len(self.told)} more")
        listing = "\n".join(f"  - {line}" for line in lines)
        return f"The manifest {url} has {self.problem_count} problem(s) in {self.rows} row(s); mend them:\n{listing}"


def _clash(row: Row, key: str, first_row: int) -> FieldProblem:
    if row.id is None:
        allowed = f"rows that differ; row {first_row} is the same. Give both an id or a seed, or one row num_videos"
        return FieldProblem("id", None, allowed)
    return FieldProblem("id", row.id, f"an id whose key {key!r} is its own; row {first_row} has it, ignoring case")
