"""The memory of a run's processes over its samples: `python -m tests.limits.memory --samples 2000 --groups 4`.

The engine sleeps, so that a sample takes milliseconds; all else is the production path. The slope of each process is
that of a line through its resident memory without shared pages, from a quarter of the samples on: caches of bounded
size are full by then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from tests.support.fleet import descendants
from tests.support.repository import ROOT

PERIOD_S = 0.5
WARM_UP = 0.25  # fraction of the samples before the line begins
FEWEST_POINTS = 6  # of a line; processes with fewer have been started late
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
WATCHED = ("driver", "ray::RankActor", "ray::EncoderActor", "ray::DecoderActor", "raylet", "gcs_server")


@dataclass(frozen=True)
class Growth:
    process: str
    first_mb: float  # after the warm-up
    last_mb: float
    slope_kb: float  # per sample
    points: int


def measure(samples: int, groups: int, decoders: int, step_seconds: float, frames: int = 5) -> tuple[int, list[Growth]]:
    """Render with `hv-batch run` on a local Ray. Returns its exit code and the growth of each process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "manifest.jsonl").open("w") as file:
            file.writelines(json.dumps({"id": f"s{n:06d}", "prompt": f"take {n}"}) + "\n" for n in range(samples))
        (folder / "config.yaml").write_text(yaml.safe_dump(sleeping_config(groups, decoders, step_seconds, frames)))
        command = [sys.executable, "-m", "hv_batch", "run", "--config", str(folder / "config.yaml")]
        command += ["--manifest", str(folder / "manifest.jsonl"), "--output", str(folder / "out"), "--address", "local"]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        with (folder / "log").open("w") as log:
            run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            points = defaultdict(list)
            while run.poll() is None:
                done = _committed(folder / "out")
                for process, memory in _memory(run.pid):
                    points[process].append((done, memory))
                time.sleep(PERIOD_S)
        if run.returncode:
            print((folder / "log").read_text()[-4000:], file=sys.stderr)
    return run.returncode, sorted(
        (_growth(process, found, samples) for process, found in points.items() if len(found) > FEWEST_POINTS),
        key=lambda growth: growth.process,
    )


def sleeping_config(groups: int, decoders: int, step_seconds: float, frames: int = 5) -> dict:
    return {
        "model": {
            "engine": "hv_batch.bench.sleep_engine:SleepEngine",
            "options": {"step_seconds": step_seconds},
        },
        "defaults": {"height": 64, "width": 64, "num_frames": frames, "num_inference_steps": 4},
        "parallel": {"device": "cpu", "ulysses_degree": 1},
        "groups": {"count": groups, "gpus_per_rank": 0, "cpus_per_rank": 0.01},
        "encoders": {"gpus": 0, "cpus": 0.01},
        "decoders": {"count": decoders, "gpus": 0, "cpus": 0.01},
        "timeouts": {"start_s": 600},
    }


def _committed(root: Path) -> int:
    return sum(len(os.listdir(shard)) for shard in root.glob("commits/*"))


def _memory(driver: int) -> list[tuple[str, float]]:
    """The memory of the watched processes in bytes."""
    found = []
    for pid in [driver, *descendants(driver)]:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
        except OSError:
            continue
        name = "driver" if pid == driver else Path(title).name if title.startswith("/") else title
        if name.startswith(WATCHED):
            name = name.removeprefix("ray::").partition("(")[0].partition(".")[0]
            found.append((f"{name} {pid}", float((resident - shared) * PAGE_BYTES)))
    return found


def _growth(process: str, points: list[tuple[int, float]], samples: int) -> Growth:
    done, used = np.array([point for point in points if point[0] >= WARM_UP * samples] or points[-2:]).T
    slope = np.polyfit(done, used, 1)[0] if len(set(done)) > 1 else 0.0
    return Growth(process, round(used[0] / 1e6, 1), round(used[-1] / 1e6, 1), round(slope / 1e3, 2), len(done))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--step-seconds", type=float, default=0.01)
    parser.add_argument("--frames", type=int, default=5, help="1: pictures, which need no ffmpeg")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    code, found = measure(given.samples, given.groups, given.decoders, given.step_seconds, given.frames)
    if given.json:
        print(json.dumps([asdict(growth) for growth in found]))
    else:
        for growth in found:
            print(
                f"{growth.process:24} {growth.first_mb:8.1f} MB -> {growth.last_mb:8.1f} MB   "
                f"{growth.slope_kb:+8.2f} kB per sample ({growth.points} points)"
            )
    return code


if __name__ == "__main__":
    sys.exit(main())
