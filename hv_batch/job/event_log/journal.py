"""The events that a driver has yet to write, and how often it writes them. No clock and no I/O.

How large the log of a driver becomes: points in time become rarer (`Pace`), so a night of 12 hours has 310 points of
progress and at most 500 parts. With eight groups and six other workers it takes about 0.7 MB. A driver writes at most
MAX_EVENTS events, 4 MB. Whatever exceeds a bound is left out and counted in `run_ended.dropped`; `run_started` and
`run_ended` are always written.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from hv_batch.job.documents.events import MAX_LINE_BYTES, MAX_MESSAGE_CHARS, MAX_NAME_CHARS, MAX_NODES
from hv_batch.job.redaction import masked_text
from hv_batch.job.storage.canonical_json import encode_line

# The budget of one driver. What is not named has one of its own together.
MAX_OF_KIND = {"progress": 1000, "worker_work": 10_000}
MAX_OTHERS = 9_000
ALWAYS = frozenset({"run_started", "run_ended"})
MAX_EVENTS = sum(MAX_OF_KIND.values()) + MAX_OTHERS

MAX_WAITING = 5_000  # events that are kept while the output root does not answer
MAX_PARTS = 1_000  # of one driver, without those that it writes when it ends
PART_BYTES = 1 << 20  # the next event begins another part

# Events that are worth a part soon; others wait for the next point in time.
URGENT = frozenset(
    {"run_started", "worker_ready", "worker_lost", "drain_started", "node_draining", "node_excluded"}
    | {"outage_started", "outage_ended"}
)
MAX_EARLY_PARTS = 200
FIRST_S = 15.0  # between two parts at first, and always the least


class Pace:
    """Points in time that become rarer: `first_s` apart at first, later 1/64 of the time since the start.

    That makes 380 points in a day and 500 in a week if `first_s` is 10 s.
    """

    def __init__(self, now: float, first_s: float, divisor: float = 64.0) -> None:
        self._begun = now
        self._first_s = first_s
        self.divisor = divisor
        self._last = -math.inf

    def interval_s(self, now: float) -> float:
        return max(self._first_s, (now - self._begun) / self.divisor)

    def is_due(self, now: float) -> bool:
        return now - self._last >= self.interval_s(now)

    def seconds_since_last(self, now: float) -> float:
        return now - self._last

    def note(self, now: float) -> None:
        self._last = now


class Journal:
    """Events between `add` and a part that is written. `now` is a monotonic time."""

    def __init__(self, now: float) -> None:
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._written = Counter[str]()  # events by budget, waiting or written
        self._dropped = 0
        self._pace = Pace(now, FIRST_S)
        self._early_parts = 0
        self._part: bytes | None = None  # the part that is being written
        self.part_number = 0  # of that part, or of the next one

    @property
    def dropped(self) -> int:
        return self._dropped

    def add(self, event: Mapping[str, Any]) -> None:
        """Keep an event, if its budget allows it. Its texts are clipped and contain no secrets afterwards."""
        kind = event["kind"]
        budget = kind if kind in MAX_OF_KIND else "others"
        if kind not in ALWAYS:
            if self._written[budget] >= MAX_OF_KIND.get(budget, MAX_OTHERS):
                self._dropped += 1
                return
            self._written[budget] += 1
        self._waiting.append(clip(event))
        if len(self._waiting) > MAX_WAITING:
            self._drop_one()

    def _drop_one(self) -> None:
        """Drop the event that explains least: the oldest progress, else the oldest work, else the oldest event."""
        self._dropped += 1
        for kind in ("progress", "worker_work"):
            for place, event in enumerate(self._waiting):
                if event["kind"] == kind:
                    del self._waiting[place]
                    return
        self._waiting.popleft()

    def take_part(self, now: float, *, at_end: bool = False) -> bytes | None:
        """The next part to be written; None if none is due. The same part again, if it was not `part_written`.

        Bytes that have been offered to the store once stay as they are: a write that failed may have arrived.
        """
        if self._part is not None:
            return self._part
        if not self._waiting or not (at_end or self._is_due(now)):
            return None
        if not at_end and not self._pace.is_due(now):
            self._early_parts += 1
        self._pace.note(now)
        lines, size = [], 0
        while self._waiting and size < PART_BYTES:
            lines.append(encode_line(self._waiting.popleft()) + b"\n")
            size += len(lines[-1])
        self._part = b"".join(lines)
        return self._part

    def _is_due(self, now: float) -> bool:
        if self.part_number >= MAX_PARTS:
            return False
        if self._pace.is_due(now):
            return True
        is_early = self._early_parts < MAX_EARLY_PARTS and self._pace.seconds_since_last(now) >= FIRST_S
        return is_early and any(event["kind"] in URGENT for event in self._waiting)

    def part_written(self) -> None:
        self._part = None
        self.part_number += 1


def clip(event: Mapping[str, Any]) -> dict[str, Any]:
    """The event as it is written: texts of bounded length, without secrets."""
    clipped = {name: _clip(name, value) for name, value in event.items()}
    while len(encode_line(clipped)) >= MAX_LINE_BYTES and clipped.get("nodes"):  # names of four bytes a character
        clipped["nodes"] = clipped["nodes"][:-1]
    return clipped


def _clip(name: str, value: Any) -> Any:
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode()  # of lone surrogates
        return masked_text(value)[: MAX_MESSAGE_CHARS if name == "message" else MAX_NAME_CHARS]
    if isinstance(value, list):
        return [_clip(name, each) for each in value[:MAX_NODES]]
    return round(value, 3) if isinstance(value, float) else value
