"""Progress for people: a live bar with an ETA on a terminal, plain lines with a clock time in a log."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hv_batch.job.formatting import clock
from hv_batch.job.redaction import public_text

LINE_EVERY_S = 30.0  # a job log of a night stays under a thousand lines
DRAW_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far a run is."""

    total: int
    committed: int
    quarantined: int
    done_before: int  # terminal samples that this run found, of `committed` and `quarantined`
    starting: int  # workers that are being placed or load their weights
    encoding: int
    denoising: int
    decoding: int
    spooled: int = 0  # videos on the disks of nodes, while the output root does not answer

    @property
    def terminal(self) -> int:
        return self.committed + self.quarantined

    def describe(self, elapsed_s: float, eta_s: float | None) -> str:
        parts = [f"{self.terminal}/{self.total} done"]
        if self.quarantined:
            parts.append(f"{self.quarantined} quarantined")
        if self.starting:
            parts.append(f"{self.starting} workers starting")
        parts.append(f"in work: {self.encoding} encode, {self.denoising} denoise, {self.decoding} decode")
        if self.spooled:
            parts.append(f"{self.spooled} finished wait for the output root")
        parts.append(f"{clock(elapsed_s)} ETA {'--:--' if eta_s is None else clock(eta_s)}")
        return " · ".join(parts)


class EtaEstimator:
    """The mean pace since the first sample came out: what starting and loading took says nothing about the rest."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def eta_s(self, snapshot: Snapshot, now: float) -> float | None:
        """Seconds to the end; None before a second sample is done."""
        done_here = snapshot.terminal - snapshot.done_before
        if self._first is None:
            self._first = (now, done_here) if done_here > 0 else None
            return None
        since, done_then = self._first
        if done_here == done_then:
            return None
        return (snapshot.total - snapshot.terminal) * (now - since) / (done_here - done_then)


class Progress:
    """Use as a context manager; `show` as often as you like, `say` for events worth a line of their own."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False, markup=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if self._is_terminal() else None
        self._begun = time.monotonic()
        self._pace = EtaEstimator()
        self._shown: float | None = None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line, without the secrets that URLs in it may hold: a job's log is read by more than its owner."""
        text = public_text(text)
        if self._live:
            self._console.print(text)
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream, flush=True)

    def show(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        eta_s = self._pace.eta_s(snapshot, now)
        if self._shown is not None and now - self._shown < (DRAW_EVERY_S if self._live else LINE_EVERY_S):
            return
        self._shown = now
        text = snapshot.describe(now - self._begun, eta_s)
        if self._live:
            self._live.update(_bar(snapshot, text), refresh=True)
        else:
            self.say(text)

    def _is_terminal(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal


def _bar(snapshot: Snapshot, text: str) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=max(1, snapshot.total), completed=snapshot.terminal, width=30), Text(text))
    return row
