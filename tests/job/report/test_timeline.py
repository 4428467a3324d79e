"""The timeline of a run: from the events of drivers, and from commit records for the time before them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.event_log.reader import DriverEvents
from hv_batch.job.records import commits
from hv_batch.job.report import timeline
from hv_batch.job.report.gpus import Gpus, gpus_of
from hv_batch.job.report.pace import TimeBins
from hv_batch.job.report.spans import WorkSpan, find_spans, merge_spans
from hv_batch.job.report.timeline import Row, Span, coarsen, make_timeline
from hv_batch.job.report.update import update_report
from hv_batch.job.storage.canonical_json import encode_line
from hv_batch.job.storage.store import Store
from tests.support.rendered_roots import make_commit, make_sample, open_root

T = 1_800_000_000.0
DRIVER = "20270115T080000Z-0a1b2c3d"


def event(at: float, kind: str, worker: str = "", **fields: Any) -> dict[str, Any]:
    of_worker = {"worker": worker, "stage": worker.split("-")[0], "gpus": 8.0, "nodes": ["10.0.0.1"]} if worker else {}
    return {"at": T + at, "kind": kind, **of_worker, **fields}


def work(since: float, at: float, worker: str, samples: int = 1) -> dict[str, Any]:
    return event(at, "worker_work", worker, since=T + since, samples=samples, seconds=at - since)


GROUP, REBUILT = "denoise-0.0", "denoise-0.1"
EVENTS = (
    event(0, "run_started"),
    event(1, "worker_asked", GROUP),
    event(10, "worker_placed", GROUP),
    event(40, "worker_ready", GROUP),
    work(45, 100, GROUP, 3),
    event(160, "worker_lost", GROUP, **{"class": "INFRA", "message": "gone"}),
    event(161, "worker_placed", REBUILT),
    event(181, "worker_ready", REBUILT),
    work(181, 300, REBUILT, 5),
    event(320, "drain_started"),
    event(350, "worker_released", REBUILT),
    event(350, "drain_ended"),
    event(351, "run_ended"),
)


def spans_of(row: Row) -> list[tuple[float, float, str, int]]:
    return [(span.start - T, span.end - T, span.kind, span.samples) for span in row.spans]


def test_a_slot_shows_the_loads_work_losses_and_idle_time_of_its_workers():
    """A rebuilt group follows its predecessor in one row; the time between two workers belongs to nobody."""
    found = make_timeline([DriverEvents(DRIVER, EVENTS)], [], TimeBins(), now=None)
    (row,) = found.rows
    assert (row.worker, row.stage, row.gpus, row.node) == ("denoise-0", "denoise", 8.0, "10.0.0.1")
    assert spans_of(row) == [
        (10, 40, "start", 0),
        (40, 45, "idle", 0),
        (45, 100, "work", 3),
        (100, 160, "lost", 0),
        (161, 181, "start", 0),
        (181, 300, "work", 5),
        (300, 320, "idle", 0),
        (320, 350, "drain", 0),
    ]
    assert found.wall_seconds == 351
    assert found.gpu_seconds({"denoise": 100.0}) == {
        "denoise": 100.0,
        "start_up": 8 * 50,
        "idle": 8 * 25,
        "failure": 8 * 60,
        "drain": 8 * 30,
    }


def test_a_preempted_group_is_no_failure():
    lost = event(160, "worker_lost", GROUP, **{"class": "PREEMPTED"})
    found = make_timeline([DriverEvents(DRIVER, (*EVENTS[:5], lost))], [], TimeBins(), now=None)
    assert found.lost == {"start_up": 240, "idle": 40, "preemption": 480}


def test_a_worker_of_a_driver_at_work_is_idle_until_now():
    """The last driver may be alive; one that was killed before it ends with its last event."""
    killed = DriverEvents("20270101T000000Z-00000000", tuple({**each, "at": each["at"] - 1e6} for each in EVENTS[:4]))
    found = make_timeline([killed, DriverEvents(DRIVER, EVENTS[:5])], [], TimeBins(), now=T + 130)
    (row,) = found.rows
    assert spans_of(row)[-1] == (100, 130, "idle", 0)
    assert found.wall_seconds == 40 + 130
    assert found.to_dict()["to"] == T + 130


def test_records_tell_what_happened_before_the_first_event():
    """P2: a root of an earlier version has no events. Its times at work end where it was left for half an hour."""
    records = [
        WorkSpan(worker="denoise-1.0", stage="denoise", node="n", gpus=1.0, start=T + at, end=T + at + 60, samples=2)
        for at in (-20_000.0, -19_940.0, 50.0)
    ]
    finished = TimeBins()
    finished.add([T - 19_880, T - 19_000])
    found = make_timeline([DriverEvents(DRIVER, EVENTS)], records, finished, now=None)
    assert [row.worker for row in found.rows] == ["denoise-0", "denoise-1"]
    assert spans_of(found.rows[1]) == [(-20_000, -19_880, "work", 4)], "what events describe is not counted twice"
    assert found.wall_seconds == 351 + 1001


KINDS = (
    "worker_asked",
    "worker_placed",
    "worker_ready",
    "worker_work",
    "worker_lost",
    "worker_released",
    "drain_ended",
)
ANY_EVENT = st.builds(
    lambda at, kind, worker, since: event(at, kind, worker, since=T + since),
    st.floats(-1e9, 1e9),
    st.sampled_from((*KINDS, "drain_started", "drain_ended", "run_ended", "progress")),
    st.sampled_from(["", GROUP, REBUILT, "decode-1.0", "encode"]),
    st.floats(-1e9, 1e9),
)


@given(st.lists(ANY_EVENT, max_size=25))
def test_any_events_give_spans_of_time(events):
    """P5: any writer of the root can write events in any order; no span ends before it begins."""
    found = make_timeline([DriverEvents(DRIVER, tuple(events))], [], TimeBins(), now=None)
    for row in found.rows:
        assert all(span.end >= span.start for span in row.spans)
    assert all(seconds >= 0 for seconds in found.lost.values())
    shown = found.to_dict()
    assert not shown["rows"] or shown["from"] <= shown["to"]


def test_rows_and_spans_are_bounded(monkeypatch):
    """P7: a week of a thousand groups has a bounded timeline; short pauses vanish first, losses stay."""
    rows = []
    for slot in range(5):
        spans = [Span(100.0 * n, 100.0 * n + 90, "work", 1) for n in range(50)]
        spans[20].end = 2050.0
        spans.insert(21, Span(2050.0, 2090.0, "lost"))
        rows.append(Row(f"denoise-{slot}", "denoise", spans=spans))
    coarse = coarsen(rows, 40)
    assert sum(len(row.spans) for row in coarse) <= 40
    for row in coarse:
        assert [span.kind for span in row.spans] == ["work", "lost", "work"]
        assert sum(span.samples for span in row.spans) == 50
    monkeypatch.setattr(timeline, "MAX_ROWS", 2)
    workers = tuple(work(0, 10, f"denoise-{slot}.0") for slot in range(12))
    found = make_timeline([DriverEvents(DRIVER, workers)], [], TimeBins(), now=None)
    assert [row.worker for row in found.rows] == ["denoise-0", "denoise-1"]
    assert found.to_dict()["rows_left_out"] == 10


@given(st.lists(st.floats(0.1, 500), min_size=1, max_size=30), st.integers(1, 40))
def test_the_spans_of_a_group_do_not_overlap(seconds, at_most):
    """A group denoises one sample at a time, so latents that wait for a decoder do not make it work twice."""
    records = []
    for number, taken in enumerate(seconds):
        stages = {"denoise": {"seconds": taken, "worker": GROUP, "node": "n"}, "decode": {"seconds": 1.0}}
        records.append((make_commit(make_sample(number + 1), stages=stages), T + 10 * number))
    spans = sorted(find_spans(records, Gpus(rank=1.0, ranks=4)), key=lambda span: span.start)
    assert sum(span.samples for span in spans) == len(seconds)
    assert all(span.gpus == 4.0 for span in spans)
    assert all(later.start >= earlier.end - 0.11 for earlier, later in itertools.pairwise(spans))
    busy = sum(span.end - span.start for span in spans)
    assert busy >= sum(seconds) - 0.11 * len(seconds)
    merged = merge_spans(spans, at_most)
    assert len(merged) <= at_most
    assert sum(span.samples for span in merged) == len(seconds)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (1.0, 1.0, 1.0)),
        ({"groups": {"gpus_per_rank": 0.5}, "decoders": {"gpus": 0, "placement": "pool"}}, (0.5, 0.0, 1.0)),
        ({"groups": {"gpus_per_rank": "x"}, "decoders": [], "encoders": {"gpus": -1}}, (1.0, 1.0, 1.0)),
    ],
)
def test_gpus_come_from_the_config(config, expected):
    """A run.json without valid shares has those of the defaults; a CPU run has none."""
    run = {"config": config, "identity": {"parallel": {"device": "cuda", "ulysses_degree": 4, "cfg_degree": 2}}}
    gpus = gpus_of(run)
    assert (gpus.rank, gpus.decoder, gpus.encoder) == expected
    assert gpus.of("denoise", {}) == 8 * gpus.rank
    assert gpus.of("denoise", {"ranks": 2}) == 2 * gpus.rank
    run["identity"]["parallel"]["device"] = "cpu"
    assert gpus_of(run) == Gpus()


def test_the_report_reads_the_events_of_the_root(tmp_path):
    """The parts of a driver's log appear in the timeline and in the GPU-seconds."""
    store = Store(str(tmp_path / "root"))
    open_root(store, 1, device="cuda")
    commits.commit(store, make_commit(make_sample(1)))
    lines = [encode_line(each) + b"\n" for each in EVENTS]
    store.put(layout.event_part(DRIVER, 0), b"".join(lines[:5]) + b"not an event\n")
    store.put(layout.event_part(DRIVER, 1), b"".join(lines[5:]))
    document = update_report(store).document
    assert [row["worker"] for row in document["timeline"]["rows"]] == ["decode-0", "denoise-0"][1:]
    assert document["totals"]["gpu_seconds"]["failure"] == 480


def test_a_driver_drains_only_a_few_times(monkeypatch):
    """P7: each drain cuts the idle time of every worker, so a log of many drains and workers would fill the memory."""
    monkeypatch.setattr(timeline, "MAX_SPANS", 10**6)
    drains = [event(1 + number / 10, f"drain_{'ended' if number % 2 else 'started'}") for number in range(2000)]
    workers = [event(0.5, "worker_ready", f"denoise-{number}.0") for number in range(50)]
    found = make_timeline([DriverEvents(DRIVER, (*workers, *drains))], [], TimeBins(), now=None)
    assert {sum(span.kind == "drain" for span in row.spans) for row in found.rows} == {timeline.MAX_DRAINS}
