"""What to run first on a new GPU: all tests of this folder, then the times of every attention kernel, in eight minutes.

    python tests/gpu/checklist.py [--minutes 8] [--output checklist]

Needs PyTorch with CUDA and the packages of hv_batch except Ray. Every part has a budget, and the whole ends in time:
what does not end within its budget is stopped, and listed with what failed or was left out. Writes OUTPUT.json and
OUTPUT.md. `--device cpu --preset toy` tries the script itself on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

RESERVE_S = 5.0  # of the whole time, for stopping processes and writing the results
TESTS_SHARE = 0.45  # of the whole time that the tests may take
START_S = 40.0  # of a measuring process: it imports PyTorch and creates its first CUDA context
# Seconds of one measurement, by its kind. The first sparse one compiles a kernel.
BUDGETS = {"dense": 25.0, "sparse": 60.0, "decode": 40.0, "fused": 60.0, "cache": 40.0, "whole": 60.0}
OUTCOME = re.compile(r"^(?P<test>\S+::\S.*?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")

Item = dict[str, Any]


class Lines:
    """The lines that a process prints, with a time limit for each."""

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def next(self, timeout_s: float) -> str | None:
        """The next line; None at the end of the output. Raises TimeoutError."""
        try:
            return self._lines.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            raise TimeoutError from None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def run_tests(deadline: float) -> Iterator[Item]:
    """Run all tests of this folder, without tests/conftest.py, which needs Ray. Yields one item per test."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "--noconftest", "--continue-on-collection-errors"]
    lines = Lines([*command, "-p", "no:cacheprovider", "--color=no", "-o", "addopts=", "-m", "not slow"])
    begun, last = time.monotonic(), ""
    try:
        while (line := lines.next(deadline - time.monotonic())) is not None:
            last = line or last
            if match := OUTCOME.match(line):
                now = time.monotonic()
                status = {"PASSED": "ok", "SKIPPED": "skipped"}.get(match["outcome"], "failed")
                yield {"item": match["test"], "status": status, "seconds": now - begun, "note": ""}
                begun = now
        yield {"item": "tests/gpu", "status": "ok" if lines.process.wait() == 0 else "failed", "note": last}
    except TimeoutError:
        yield {"item": "tests/gpu", "status": "stopped", "note": f"out of its time after: {last[:200]}"}
    finally:
        lines.stop()


def run_measurements(items: list[str], device: str, deadline: float) -> Iterator[Item]:
    """Yield the result of every item. A process that fails or exceeds a budget is replaced by one for the rest."""
    left = list(items)
    while left:
        if time.monotonic() >= deadline:
            yield from ({"item": item, "status": "left out", "note": "no time left"} for item in left)
            return
        lines = Lines([sys.executable, "-m", "hv_batch.bench.checklist_items", "--device", device, *left])
        limit, last = time.monotonic() + START_S, ""
        try:
            while (line := lines.next(min(limit, deadline) - time.monotonic())) is not None:
                last = line or last
                if not line.startswith('{"item"'):
                    continue
                result = json.loads(line)
                if result["status"] == "begun":
                    begun = time.monotonic()
                    limit = begun + BUDGETS[left[0].split()[1]]
                    continue
                yield {**result, "seconds": time.monotonic() - begun}
                left.pop(0)
                limit = time.monotonic() + START_S
                if result["status"] == "failed":
                    break
            else:
                if left:
                    yield {"item": left.pop(0), "status": "failed", "note": f"the process ended: {last[:200]}"}
        except TimeoutError:
            yield {"item": left.pop(0), "status": "stopped", "note": "it took longer than its budget"}
        finally:
            lines.stop()


def describe(device: str) -> dict[str, Any]:
    import torch

    from hv_batch.attention_kernels import PACKAGES

    facts = {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(0), "capability": list(torch.cuda.get_device_capability(0))}
        facts |= {"cudnn": torch.backends.cudnn.version()}
    for package in PACKAGES.values():
        with suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    return facts


def table(report: dict[str, Any]) -> str:
    """The results as Markdown. Of the tests, only the totals and those that did not pass."""
    lines = [", ".join(f"{name} {value}" for name, value in report["machine"].items()), ""]
    lines += ["| item | status | step s | took s | note |", "|---|---|---|---|---|"]
    for item in report["items"]:
        if "::" in item["item"] and item["status"] in ("ok", "skipped"):
            continue
        value = item.get("step_s", item.get("share"))
        cells = (item["item"], item["status"], "" if value is None else f"{value:.3f}", f"{item.get('seconds', 0):.1f}")
        lines.append("| " + " | ".join((*cells, item.get("note", "").replace("|", "/"))) + " |")
    counts = {status: sum(each["status"] == status for each in report["items"]) for status in report["statuses"]}
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items()), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", action="append", choices=("toy", "mid", "540p", "720p"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=Path("checklist"), help="without suffix")
    options = parser.parse_args()
    begun = time.monotonic()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device is visible to PyTorch, so nothing was run. --device cpu --preset toy tries the script.")
        return 1
    from hv_batch.bench.checklist_items import list_items

    end = begun + 60 * options.minutes - RESERVE_S
    report: dict[str, Any] = {"schema": "hv_batch/gpu-checklist/1", "machine": describe(options.device), "items": []}

    def note(items: Iterator[Item]) -> None:
        for item in items:
            report["items"].append(item)
            print(
                f"{time.monotonic() - begun:6.1f} s  {item['status']:<8}  {item['item']}  {item.get('note', '')}",
                flush=True,
            )

    note(run_tests(begun + TESTS_SHARE * 60 * options.minutes))
    note(run_measurements(list_items(options.preset or ["720p", "540p"]), options.device, end))
    report["statuses"] = sorted({item["status"] for item in report["items"]})
    report["minutes"] = (time.monotonic() - begun) / 60
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(report))
    print("\n" + table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
