"""Whatever a file holds, its reader gives a clean result or a UserError (P1, P5, P6).

It does so in bounded time and memory, opens nothing outside its folder, and starts nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.batch import Outcome, all_targets, run_input
from tests.fuzz.mutations import mutate_json
from tests.support.repository import ROOT

INPUTS, COMMAND_INPUTS = 5, 2  # of a target in the default suite
BATCH_S = 30.0  # of one target, in a process of its own
MAX_START_S = 120.0


def test_no_damage_to_an_input_gives_anything_but_a_result_or_a_user_error(tmp_path, pytestconfig):
    """P5, P6: a few inputs for every reader. `pytest -m fuzz` runs more."""
    folder, outcome = tmp_path.resolve(), Outcome()
    for name, target in all_targets(folder).items():
        for number in range(COMMAND_INPUTS if name.startswith("command") else INPUTS):
            run_input(name, target, pytestconfig.getoption("--seed"), number, folder, outcome)
    assert not outcome.findings, "\n\n".join(outcome.findings)
    assert outcome.inputs / 4 < outcome.refused < outcome.inputs


def test_the_harness_finds_what_it_is_for(tmp_path):
    """A reader that opens another file, raises another error or does not end is reported."""

    def bad(data: bytes, folder: Path) -> None:
        (folder.parent / "outside").open("w").close()
        raise KeyError(data)

    def endless(data: bytes, folder: Path) -> None:
        while True:
            pass

    folder, outcome = tmp_path / "inside", Outcome()
    folder.mkdir()
    run_input("bad", (b"x", lambda data, rng: data, bad), 1, 0, folder, outcome)
    run_input("endless", (b"x", lambda data, rng: data, endless), 1, 1, folder, outcome, limit_s=0.05)
    error, opened, hang = outcome.findings
    assert "bad, seed 1, input 0: KeyError" in error
    assert "outside to write" in opened
    assert "HangError" in hang


def test_seed_and_number_alone_determine_an_input():
    """A finding can be repeated: no input depends on those before it."""
    start = json.dumps({"a": [1, {"b": "c"}], "d": {}}).encode()

    def damaged(number: int) -> bytes:
        return mutate_json(start, Random(number))

    first = [damaged(number) for number in range(300)]
    assert [damaged(number) for number in reversed(range(300))] == first[::-1]


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_damaged_inputs_for_an_hour(pytestconfig, tmp_path):
    """P1, P5, P6: every target in turn, each in a process of its own, until --fuzz-minutes are over."""
    end = time.monotonic() + 60 * pytestconfig.getoption("--fuzz-minutes")
    seed, findings, inputs = pytestconfig.getoption("--seed"), [], 0
    targets = json.loads(_run().stdout)
    while time.monotonic() < end:
        for name in targets:
            seconds = min(BATCH_S, end - time.monotonic())
            if seconds <= 0:
                break
            done = _run(name, "--seed", str(seed), "--seconds", f"{seconds:.0f}")
            lines = done.stdout.splitlines()
            if done.returncode:
                last = lines[-1] if lines else "none"
                findings.append(f"{name}, seed {seed}, input {last}: exit {done.returncode}\n{done.stderr[-2000:]}")
                continue
            outcome = json.loads(lines[-1])
            inputs += outcome["inputs"]
            findings += outcome["findings"]
            print(f"{name}, seed {seed}: {outcome['inputs']} inputs, {len(outcome['findings'])} findings", flush=True)
        seed += 1
    print(f"{inputs} inputs, {len(findings)} findings")
    assert not findings, "\n\n".join(findings)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    seconds = float(arguments[-1]) if "--seconds" in arguments else 0.0
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz.batch", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20 * MAX_START_S + seconds,
        check=False,
    )
