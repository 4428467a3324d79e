"""Carries out a schedule against a run. Whenever the command of the run ends early, the agent starts it again."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos.faults import small_disks
from tests.chaos.faults.process_faults import end_limit, limit_memory, replace_text, send
from tests.chaos.machines import Machine, Machines
from tests.chaos.operators import Operators
from tests.chaos.schedule import Event
from tests.support.repository import ROOT

DONE = (0, 3)  # exit codes of a run with nothing left to do
TICK_S = 0.2
AT_ANY_TIME = 0.25  # the share of the events that do not wait until a group is working
WORK_S = 60.0  # that the others wait at most
REPLACED_AFTER_S = 2.0  # a machine that is lost
MOST_STARTS = 25  # of the command without an active fault, before a run counts as one that does not end
END_S = 420.0  # for the run after the last event
REFUSED_S = 90.0  # for a second driver, and for a driver whose lease was taken over
HEADLESS_S = 150.0  # for a driver whose cluster has lost its head; Ray ends it after a minute
TITLES = {"rank": "ray::RankActor", "encoder": "ray::EncoderActor", "decoder": "ray::DecoderActor"}


class Agent:
    def __init__(
        self,
        machines: Machines,
        root: Any,
        command: Sequence[str],
        environment: dict[str, str],
        folder: Path,
        machine_count: int,
    ) -> None:
        self.machines, self.root, self.folder = machines, root, folder
        self.done: Counter[str] = Counter()  # events that were carried out, by kind
        self.carried_out: list[str] = []
        self.starts = 0
        self.ends: Counter[str] = Counter()  # how drivers ended
        self.findings: list[str] = []
        self.ended = False  # the command has ended with nothing left to do
        self._command, self._environment = list(command), environment
        self._machine_count = machine_count
        self._undo: list[tuple[float, Callable[[], object]]] = []
        self._others: list[tuple[subprocess.Popen, float]] = []  # drivers that must end, and by when
        self._clock = folder / "clock"
        self._log = (folder / "driver.log").open("a")
        self._operators = Operators([*command[:3]], environment, root.url, folder)
        self._driver = self._start()

    def run(self, schedule: Sequence[Event]) -> None:
        """Carry out the schedule, end all faults, and wait until the command has nothing left to do."""
        for event in schedule:
            self._pass_time(event.wait_s)
            if event.draw > AT_ANY_TIME:
                self._await_work()
            if self.ended:
                break
            if self._carry_out(event):
                self.done[event.kind] += 1
                self.carried_out.append(str(event))
                print(f"  {time.monotonic() % 10000:7.1f} {event}", file=self._log, flush=True)
        for _, undo in self._undo:
            undo()
        self._undo.clear()
        self.root.end_faults()
        self._keep_machines()
        self.starts = 0
        deadline = time.monotonic() + END_S
        while self._is_busy() and time.monotonic() < deadline and self.starts < MOST_STARTS:
            self._pass_time(1.0)
        if not self.ended:
            self.findings.append(f"the run does not end: {self.starts} starts; {dict(self.ends)}")
            self._driver.kill()
            self._driver.wait()

    def _is_busy(self) -> bool:
        return not self.ended or bool(self._others or self._operators.are_busy)

    def close(self) -> None:
        self._operators.close()
        for driver in [self._driver, *(driver for driver, _ in self._others)]:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        self._log.close()

    # The driver ------------------------------------------------------------------------------------------------------

    def _start(self, *flags: str) -> subprocess.Popen:
        self.starts += 1
        print(f"--- start {self.starts} {' '.join(flags)}", file=self._log, flush=True)
        return subprocess.Popen(
            [*self._command, *flags], cwd=ROOT, env=self._environment, stdout=self._log, stderr=subprocess.STDOUT
        )

    def _pass_time(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.ended:
            now = time.monotonic()
            for due in [entry for entry in self._undo if entry[0] <= now]:
                self._undo.remove(due)
                due[1]()
            self._watch_drivers(now)
            if now >= deadline:
                return
            time.sleep(TICK_S)
        while (self._others or self._operators.are_busy) and time.monotonic() < deadline:
            self._watch_drivers(time.monotonic())
            time.sleep(TICK_S)

    def _await_work(self) -> None:
        """A busy machine needs long to start a run, and a schedule should not be over by then."""
        deadline = time.monotonic() + WORK_S
        while not self.ended and time.monotonic() < deadline and not self.machines.processes(TITLES["rank"]):
            self._pass_time(1.0)

    def _watch_drivers(self, now: float) -> None:
        self.findings += self._operators.watch(now)
        for entry in list(self._others):
            driver, deadline = entry
            if driver.poll() is not None:
                self._others.remove(entry)
                self.ends[f"other {driver.returncode}"] += 1
                self.ended |= driver.returncode in DONE and self._driver.poll() is not None
            elif self._driver.poll() is not None and not self.ended:
                self._driver = driver  # the first one ended, and the second one took its place
                self._others.remove(entry)
            elif now > deadline:
                self.findings.append(f"two drivers work at the same time for {REFUSED_S:g} s")
                driver.kill()
        code = self._driver.poll()
        if code is None or self.ended:
            return
        self.ends[str(code)] += 1
        if code in DONE:
            self.ended = True
        else:
            if self._undo:  # a fault is active, and the command may fail again
                time.sleep(1.0)
                self.starts -= 1
            self._driver = self._start()

    # Events ----------------------------------------------------------------------------------------------------------

    def _carry_out(self, event: Event) -> bool:
        """Returns False if there is nothing that the event could happen to."""
        act, _, target = event.kind.partition("-")
        if target in TITLES:
            return self._signal_worker(event, act, TITLES[target])
        if event.kind.startswith("s3-") or event.kind == "disk-full":
            return self._for_a_while(event, self.root.begin_fault(event), partial(self.root.end_fault, event))
        return bool(getattr(self, f"_{event.kind.replace('-', '_')}")(event))

    def _for_a_while(self, event: Event, begun: bool, undo: Callable[[], object], least_s: float = 0.0) -> bool:
        if begun:
            self._undo.append((time.monotonic() + max(event.lasts_s, least_s), undo))
        return begun

    def _signal_worker(self, event: Event, act: str, title: str) -> bool:
        pids = self.machines.processes(title)
        if not pids:
            return False
        pid = event.pick(pids)
        if act == "pause":
            return self._for_a_while(event, send(pid, signal.SIGSTOP), partial(send, pid, signal.SIGCONT))
        if act == "limit":
            return self._for_a_while(event, limit_memory(pid), partial(end_limit, pid), 6.0)
        return send(pid, signal.SIGKILL if act == "kill" else signal.SIGSTOP)

    def _kill_driver(self, event: Event) -> bool:
        return send(self._driver.pid, signal.SIGKILL)

    def _end_driver(self, event: Event) -> bool:
        return send(self._driver.pid, signal.SIGTERM)

    def _pause_driver(self, event: Event) -> bool:
        return self._for_a_while(
            event, send(self._driver.pid, signal.SIGSTOP), partial(send, self._driver.pid, signal.SIGCONT)
        )

    def _second_driver(self, event: Event) -> bool:
        self._others.append((self._start(), time.monotonic() + REFUSED_S))
        return True

    def _take_over(self, event: Event) -> bool:
        self._others.append((self._driver, time.monotonic() + REFUSED_S))
        self._driver = self._start("--take-over")
        return True

    def _stop_driver(self, event: Event) -> bool:
        """Another command takes the root over from a driver that hangs; then that driver wakes up."""
        hanging = self._driver
        send(hanging.pid, signal.SIGSTOP)
        self._take_over(event)
        self._others[-1] = (hanging, time.monotonic() + REFUSED_S + 40.0)
        return self._for_a_while(event, True, partial(send, hanging.pid, signal.SIGCONT), 25.0 + event.lasts_s)

    def _kill_head(self, event: Event) -> bool:
        address = self.machines.fleet.address
        self.machines.lose_head()
        self._command[self._command.index(address)] = self.machines.fleet.address
        self._keep_machines()
        self._take_over(event)
        self._others[-1] = (self._others[-1][0], time.monotonic() + HEADLESS_S)
        return True

    def _operate(self, event: Event) -> bool:
        kill = self._operators.start(event)
        if event.draw * 100.0 % 1.0 < 0.5:
            self._undo.append((time.monotonic() + event.lasts_s, kill))
        return True

    def _clock_jump(self, event: Event) -> bool:
        """Of drivers that are running now or started meanwhile."""
        replace_text(self._clock, event.pick(("20", "-20", "7200", "-7200", "2592000", "-2592000")))
        return self._for_a_while(event, True, partial(replace_text, self._clock, "0"))

    def _lose_media(self, event: Event) -> bool:
        videos = [key for key in self.root.keys("data/") if key.endswith((".mp4", ".png"))]
        if videos:
            self.root.delete(event.pick(sorted(videos)))
        return bool(videos)

    # Machines --------------------------------------------------------------------------------------------------------

    def _pick(self, event: Event) -> Machine | None:
        """A machine that may be lost: one that can host a group is left."""
        return event.pick(self.machines.all) if len(self.machines.all) > 1 else None

    def _lose(self, event: Event, lose: Callable[[Machine], object]) -> bool:
        machine = self._pick(event)
        if machine is None:
            return False
        lose(machine)
        self._undo.append((time.monotonic() + REPLACED_AFTER_S, self._keep_machines))
        return True

    def _power_off(self, event: Event) -> bool:
        return self._lose(event, self.machines.power_off)

    def _kill_raylet(self, event: Event) -> bool:
        return self._lose(event, self.machines.kill_raylet)

    def _pause_raylet(self, event: Event) -> bool:
        machine = self._pick(event)
        if machine is None:
            return False

        def resume() -> None:
            send(raylet, signal.SIGCONT)
            time.sleep(1.0)
            if machine in self.machines.all and not self.machines.is_alive(machine):
                self.machines.kill_raylet(machine)
            self._keep_machines()

        raylet = machine.raylet
        return self._for_a_while(event, send(raylet, signal.SIGSTOP), resume)

    def _drain_node(self, event: Event, seconds: float | None = 12.0) -> bool:
        machine = self._pick(event)
        if machine is None or not self.machines.drain(machine, seconds):
            return False

        def remove() -> None:
            if machine in self.machines.all:
                (self.machines.power_off if seconds else self.machines.retire)(machine)
            self._keep_machines()

        return self._for_a_while(event, True, remove, seconds or 20.0)

    def _drain_node_without_deadline(self, event: Event) -> bool:
        return self._drain_node(event, None)

    def _keep_machines(self) -> None:
        while len(self.machines.all) < self._machine_count:
            self.machines.add()

    def _break_ffmpeg(self, event: Event) -> bool:
        mark = event.pick(self.machines.all).broken_ffmpeg
        mark.touch()
        return self._for_a_while(event, True, partial(mark.unlink, missing_ok=True), 3.0)

    def _fill_node(self, event: Event) -> bool:
        machine = event.pick(self.machines.all)
        begun = machine.is_small and small_disks.fill(machine.disk)
        return self._for_a_while(event, begun, partial(small_disks.empty, machine.disk), 3.0)

    def _break_device(self, event: Event) -> bool:
        mark = self.folder / "marks" / f"faulty-{event.pick(self.machines.all).host}"
        mark.touch()
        return self._for_a_while(event, True, partial(mark.unlink, missing_ok=True), 3.0)
