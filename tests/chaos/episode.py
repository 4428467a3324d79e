"""One chaos run: an output root, a schedule, the same command until it ends, and the checks of what it has left."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.agent import Agent
from tests.chaos.checker import Finding, check
from tests.chaos.faults.clock import CLOCK
from tests.chaos.machines import Machines
from tests.chaos.roots import Bucket, SmallDisk
from tests.chaos.schedule import Event, make_schedule
from tests.chaos.variants import STEP_S, VARIANTS, Variant, make_variant
from tests.support.repository import ROOT

ENGINES = "tests.chaos.engine:ChaosEngine,tests.chaos.toy_engine:ToyEngine"  # that `verify --repair` may run
HIDDEN_FAULTS = ("s3-forgotten", "lose-media")  # after which only `verify` can find what is missing


@dataclasses.dataclass
class Result:
    seed: int
    root: str
    variant: str
    events: dict[str, int]
    requests: dict[str, int]  # disturbed requests by fault of the endpoint
    schedule: list[str]  # the events that were carried out, in order
    samples: int
    seconds: float
    ends: dict[str, int]  # exit codes of the command
    findings: list[dict[str, str]]  # that are left at the end
    repaired: list[dict[str, str]]  # that `verify --repair` has removed, after objects were lost
    collected: int  # objects that `gc` has removed
    retried: int  # samples that exhausted their attempts by bad luck and were released by `retry`


class Episode:
    """`reference` is the root of an undisturbed run of the variant. `folder` is removed unless something was found."""

    def __init__(
        self, machines: Machines, folder: Path, root: Any, variant: Variant, reference: Path, step_seconds: float
    ) -> None:
        self.machines, self.folder, self.root = machines, folder, root
        self.variant, self.reference = variant, reference
        (folder / "marks").mkdir(parents=True, exist_ok=True)
        (folder / "clock").write_text("0")
        self._command = command_of(variant, folder, root.url, machines, step_seconds)

    def run(self, schedule: Sequence[Event], machine_count: int = 2, seed: int = 0) -> Result:
        began = time.monotonic()
        requests = Counter(self.root.layer.counts) if self.root.kind == "s3" else Counter()
        agent = Agent(self.machines, self.root, self._command, self._environment(), self.folder, machine_count)
        try:
            agent.run(schedule)
            found = [Finding("wrong", "run", text) for text in agent.findings]
            retried = self._retry_unlucky() if agent.ended else 0
            found += [Finding("left", "cluster", text) for text in self.machines.leftovers()]
            repaired: list[Finding] = []
            if agent.done.keys() & set(HIDDEN_FAULTS) and (repaired := self._check()):
                trusted = (f"--hook={hook}" for hook in self.variant.hooks)
                self._call("verify", self.root.url, "--repair", "--address", self.machines.fleet.address, *trusted)
            collected = self._call("gc", self.root.url, "--yes", "--min-age-hours", "0", "--json").count("gc-object")
            found += self._check()
            found += [Finding("left", "disk", str(path)) for path in self._temporary_files()]
        finally:
            agent.close()
        if self.root.kind == "s3":
            requests = Counter(self.root.layer.counts) - requests
        samples = json.loads((self.reference / "run.json").read_bytes())["manifest"]["samples"]
        result = Result(
            seed,
            self.root.kind,
            self.variant.name,
            dict(agent.done),
            dict(requests),
            agent.carried_out,
            samples,
            round(time.monotonic() - began, 1),
            dict(agent.ends),
            [dataclasses.asdict(each) for each in found],
            [dataclasses.asdict(each) for each in repaired],
            collected,
            retried,
        )
        if not found:
            self.root.close()
            shutil.rmtree(self.folder, ignore_errors=True)
        return result

    def _check(self) -> list[Finding]:
        copy = self.root.download(self.folder / "copy")
        found = check(copy, self.variant.expected, self.reference, frames=self.variant.signed)
        if uploads := self.root.unfinished_uploads():
            found.append(Finding("left", "(uploads)", f"{uploads} unfinished uploads"))
        return found

    def _retry_unlucky(self) -> int:
        """Samples that failed by faults of the schedule alone, as often as their budget allows, are released once."""
        expected = {path.stem for path in self.reference.glob("quarantine/*/*.json")}
        unlucky = {Path(key).stem for key in self.root.keys("quarantine/")} - expected
        if unlucky:
            self._call("retry", self.root.url, "--class", "infra", "--class", "preempted", "--yes")
            subprocess.run(self._command, cwd=ROOT, env=self._environment(), capture_output=True, timeout=400)
        return len(unlucky)

    def _temporary_files(self) -> list[Path]:
        """On the disks of the machines: videos that still wait, and folders of processes that are running."""
        found = [path for machine in self.machines.all for path in machine.disk.glob("hv_batch_spool-*/*/[!.]*/**/*")]
        folders = [path for machine in self.machines.all for path in machine.disk.glob("hv_batch-*")]
        # Folders of killed decoders stay for six hours, as documented in the publisher.
        found += [path for path in folders if path.name.split("-")[1].isdigit() and _is_running(path)]
        return [path for path in found if path.is_file() or path in folders]

    def _environment(self) -> dict[str, str]:
        return environment_of(self.machines) | {"TMPDIR": str(self.folder), CLOCK: str(self.folder / "clock")}

    def _call(self, *arguments: str) -> str:
        """A command after the run, when no fault is active."""
        command = [sys.executable, "-m", "hv_batch", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._environment(), capture_output=True, text=True, timeout=400)
        with (self.folder / "driver.log").open("a") as log:
            log.write(f"--- {' '.join(arguments)}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout


def command_of(variant: Variant, folder: Path, output: str, machines: Machines, step_seconds: float) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(variant.config_with(folder / "marks", step_seconds)))
    arguments = ["run", "--config", str(folder / "config.yaml"), "--manifest", str(variant.manifest), *variant.flags]
    arguments += ["--output", output, "--address", machines.fleet.address]
    return [sys.executable, "-m", "tests.chaos.driver", *arguments]


def environment_of(machines: Machines) -> dict[str, str]:
    """Of the commands."""
    return {**os.environ, **machines.environment, "HV_BATCH_ENGINES": ENGINES}


def make_reference(machines: Machines, folder: Path, variant: Variant) -> Path:
    """The root of an undisturbed run; made once."""
    folder = folder / f"{variant.name}-run"
    if not (folder / "out" / "_SUCCESS").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "marks").mkdir(parents=True)
        command = command_of(variant, folder, str(folder / "out"), machines, step_seconds=0.0)
        environment = environment_of(machines)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == variant.exit_code, done.stderr[-8000:]
        found = check(folder / "out", variant.expected)
        assert not found, found
    return folder / "out"


def _is_running(path: Path) -> bool:
    return Path(f"/proc/{path.name.split('-')[1]}").exists()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the episodes of a campaign have in common."""

    engine: str  # "fake" or "toy"
    samples: int
    events: int
    wait_s: float  # between two events, on average
    step_seconds: float


PLANS = {"fake": Plan("fake", 40, 30, 3.0, STEP_S), "toy": Plan("toy", 8, 9, 12.0, 0.5)}


def run_episode(machines: Machines, folder: Path, references: Path, seed: int, plan: Plan, endpoints: Any) -> Result:
    """An episode whose root, variant and schedule are drawn from `seed`."""
    draw = random.Random(seed)
    kind = "s3" if draw.random() < 0.6 else "disk"
    variant = make_variant(plan.engine, draw.randrange(VARIANTS), plan.samples, references)
    reference = make_reference(machines, references, variant)
    place = folder / f"seed-{seed}"
    root = Bucket(f"seed-{seed}", *endpoints) if kind == "s3" else SmallDisk(place / "disk")
    episode = Episode(machines, place, root, variant, reference, plan.step_seconds)
    schedule = make_schedule(seed, kind, plan.events, wait_s=plan.wait_s)
    print(f"seed {seed}, {kind}, {variant.name}: {'; '.join(map(str, schedule))}", file=sys.stderr, flush=True)
    try:
        return episode.run(schedule, seed=seed)
    finally:
        root.close()
