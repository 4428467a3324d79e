"""Reads the events that the drivers of an output root have written. `documents/events.py` lists their kinds and fields.

The log only explains what happened. Records decide what a resume does, so a root without events, or with damaged ones,
is complete.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hv_batch.job import layout
from hv_batch.job.documents.events import parse_event
from hv_batch.job.documents.reading import InvalidObjectError, unreadable
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store

Event = Mapping[str, Any]

# A driver writes at most `journal.MAX_PARTS` parts and about 4 MB. Anyone may have written more: the newest are read.
MAX_DRIVERS = 100
MAX_PART_BYTES = 4 << 20
MAX_BYTES = 16 << 20  # of all parts together

Parts = MutableMapping[str, tuple[Event, ...]]


@dataclass(frozen=True, slots=True)
class DriverEvents:
    """The events of one driver, in order. A driver that was killed has no `run_ended`."""

    driver: str  # the name of its folder
    events: tuple[Event, ...]

    @property
    def started_at(self) -> float:
        """The unix time in its name, in whole seconds."""
        return started_at(self.driver)

    def last(self, *kinds: str) -> Event | None:
        """The last event of one of these kinds."""
        return next((event for event in reversed(self.events) if event["kind"] in kinds), None)


def started_at(driver: str) -> float:
    """The unix time at which a driver started, from its name. 0 if the digits are no date."""
    try:
        return datetime.strptime(driver.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0


def read_events(store: Store, *, newest: int = MAX_DRIVERS, parts: Parts | None = None) -> list[DriverEvents]:
    """The events of the `newest` drivers of the root, the oldest driver first. Damaged lines are left out.

    Parts never change, so a caller that reads repeatedly passes the same `parts`, in which those that were read are
    kept. Raises StorageUnavailableError if the store does not answer.
    """
    kept: Parts = {} if parts is None else parts
    chosen = list_parts(store, newest=newest)
    wanted = [key for key in chosen if key not in kept]
    for key, events in zip(wanted, store.each(lambda key: _read_part(store, key), wanted), strict=True):
        kept[key] = events
    for key in kept.keys() - set(chosen):
        del kept[key]
    by_driver: dict[str, list[Event]] = defaultdict(list)
    for key in chosen:
        driver, _ = layout.event_driver(key) or ("", 0)
        by_driver[driver].extend(kept[key])
    return [DriverEvents(driver, tuple(events)) for driver, events in by_driver.items()]


def list_parts(store: Store, *, newest: int = MAX_DRIVERS) -> list[str]:
    """The keys of the parts to be read, in order: of the newest drivers, and the newest of their parts."""
    sizes = {key: size for key, size in store.list_sizes(layout.EVENTS).items() if layout.event_driver(key)}
    drivers = set(sorted({key.split("/")[1] for key in sizes})[-newest:])
    chosen, left = [], MAX_BYTES
    for key in sorted((key for key in sizes if key.split("/")[1] in drivers), reverse=True):
        if sizes[key] <= MAX_PART_BYTES:
            if (left := left - sizes[key]) < 0:
                break
            chosen.append(key)
    return chosen[::-1]


def _read_part(store: Store, key: str) -> tuple[Event, ...]:
    """The valid events of a part; none if it cannot be read. `check_part` gives the reason."""
    try:
        return parse_part(store.get(key))[0]
    except StorageUnavailableError:
        raise
    except OSError:
        return ()


def check_part(store: Store, key: str) -> InvalidObjectError | None:
    """Why a part is damaged; None if it is valid or does not exist. Raises as `read_events`."""
    try:
        problem = parse_part(store.get(key))[1]
    except FileNotFoundError:
        return None
    except StorageUnavailableError:
        raise
    except OSError as error:
        return unreadable(store, key, error)
    return InvalidObjectError(key, problem, url=store.url) if problem else None


def parse_part(data: bytes) -> tuple[tuple[Event, ...], str]:
    """The valid events of a part, and the first problem in it; empty if there is none."""
    events: list[Event] = []
    problem = ""
    if len(data) > MAX_PART_BYTES:
        return (), f"it has {len(data):,} bytes; allowed: at most {MAX_PART_BYTES:,}"
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line:
            continue
        try:
            events.append(parse_event(line))
        except ValueError as error:
            problem = problem or f"line {number}: {error}"
    return tuple(events), problem
