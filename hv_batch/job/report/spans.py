"""When each worker was at work, as far as the commit records say.

A record holds the seconds of each stage and the time of its commit, which follows the decode. The denoise is taken to
end when the decode begins: it ended earlier if the latents waited for a decoder. A group denoises one sample or one
micro-batch at a time, so its spans are moved back until they do not overlap. The events of a driver are more exact, if
it has written any (`hv_batch.job.report.timeline`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hv_batch.job.documents.report import MAX_NAME_CHARS, MAX_SPANS
from hv_batch.job.report.gpus import DECODE, DENOISE, Gpus
from hv_batch.job.report.samples import clamp

GAP_S = 2.0  # between two samples of one span


@dataclass(slots=True, kw_only=True)
class WorkSpan:
    """A worker processed `samples` samples from `start` to `end` (unix seconds)."""

    worker: str
    stage: str
    node: str
    gpus: float
    start: float
    end: float
    samples: int


def pack_spans(spans: Iterable[WorkSpan]) -> list[dict[str, Any]]:
    """The spans as a digest holds them."""
    packed: dict[tuple[str, str, str, float], list[list[int]]] = {}
    for span in spans:
        times = [round(1000 * span.start), round(1000 * span.end), span.samples]
        packed.setdefault((span.worker, span.stage, span.node, span.gpus), []).append(times)
    names = ("worker", "stage", "node", "gpus")
    return [{**dict(zip(names, worker, strict=True)), "spans": times} for worker, times in packed.items()]


def unpack_spans(packed: Iterable[Mapping[str, Any]]) -> Iterator[WorkSpan]:
    for each in packed:
        worker = {name: each[name] for name in ("worker", "stage", "node", "gpus")}
        for start, end, samples in each["spans"]:
            yield WorkSpan(**worker, start=start / 1000, end=max(start, end) / 1000, samples=samples)


def find_spans(records: Iterable[tuple[Mapping[str, Any], float]], gpus: Gpus) -> list[WorkSpan]:
    """The spans of commit records, each given with the unix time of its commit; at most MAX_SPANS."""
    by_worker: defaultdict[tuple[str, str, str, float], list[tuple[float, float]]] = defaultdict(list)
    for record, at in records:
        decode = record["stages"].get(DECODE, 0.0)
        for stage, end in ((DECODE, at), (DENOISE, at - decode)):
            place, seconds = record["places"].get(stage, {}), record["stages"].get(stage, 0.0)
            if place.get("worker") and seconds and end - seconds >= 0:
                worker, node = (clamp(place.get(name, ""), MAX_NAME_CHARS) for name in ("worker", "node"))
                by_worker[worker, stage, node, gpus.of(stage, place)].append((end - seconds, end))
    spans = [
        WorkSpan(
            worker=worker, stage=stage, node=node, gpus=held, start=round(start, 1), end=round(end, 1), samples=count
        )
        for (worker, stage, node, held), times in by_worker.items()
        for start, end, count in _moved_apart(times)
    ]
    return merge_spans(spans, MAX_SPANS, GAP_S)


def _moved_apart(times: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float, int]]:
    """The times of one worker as (start, end, 1), the last first, each moved back until it ends before the next."""
    begin = float("inf")
    for start, end in sorted(times, key=lambda time: time[1], reverse=True):
        end, start = min(end, begin), start - max(0.0, end - begin)
        begin = max(start, 0.0)
        yield begin, max(end, begin), 1


def merge_spans(spans: Iterable[WorkSpan], at_most: int, gap_s: float = GAP_S) -> list[WorkSpan]:
    """The given spans, which this changes, by worker and time, with those of one worker merged whose gap is small.

    `gap_s` grows until at most `at_most` are left. If there are more workers than that, the last are left out.
    """
    merged = _merge(sorted(spans, key=lambda span: (span.worker, span.node, span.start)), gap_s)
    workers = len({(span.worker, span.node) for span in merged})
    while len(merged) > max(at_most, workers):
        gap_s *= 4
        merged = _merge(merged, gap_s)
    return merged[:at_most]


def _merge(spans: Sequence[WorkSpan], gap_s: float) -> list[WorkSpan]:
    """The spans, which this changes."""
    merged: list[WorkSpan] = []
    last: WorkSpan | None = None
    for span in spans:
        if last and span.start - last.end <= gap_s and last.worker == span.worker and last.node == span.node:
            last.end = max(last.end, span.end)
            last.samples += span.samples
        else:
            merged.append(span)
            last = span
    return merged
