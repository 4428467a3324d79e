"""Many small runs without Ray on a faulty endpoint: `python -m tests.chaos.storage_runs --runs 100 --seed 1`.

Each is a run of the real job package in one thread (tests/support/small_runs.py) on S3. Faults begin and end at
numbers of requests, so a seed gives nearly the same run again. A run that fails is repeated until it ends, as an
operator does. Then the checker compares the root with that of an undisturbed run, and if it finds something, `verify`
and a further run must repair it: a store that forgets what it has confirmed cannot be noticed otherwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from hv_batch.job.inspection.garbage import find_garbage, remove
from hv_batch.job.inspection.verify import MediaShape, remove_faults, verify
from hv_batch.job.records.continuation import begin_run
from hv_batch.job.storage import object_store
from hv_batch.job.storage import store as store_module
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.chaos.checker import Finding, check
from tests.chaos.faults.storage_faults import FaultyS3
from tests.chaos.roots import Bucket
from tests.chaos.schedule import FORGETTABLE
from tests.support.continued_runs import Command
from tests.support.s3_server import S3Server
from tests.support.small_runs import real_media, run_small

FAULTS = ("503", "expired", "skewed", "torn", "unacknowledged", "forgotten", "stale", "down")  # those that need no time
REQUESTS = 220  # of an undisturbed run, about; faults begin before
MOST_TRIES = 60
ROWS = [{"id": f"s{number}", "prompt": f"take {number}", "num_frames": 5 if number else 1} for number in range(6)]
POISON = frozenset({"s2"})


@dataclass
class StorageResult:
    seed: int
    faults: dict[str, int]  # that have begun
    requests: dict[str, int]  # that they have disturbed
    tries: int
    repaired: list[dict[str, str]]
    findings: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def endpoints(seed: int) -> Iterator[tuple[FaultyS3, S3Server]]:
    """A faulty endpoint and one without faults, of the same objects; the environment names the first."""
    servers = (FaultyS3(seed), S3Server())
    environment = {"AWS_ENDPOINT_URL": servers[0].endpoint, "AWS_ACCESS_KEY_ID": "user"}
    environment |= {"AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    before, pauses, part = dict(os.environ), store_module.PAUSES_S, object_store.PART_BYTES
    os.environ |= environment
    store_module.PAUSES_S, object_store.PART_BYTES = (0.01, 0.01, 0.01), 1024
    try:
        yield servers
    finally:
        store_module.PAUSES_S, object_store.PART_BYTES = pauses, part
        os.environ.clear()
        os.environ |= before
        for server in servers:
            server.stop()


class StorageRuns:
    def __init__(self, folder: Path, servers: tuple[FaultyS3, S3Server]) -> None:
        self._folder, self._servers = folder, servers
        sections = {"output": {"shard_size": 3, "webdataset": True}, "media": {"poster": True}}
        self._command = Command(folder / "manifest.jsonl", ROWS, sections)
        self._media = partial(real_media, poster=True)
        reference = Store(str(folder / "reference"))
        self._run_once(reference)

    def run(self, seed: int) -> StorageResult:
        root, layer = Bucket(f"storage-{seed}", *self._servers), self._servers[0].layer
        store, draw = Store(root.url), random.Random(seed)
        disturbed, begun = Counter(layer.counts), Counter()
        for _ in range(draw.randint(3, 8)):
            fault = draw.choice(FAULTS)
            only = draw.choice(FORGETTABLE) if fault == "forgotten" else ""
            first = layer.requests + draw.randint(1, REQUESTS)
            layer.script.setdefault(first, []).append(partial(self._begin, begun, fault, only))
            last = first + draw.randint(2, 40)
            if fault != "forgotten":  # which ends when it has forgotten an upload
                layer.script.setdefault(last, []).append(partial(layer.switch_off, fault))
        tries = self._run_until_done(store)
        layer.script.clear()
        layer.switch_all_off()
        tries += self._run_until_done(store)
        repaired = self._check(root)
        if repaired:
            remove_faults(store, verify(store, lambda data, suffix: MediaShape(1, 1, 1), decodes=0).findings)
            if not store.exists("summary.json"):
                store.delete("_SUCCESS")  # a small run does not look further; the command writes the summary again
            tries += self._run_until_done(store)
        for garbage in find_garbage(store, older_than=time.time() + 3600.0):
            remove(store, garbage)
        found = self._check(root)
        result = StorageResult(
            seed,
            dict(begun),
            dict(Counter(layer.counts) - disturbed),
            tries,
            [asdict(each) for each in repaired],
            [asdict(each) for each in found],
        )
        root.close()
        return result

    def _begin(self, begun: Counter[str], fault: str, only: str) -> None:
        begun[fault] += 1
        self._servers[0].layer.switch_on(fault, only)

    def _run_until_done(self, store: Store) -> int:
        errors: Counter[str] = Counter()
        while errors.total() < MOST_TRIES:
            try:
                self._run_once(store)
                return errors.total() + 1
            except (OSError, UserError, ValueError) as error:
                errors[f"{type(error).__name__}: {error}"] += 1
        raise AssertionError(f"the run does not end after {MOST_TRIES} tries: {dict(errors)}")

    def _run_once(self, store: Store) -> None:
        index, document, (_, continuation) = self._command.check(store)
        document["manifest"]["url"] = str(self._folder / "manifest.jsonl")
        begin_run(store, document, index, continuation)
        run_small(store, (), poison=POISON, media=self._media, adorned=True, index=index)
        if not store.exists("_SUCCESS"):
            raise UserError("some samples have no record")

    def _check(self, root: Bucket) -> list[Finding]:
        copy = root.download(self._folder / "copy")
        found = check(copy, self._folder / "manifest.jsonl", self._folder / "reference")
        if uploads := root.unfinished_uploads():
            found.append(Finding("left", "(uploads)", f"{uploads} unfinished uploads"))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    failed = 0
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # closed connections are faults here
    with tempfile.TemporaryDirectory() as folder, endpoints(given.seed) as servers:
        runs = StorageRuns(Path(folder), servers)
        for seed in range(given.seed, given.seed + given.runs):
            line = json.dumps(asdict(result := runs.run(seed)))
            failed += bool(result.findings)
            print(line, flush=True)
            if given.out:
                with given.out.open("a") as file:
                    file.write(line + "\n")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
