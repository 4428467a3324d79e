"""Fuzzes one target, or repeats one input: `python -m tests.fuzz.batch TARGET --seed 7 [--input 123] [--seconds 60]`.

The inputs of a target are numbered. Number and seed determine an input, so a finding can be repeated alone. Without a
target, all are listed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from hv_batch.protocol import UserError
from tests.fuzz import file_targets, manifest_targets
from tests.fuzz.root_targets import RootTargets
from tests.fuzz.watching import HangError, watched

# Far above what any input of at most 1 MB needs, and far below what a quadratic step would take.
LIMIT_S = 20.0
LIMIT_BYTES = 600 << 20

Target = tuple[bytes, Callable[[bytes, Random], bytes], Callable[[bytes, Path], None]]
# Documented to raise ValueError for a damaged object; their callers expect it.
VALUE_ERRORS = ("object data/", "object lineage/", "object README.md")


@dataclass
class Outcome:
    """What a batch has done."""

    inputs: int = 0
    refused: int = 0  # by a UserError; all others gave a result
    findings: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_bytes: int = 0


def all_targets(folder: Path) -> Mapping[str, Target]:
    """The targets by name. Their root is made in `folder`."""
    return {**manifest_targets.TARGETS, **file_targets.TARGETS, **dict(RootTargets(folder).targets())}


def run_input(
    name: str, target: Target, seed: int, number: int, folder: Path, outcome: Outcome, limit_s: float = LIMIT_S
) -> None:
    """Give one input to a target, and add what it does to `outcome`."""
    start, damage, read = target
    data = damage(start, Random(f"{name} {seed} {number}"))
    outcome.inputs += 1
    try:
        with watched(folder, limit_s) as watch:
            read(data, folder)
    except UserError:
        outcome.refused += 1
    except (Exception, HangError) as error:  # noqa: BLE001  (whatever it raises is a finding)
        if isinstance(error, ValueError | FileNotFoundError) and name.startswith(VALUE_ERRORS):
            outcome.refused += 1
        else:
            place = "".join(traceback.format_exception(error)[-6:])[-1500:]
            outcome.findings.append(f"{name}, seed {seed}, input {number}: {type(error).__name__}\n{place}")
    outcome.slowest_s = max(outcome.slowest_s, watch.cpu_s)
    outcome.largest_bytes = max(outcome.largest_bytes, watch.peak_bytes)
    if watch.seen:
        outcome.findings.append(f"{name}, seed {seed}, input {number}: {watch.seen[:3]}")
    if watch.peak_bytes > LIMIT_BYTES:
        outcome.findings.append(f"{name}, seed {seed}, input {number}: {watch.peak_bytes >> 20} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=int)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        targets = all_targets(folder)
        if options.target is None:
            print(json.dumps(list(targets)))
            return
        outcome, end, number = Outcome(), time.monotonic() + options.seconds, options.input or 0
        while True:
            # A hang inside a C library cannot be interrupted: the process ends, and the caller reports the input.
            faulthandler.dump_traceback_later(20 * LIMIT_S, exit=True)
            print(number, flush=True)
            run_input(options.target, targets[options.target], options.seed, number, folder, outcome)
            number += 1
            if options.input is not None or time.monotonic() > end or len(outcome.findings) > 20:
                break
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(vars(outcome)))


if __name__ == "__main__":
    main()
