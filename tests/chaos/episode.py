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
from tests.chaos.clock import CLOCK
from tests.chaos.machines import Machines
from tests.chaos.roots import Bucket, SmallDisk
from tests.chaos.schedule import Event, make_schedule
from tests.support.repository import ROOT
from tests.support.runs import FAKE_CONFIG

HIDDEN_FAULTS = ("s3-forgotten", "lose-media")  # after which only `verify` can find what is missing

VARIANTS = 6
STEP_S = 0.4  # of a denoise of four steps: faults should meet samples in work

# A few samples of each class of failure, in a manifest with ids of all kinds.
POISON = ("!raise-encode", "!raise-denoise", "!oom-denoise")


@dataclasses.dataclass
class Result:
    seed: int
    root: str
    variant: int
    events: dict[str, int]
    requests: dict[str, int]  # disturbed requests by fault of the endpoint
    samples: int
    seconds: float
    starts: int
    ends: dict[str, int]
    findings: list[dict[str, str]]  # that are left at the end
    repaired: list[dict[str, str]]  # that `verify --repair` has removed, after objects were lost
    collected: int  # objects that `gc` has removed
    retried: int  # samples that exhausted their attempts by bad luck and were released by `retry`


def write_manifest(path: Path, samples: int, poison: bool) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(samples):
        row: dict[str, Any] = {"id": f"s{number:03d}", "prompt": f"take {number}", "category": "ab"[number % 2]}
        if number % 7 == 3:
            del row["id"]
        if number % 9 == 5:
            row |= {"id": f"cut {number} / b", "num_videos": 2}
        if number % 11 == 6:
            row |= {"num_frames": 1}
        rows.append(row)
    for number, fault in enumerate(POISON if poison else ()):
        rows.insert(3 + 5 * number, {"id": f"bad-{number}", "prompt": f"bad {number} {fault}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def variant_config(variant: int) -> dict[str, dict[str, Any]]:
    """Sections of the config. The number draws the options, so that all of them are used together with all faults."""
    draw = random.Random(variant)
    return {
        "decoders": {"placement": draw.choice(["pool", "pool", "group"]), "gpus": 0.5, "count": draw.choice([1, 2])},
        "encoders": {"gpus": 0.5, "batch_size": draw.choice([1, 3])},
        "groups": {"count": 2, "checkpoint_every": draw.choice([0, 1, 2])},
        "output": {"shard_size": draw.choice([5, 9]), "webdataset": draw.random() < 0.5},
        "media": {"poster": draw.random() < 0.5},
        "timeouts": {"start_s": 300, "stall_s": 25, "drain_s": 15},
        "retries": {"infra": 6, "worker": 12},  # a schedule is denser than any real night
    }


class Episode:
    """`config` is that of the run, `reference` the root of an undisturbed run with an equal one.

    `folder` is removed at the end unless something was found.
    """

    def __init__(
        self, machines: Machines, folder: Path, root: Any, config: dict[str, Any], manifest: Path, reference: Path
    ) -> None:
        self.machines, self.folder, self.root = machines, folder, root
        self.manifest, self.reference = manifest, reference
        (folder / "marks").mkdir(parents=True, exist_ok=True)
        (folder / "clock").write_text("0")
        self._command = command_of(config, folder, manifest, root.url, machines)

    def run(self, schedule: Sequence[Event], machine_count: int = 2, seed: int = 0, variant: int = 0) -> Result:
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
                self._call("verify", self.root.url, "--repair", "--address", self.machines.fleet.address)
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
            variant,
            dict(agent.done),
            dict(requests),
            samples,
            round(time.monotonic() - began, 1),
            agent.starts,
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
        found = check(self.root.download(self.folder / "copy"), self.manifest, self.reference)
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


def command_of(config: dict[str, Any], folder: Path, manifest: Path, output: str, machines: Machines) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["run", "--config", str(folder / "config.yaml"), "--manifest", str(manifest)]
    arguments += ["--output", output, "--address", machines.fleet.address]
    return [sys.executable, "-m", "tests.chaos.driver", *arguments]


def environment_of(machines: Machines) -> dict[str, str]:
    """Of the commands."""
    return {**os.environ, **machines.environment, "HV_BATCH_ENGINES": "tests.chaos.engine:ChaosEngine"}


def make_config(variant: int, marks: Path, step_seconds: float) -> dict[str, Any]:
    config = json.loads(json.dumps(FAKE_CONFIG))
    for section, values in variant_config(variant).items():
        config[section] = {**config.get(section, {}), **values}
    options = {"marks": str(marks), "step_seconds": step_seconds}
    return config | {"model": {"engine": "tests.chaos.engine:ChaosEngine", "options": options}}


def make_reference(machines: Machines, folder: Path, manifest: Path, variant: int) -> Path:
    """The root of an undisturbed run; made once."""
    if not (folder / "out" / "_SUCCESS").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "marks").mkdir(parents=True)
        config = make_config(variant, folder / "marks", step_seconds=0.0)
        command = command_of(config, folder, manifest, str(folder / "out"), machines)
        environment = environment_of(machines)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 3, done.stderr[-8000:]
        found = check(folder / "out", manifest)
        assert not found, found
    return folder / "out"


def _is_running(path: Path) -> bool:
    return Path(f"/proc/{path.name.split('-')[1]}").exists()


def run_episode(
    machines: Machines, folder: Path, references: Path, seed: int, samples: int, events: int, endpoints: Any
) -> Result:
    """An episode whose root, config and schedule are drawn from `seed`."""
    kind, variant = "s3" if random.Random(seed).random() < 0.6 else "disk", random.Random(seed).randrange(VARIANTS)
    manifest = references / f"manifest-{samples}.jsonl"
    if not manifest.exists():
        write_manifest(manifest, samples, poison=True)
    reference = make_reference(machines, references / f"variant-{variant}-{samples}", manifest, variant)
    place = folder / f"seed-{seed}"
    root = Bucket(f"seed-{seed}", *endpoints) if kind == "s3" else SmallDisk(place / "disk")
    config = make_config(variant, place / "marks", STEP_S)
    episode = Episode(machines, place, root, config, manifest, reference)
    try:
        return episode.run(make_schedule(seed, kind, events), seed=seed, variant=variant)
    finally:
        root.close()
