"""Many chaos runs, one after the other: `python -m tests.chaos.campaign --minutes 60 --seed 1 --out results.jsonl`.

Each run has a seed of its own, from which its root, config and schedule are drawn; `--seed N --runs 1` repeats one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.episode import PLANS, Result, run_episode
from tests.chaos.faults.storage_faults import FaultyS3
from tests.chaos.machines import MARKER, Machines, kill_marked, start_head
from tests.support.repository import ROOT
from tests.support.s3_server import S3Server

MACHINES = 2
FINDINGS = ("lost", "doubled", "wrong", "left")


@contextmanager
def arena(folder: Path, seed: int) -> Iterator[tuple[Machines, tuple[FaultyS3, S3Server]]]:
    """A Ray cluster and the two endpoints of one object store."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {"RAY_worker_niceness": "0"}  # Ray's own 15 would add to that of this process
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # closed connections are faults here
    endpoints = (FaultyS3(seed), S3Server())
    keys = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= keys | {"AWS_ENDPOINT_URL": endpoints[0].endpoint}  # tasks without a GPU run on the head, too
    os.environ[MARKER] = str(folder)
    machines = Machines(folder, start_head(folder))
    try:
        for _ in range(MACHINES):
            machines.add()
        yield machines, endpoints
    finally:
        machines.close()
        machines.fleet.close()
        kill_marked(folder)
        for endpoint in endpoints:
            endpoint.stop()


def run_campaign(
    folder: Path, engine: str, seed: int, go_on: Callable[[int], bool], report: Callable[[Result], object]
) -> list[Result]:
    """Runs with the seeds `seed`, `seed` + 1, ... while `go_on(number)`."""
    results = []
    references = folder / "references"
    references.mkdir(exist_ok=True)
    with arena(folder, seed) as (machines, endpoints):
        while go_on(len(results)):
            result = run_episode(machines, folder, references, seed + len(results), PLANS[engine], endpoints)
            results.append(result)
            report(result)
    return results


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """A row for each kind of event, with the findings of the runs in which it occurred; then the sums."""
    results = list(results)
    kinds = sorted({kind for result in results for kind in result["events"]})
    rows = [_row(kind, [result for result in results if kind in result["events"]], [kind]) for kind in kinds]
    disturbed = sum(sum(result["requests"].values()) for result in results)
    minutes = sum(result["seconds"] for result in results) / 60.0
    return "\n".join(
        [
            f"| event | times | runs | {' | '.join(FINDINGS)} |",
            f"|---|---|---|{'---|' * len(FINDINGS)}",
            *rows,
            _row("all", results, kinds),
            "",
            f"{minutes:.0f} minutes, {disturbed:,} disturbed requests.",
        ]
    )


def _row(name: str, results: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    times = sum(result["events"].get(kind, 0) for result in results for kind in kinds)
    found = Counter(finding["kind"] for result in results for finding in result["findings"])
    return f"| {name} | {times:,} | {len(results)} | {' | '.join(str(found[kind]) for kind in FINDINGS)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=10**6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=sorted(PLANS), default="fake", help="toy: the real engine over gloo")
    parser.add_argument("--out", type=Path, default=Path("chaos.jsonl"))
    parser.add_argument("--folder", type=Path, help="keeps what is left of runs with findings")
    parser.add_argument("--table", action="store_true", help="print the table of the results in --out, and run nothing")
    parser.add_argument("--pause-while", type=Path, help="a file; no run starts while it exists")
    given = parser.parse_args()
    if given.table:
        print(table(map(json.loads, given.out.read_text().splitlines())))
        return 0
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60.0 * given.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is ended

    def go_on(number: int) -> bool:
        while given.pause_while and given.pause_while.exists():
            time.sleep(2.0)
        return number < given.runs and time.monotonic() < deadline

    def report(result: Result) -> None:
        line = json.dumps(dataclasses.asdict(result))
        print(line, flush=True)
        with given.out.open("a") as file:
            file.write(line + "\n")

    return 3 if any(result.findings for result in run_campaign(folder, given.engine, given.seed, go_on, report)) else 0


if __name__ == "__main__":
    sys.exit(main())
