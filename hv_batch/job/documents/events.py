"""One event of a driver: one line of an object `events/<driver>/<part>.jsonl`.

Each line is a JSON object with `at` (unix seconds), `kind`, and the fields of its kind:

    run_started       samples, committed, quarantined, pending, version, host
    run_ended         outcome (finished, stopped, failed), message (of a failure), dropped (events that were left out)
    worker_asked      worker, stage, gpus: its resources are requested
    worker_placed     the same and nodes: it holds its resources and loads
    worker_ready      the same: it accepts tasks
    worker_work       the same, since, samples, failed, seconds: the tasks that ended between `since` and `at`, which
                      took `seconds` in all. A long pause between two tasks begins another event.
    worker_lost       the same, class, message
    worker_released   the same, message: it was not needed any more
    node_joined, node_left, node_draining, node_excluded    node, message
    drain_started, drain_ended
    outage_started, outage_ended    seconds (how long it lasted): the output root did not answer
    progress          committed, quarantined, pending, starting (workers), encoding, denoising, decoding, spooled

`worker` is the name in logs and records ("denoise-0.1": stage, slot, incarnation), `gpus` the number of GPUs that it
holds, `nodes` the addresses of its nodes with the beginning of their Ray ids ("10.0.0.3 (1f0c2d3e)"; at most 16).
`samples` of `run_started` counts those of the whole root.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from hv_batch.job.documents.fields import Count, Document, FailureName, Seconds
from hv_batch.job.documents.reading import parse

MAX_LINE_BYTES = 8192
MAX_NAME_CHARS = 200
MAX_MESSAGE_CHARS = 500
MAX_NODES = 16

UnixTime = Annotated[float, Field(ge=0, le=1e11)]
ShortName = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Message = Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)]


class EventLine(Document):
    """A later version may add kinds and fields. The kind of an event decides which fields it has."""

    at: UnixTime
    kind: Annotated[str, Field(pattern=r"\A[a-z_]{1,32}\z")]
    worker: ShortName = ""
    stage: Literal["encode", "denoise", "decode"] | None = None
    nodes: Annotated[list[ShortName], Field(max_length=MAX_NODES)] = Field(default_factory=list)
    node: ShortName = ""
    gpus: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    since: UnixTime | None = None
    seconds: Seconds = 0.0
    samples: Count = 0
    failed: Count = 0
    failure: FailureName | None = Field(default=None, alias="class")
    message: Message = ""
    outcome: Literal["finished", "stopped", "failed"] | None = None
    dropped: Count = 0
    version: ShortName = ""
    host: ShortName = ""
    committed: Count = 0
    quarantined: Count = 0
    pending: Count = 0
    starting: Count = 0
    encoding: Count = 0
    denoising: Count = 0
    decoding: Count = 0
    spooled: Count = 0


FIELDS = frozenset(field.alias or name for name, field in EventLine.model_fields.items())


def parse_event(line: bytes) -> dict[str, Any]:
    """The event in one line: the known fields that it has. Raises ValueError if it is not valid."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"it has {len(line):,} bytes; allowed: at most {MAX_LINE_BYTES:,}")
    return {name: value for name, value in parse(EventLine, line).items() if name in FIELDS}
