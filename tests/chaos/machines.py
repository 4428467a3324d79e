"""The machines of a chaos run: Ray nodes, each with an address, a disk and a program for videos of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from tests.chaos.faults import small_disks
from tests.support.fleet import Fleet, descendants

MARKER = "HV_BATCH_CHAOS"  # in the environment of every process of a chaos run
ACTORS = ("ray::RankActor", "ray::EncoderActor", "ray::DecoderActor", "ray::seal", "ray::empty_spool")
DISK_BYTES = 48 * 2**20
GPUS = 3  # of a machine: two ranks, an encoder and a decoder

# The check of an encoder is part of what breaks, so that a worker that starts there fails as well.
FFMPEG = """#!/bin/sh
[ -e {broken} ] && {{ echo "Illegal instruction" >&2; exit 132; }}
exec {ffmpeg} "$@"
"""


@dataclass(frozen=True)
class Machine:
    node: object  # of Ray
    disk: Path  # its temporary folder, with the spool
    is_small: bool  # the folder is a file system of its own

    @property
    def host(self) -> str:
        return self.node.node_ip_address

    @property
    def raylet(self) -> int:
        (process,) = self.node.all_processes["raylet"]
        return process.process.pid

    @property
    def broken_ffmpeg(self) -> Path:
        return self.disk.parent / "ffmpeg-is-broken"

    def throw_away(self) -> None:
        if self.is_small:
            small_disks.unmount(self.disk)
        shutil.rmtree(self.disk.parent, ignore_errors=True)

    def processes(self, title: str) -> list[int]:
        """The pids of its Ray workers with this title, in order."""
        return sorted(pid for pid in descendants(self.raylet) if title_of(pid).startswith(title))


class Machines:
    """A Ray head without GPUs and the machines that have been added and not lost."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        self.fleet = fleet
        self.folder = folder
        self.all: list[Machine] = []
        self.environment = {MARKER: str(folder)}  # of the processes of machines that are added
        self._added = 0
        self._orphans: list[subprocess.Popen] = []  # processes of clusters whose head is dead

    def lose_head(self) -> None:
        """The head dies. Its machines and drivers notice that after a minute. A new cluster is started at once."""
        head = _processes_of(self.fleet._cluster.head_node)
        _kill(process.pid for process in head)
        self._orphans += [*head, *(process for machine in self.all for process in _processes_of(machine.node))]
        self.all.clear()
        self.fleet = start_head(self.folder)

    def add(self, attempts: int = 3) -> Machine:
        """A further machine. Ray gives up after 30 s, which a busy machine may need to start a raylet."""
        self._added += 1
        disk = self.folder / f"machine-{self._added}" / "tmp"
        disk.mkdir(parents=True)
        is_small = small_disks.mount(disk, DISK_BYTES)
        script = disk.parent / "ffmpeg"
        script.write_text(
            FFMPEG.format(broken=disk.parent / "ffmpeg-is-broken", ffmpeg=imageio_ffmpeg.get_ffmpeg_exe())
        )
        script.chmod(0o755)
        environment = {**self.environment, "TMPDIR": str(disk), "IMAGEIO_FFMPEG_EXE": str(script)}
        try:
            machine = Machine(self.fleet.add_node(gpus=GPUS, environment=environment), disk, is_small)
        except Exception:  # Ray raises no class of its own
            _kill(_processes_with(f"TMPDIR={disk}"))
            if attempts == 1:
                raise
            return self.add(attempts - 1)
        self.all.append(machine)
        return machine

    def processes(self, title: str) -> list[int]:
        return [pid for machine in self.all for pid in machine.processes(title)]

    def power_off(self, machine: Machine) -> None:
        """All its processes end at once, and its disk is gone."""
        self.all.remove(machine)
        self.fleet.kill_node(machine.node)
        machine.throw_away()

    def retire(self, machine: Machine) -> None:
        """Like `ray stop`."""
        self.all.remove(machine)
        self.fleet.remove_node(machine.node)
        machine.throw_away()

    def kill_raylet(self, machine: Machine) -> None:
        """The raylet dies alone. Its workers have to notice that; its disk stays, without anybody to read it."""
        self.all.remove(machine)
        self.fleet._cluster.remove_node(machine.node, allow_graceful=False)

    def is_alive(self, machine: Machine) -> bool:
        table = self.fleet._cluster.global_state.node_table()
        return any(entry["NodeID"] == machine.node.node_id and entry["Alive"] for entry in table)

    def drain(self, machine: Machine, seconds: float | None) -> bool:
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = 0 if seconds is None else int((time.time() + seconds) * 1000)
        accepted, _ = GcsClient(address=self.fleet.address).drain_node(
            machine.node.node_id, reason, "a test takes it", deadline_ms
        )
        return bool(accepted)

    def leftovers(self) -> list[str]:
        """Actors, placement groups and processes that a run has left. Ray needs a moment to end them, and a minute if
        their head has died.
        """
        deadline = time.monotonic() + 90.0
        while (found := list(self._leftovers())) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _leftovers(self) -> Iterator[str]:
        for orphan in self._orphans:
            orphan.poll()  # Ray's workers take a raylet that nobody has waited for as alive
        state = self.fleet._cluster.global_state
        for actor in state.actor_table(None).values():
            if actor["State"] != "DEAD":
                yield f"actor {actor['ActorClassName']} is {actor['State']}"
        for group in state.placement_group_table().values():
            if group["state"] != "REMOVED":
                yield f"placement group {group['name']} is {group['state']}"
        for pid in marked_processes(self.folder):
            if (title := title_of(pid)).startswith(ACTORS) or "ffmpeg" in title or "tests.chaos.driver" in title:
                yield f"process {pid}: {title[:80]}"

    def close(self) -> None:
        """End all machines, but not the head."""
        for machine in list(self.all):
            self.retire(machine)
        for disk in self.folder.glob("machine-*/tmp"):
            if disk.is_mount():
                small_disks.unmount(disk)


def _processes_of(node: object) -> list[subprocess.Popen]:
    return [each.process for processes in node.all_processes.values() for each in processes]


def start_head(folder: Path, attempts: int = 5) -> Fleet:
    """Ray gives up after 30 s, which a busy machine may need."""
    try:
        return Fleet()
    except Exception:  # Ray raises no class of its own
        kill_marked(folder)
        if attempts == 1:
            raise
        return start_head(folder, attempts - 1)


def kill_marked(folder: Path) -> None:
    """End every process that was started for the chaos run in `folder`, but not this one."""
    _kill(pid for pid in marked_processes(folder) if pid != os.getpid())


def title_of(pid: int) -> str:
    """The command line of a process; Ray's workers write there what they do."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def marked_processes(folder: Path) -> list[int]:
    """All processes that were started for the chaos run in `folder`, with any parent."""
    return _processes_with(f"{MARKER}={folder}")


def _processes_with(variable: str) -> list[int]:
    """Processes whose environment has this variable, as NAME=value."""
    found, wanted = [], f"{variable}\0".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in environment.read_bytes() + b"\0":
                found.append(int(environment.parent.name))
    return found


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
