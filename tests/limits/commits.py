"""Commands on a root with many commits: `python -m tests.limits.commits --samples 1000000`.

The records are synthetic (`hv_batch.bench.synthetic_data`), the files of the media do not exist, and the last samples
are pending. CPU time includes the children of a command, peak memory does not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import yaml

from hv_batch.bench.synthetic_data import commit_first, write_manifest
from hv_batch.job.config.run_config import load_config
from tests.limits.memory import sleeping_config
from tests.support.repository import ROOT

PENDING = 100
COMMANDS = (("status",), ("status", "--where", "look=black"), ("gc",), ("report",), ("verify", "--shards", "0-9"))


def run(name: str, *arguments: str) -> tuple[int, float, float, float]:
    """Exit code, seconds, seconds of CPU time and peak memory in MB of a command."""
    command = [sys.executable, "-m", "hv_batch", name, *arguments]
    began, peak_kb = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        with suppress(OSError):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak_kb = max([peak_kb, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    cpu_s = ended[2].ru_utime + ended[2].ru_stime
    return process.returncode, time.monotonic() - began, cpu_s, peak_kb / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, config, output = folder / "manifest.jsonl", folder / "config.yaml", folder / "out"
        config.write_text(yaml.safe_dump(sleeping_config(groups=1, decoders=1, step_seconds=0.0)))
        write_manifest(manifest, given.samples)
        flags = ("--config", str(config), "--manifest", str(manifest), "--output", str(output), "--address", "local")
        if run("run", *flags, "--limit", "1")[0]:
            print("the root could not be begun", file=sys.stderr)
            return 1
        commit_first(output, manifest, load_config(str(config)), given.samples - PENDING)
        print(f"{given.samples - PENDING:,} commits")
        for command in (*COMMANDS, ("run",)):
            arguments = (*flags, "--limit", str(given.samples)) if command == ("run",) else (str(output), *command[1:])
            code, seconds, cpu_s, memory_mb = run(command[0], *arguments)
            print(f"{' '.join(command):28} exit {code}  {seconds:7.1f} s  {cpu_s:7.1f} s CPU  {memory_mb:6.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
