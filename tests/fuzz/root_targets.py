"""Objects of an output root, read by their own reader, and by the commands that read a whole root."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.dataset.card import write_card
from hv_batch.job.dataset.lineage import read_lineage
from hv_batch.job.dataset.seal import read_rows
from hv_batch.job.dataset.shard_totals import read_totals
from hv_batch.job.documents.card import parse_card
from hv_batch.job.event_log.reader import read_events
from hv_batch.job.inspection.activity import read_activity
from hv_batch.job.inspection.diff import compare
from hv_batch.job.inspection.garbage import find_garbage
from hv_batch.job.inspection.status import read_status
from hv_batch.job.inspection.summary import aggregate
from hv_batch.job.inspection.verify import verify
from hv_batch.job.manifest.index import load_recorded_index, read_index, read_part
from hv_batch.job.records.choices import read_choices
from hv_batch.job.records.commits import quarantine_record, read_commit, read_quarantine
from hv_batch.job.records.latents import get_latents, get_steps, sample_identity
from hv_batch.job.records.lease import read_lease
from hv_batch.job.records.lease_holder import encode_holder, this_process
from hv_batch.job.records.quarantine import earlier_failures
from hv_batch.job.records.run_document import read_run, read_run_config, read_summary
from hv_batch.job.records.withdrawn import read_tombstone, tombstone
from hv_batch.job.report.report_files import ReportFiles
from hv_batch.job.report.update import Reporter, update_report
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store
from tests.fuzz.mutations import mutate, mutate_json
from tests.support import make_unfinished_root as unfinished
from tests.support.plans import publish_plan
from tests.support.rendered_roots import FINGERPRINT, make_failure
from tests.support.small_runs import run_small, some_samples

DRIVER = "20261129T014500Z-0123abcd"
EVENTS = [
    {"at": 1.0, "kind": "run_started", "samples": 6, "version": "0.3", "host": "h"},
    {"at": 2.0, "kind": "worker_ready", "worker": "denoise-0.0", "stage": "denoise", "nodes": ["n (1)"], "gpus": 1.0},
    {"at": 9.0, "kind": "worker_work", "worker": "denoise-0.0", "stage": "denoise", "since": 2.0, "seconds": 5.0},
    {
        "at": 9.5,
        "kind": "worker_lost",
        "worker": "denoise-0.0",
        "stage": "denoise",
        "class": "INFRA",
        "message": "gone",
    },
    {"at": 9.9, "kind": "progress", "committed": 1, "pending": 5},
    {"at": 10.0, "kind": "run_ended", "outcome": "failed", "message": "no disk"},
]
SAMPLES = some_samples(6)


def make_root(url: str) -> Store:
    """A root with an object of every kind."""
    store = Store(url)
    run_small(store, SAMPLES, poison={"s002"})
    publish_plan(store, SAMPLES)
    run = read_run(store)
    unfinished.make_root(url)
    failures = [make_failure()]
    store.put(layout.LEASE, encode_holder(this_process("run")))
    store.put(
        layout.retried_key(0, "s003"),
        encode(quarantine_record(SAMPLES[2], failures=failures, fingerprint=run["fingerprint"], versions={})),
    )
    place = {"key": "s006", "id": "s006", "row": 6, "video_index": 0, "shard": 1}
    store.put(layout.withdrawn_key(1, "s006"), encode(tombstone(place, reason="a face", sha256="ab" * 32)))
    store.put(layout.event_part(DRIVER, 0), b"".join(json.dumps(event).encode() + b"\n" for event in EVENTS))
    update_report(store, running=False)
    write_card(store, run, aggregate(store))
    return store


Reader = Callable[[Store], object]


def _readers(store: Store) -> Mapping[str, Reader]:
    """The reader of one object of each kind, by its key."""
    index = read_index(store)
    plain, cached, final = unfinished.PLAIN, unfinished.CACHED, unfinished.DENOISED
    return {
        layout.RUN: lambda store: (read_run(store), read_run_config(store.url)),
        layout.SUMMARY: read_summary,
        layout.CHOICES: read_choices,
        layout.LEASE: read_lease,
        layout.CARD: lambda store: parse_card(store.get(layout.CARD)),
        layout.INDEX: lambda store: (read_index(store), *_whole_index(store)),
        index.parts[0].name: lambda store: read_part(store, index.parts[0]),
        layout.commit_key(0, "s001"): lambda store: read_commit(store, 0, "s001"),
        layout.quarantine_key(0, "s002"): lambda store: read_quarantine(store, 0, "s002"),
        layout.retried_key(0, "s003"): lambda store: earlier_failures(store, 0, ["s003"]),
        layout.withdrawn_key(1, "s006"): lambda store: read_tombstone(store, 1, "s006"),
        layout.metadata_key(0): lambda store: read_rows(store, 0),
        layout.lineage_key(0): lambda store: read_lineage(store, 0),
        layout.totals_key(0): lambda store: read_totals(store, 0),
        layout.report_digest_key(0): lambda store: ReportFiles(store, store).read_finished_digest(0, 4),
        layout.report_part_key(0): lambda store: ReportFiles(store, store).read_part(0),
        layout.REPORT_DATA: lambda store: ReportFiles(store, store).last_price(),
        layout.event_part(DRIVER, 0): lambda store: _activity(store),
        layout.step_key(0, plain.key): lambda store: get_steps(store, plain, sample_identity(plain, FINGERPRINT)),
        layout.step_key(0, cached.key): lambda store: get_steps(store, cached, sample_identity(cached, FINGERPRINT)),
        layout.latent_key(0, final.key): lambda store: get_latents(store, final, sample_identity(final, FINGERPRINT)),
    }


def _whole_index(store: Store) -> Iterable[Any]:
    config = RunConfig.model_validate(read_run(store)["config"])
    return load_recorded_index(store, config, "") or ()


def _activity(store: Store) -> object:
    return read_events(store), read_activity(store, read_lease(store))


COMMANDS: Mapping[str, Callable[[Store, Path], object]] = {
    "status": lambda store, _: [read_status(store).render(), read_status(store).to_dict()],
    "summary": lambda store, _: aggregate(store),
    "verify": lambda store, _: verify(store, _decode_nothing, decodes=0).findings,
    "report": lambda store, folder: Reporter(store, Store(str(folder / "report"))).update(),
    "gc": lambda store, _: list(find_garbage(store, older_than=2e9)),
    "diff": lambda store, _: compare(store, store),
}


def _decode_nothing(*_: Any) -> Any:
    raise AssertionError("no media are decoded")


class RootTargets:
    """One root, of which an object is replaced for each input."""

    def __init__(self, folder: Path) -> None:
        self.store = make_root(str(folder / "root"))
        self.intact: dict[str, bytes] = {key: self.store.get(key) for key in self._documents()}
        self.readers = _readers(self.store)

    def targets(self) -> Iterator[tuple[str, tuple[bytes, Callable, Callable]]]:
        for key, read in self.readers.items():
            yield f"object {key}", (self.intact[key], damage_object(key), partial(self._read, key, read))
        for name in COMMANDS:
            yield f"command {name}", (b"", self._damage_any, partial(self._run, name))

    def _documents(self) -> list[str]:
        root = Path(self.store.url)
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        return sorted(key for key in names if not key.startswith(("data/", "posters/")) or key.endswith(".parquet"))

    def _read(self, key: str, read: Reader, data: bytes, _: Path) -> None:
        self.put(key, data)
        try:
            read(self.store)
        finally:
            self.put(key, self.intact[key])

    def _damage_any(self, _: bytes, rng: Random) -> bytes:
        key = rng.choice(sorted(self.intact))
        return key.encode() + b"\0" + damage_object(key)(self.intact[key], rng)

    def _run(self, name: str, data: bytes, folder: Path) -> None:
        key, _, content = data.partition(b"\0")
        self.put(key.decode(), content)
        try:
            COMMANDS[name](self.store, folder)
        finally:
            self.put(key.decode(), self.intact[key.decode()])

    def put(self, key: str, data: bytes) -> None:
        Path(self.store.url, key).write_bytes(data)  # without the flush of `Store.put`


def damage_object(key: str) -> Callable[[bytes, Random], bytes]:
    if key.endswith(".jsonl"):
        return _damage_lines
    return mutate_json if key.endswith(".json") else mutate


def _damage_lines(data: bytes, rng: Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)
