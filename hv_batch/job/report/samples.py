"""The samples of a report: what a part says of each, from its record or from the plan.

Every sample has the same fields:

    id, key       texts; `row` the number of its manifest row as text, `video` its index among the videos of the row
    state         committed, quarantined, withdrawn or pending
    prompt        at most MAX_PROMPT_CHARS characters; empty if it is withdrawn or unknown
    file, poster  keys in the output root, or null; `bytes` of the file
    width, height, frames, fps, steps, seed, guidance, cfg    null if unknown
    flags         what a viewer should look at: the look of a bad video (`hv_batch.job.quality`), a `truncated` prompt,
                  a `damaged` record
    facets        the values of the manifest's own columns that can be categories
    class, message   of a quarantined sample; the message of a withdrawn one is the reason
    seconds       by stage, of a committed sample

Texts come from outside: they are clamped here and must be escaped by whatever shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hv_batch.job.documents.report import MAX_FACETS, MAX_NAME_CHARS
from hv_batch.job.manifest.extra_columns import clean_text
from hv_batch.job.quality import GOOD, look

MAX_PROMPT_CHARS = 2000
MAX_MESSAGE_CHARS = 500
MAX_ID_CHARS = 200
MAX_COLUMNS = 24  # of the manifest's own columns

COMMITTED, QUARANTINED, WITHDRAWN, PENDING = "committed", "quarantined", "withdrawn", "pending"
TRUNCATED, DAMAGED = "truncated", "damaged"

# The facets that every report has. A column of the manifest with such a name gets the prefix `extra_`, as in tables.
STATE, SHAPE, CLASS, FLAGS = RESERVED = ("state", "shape", "class", "flags")

Sample = dict[str, Any]


def describe_committed(record: Mapping[str, Any]) -> Sample:
    """The sample of a commit record."""
    produced = record["produced"]
    seen = {name: produced[field] for name, field in _PRODUCED.items()}
    paths = {"file": record["file"], "poster": record["poster"], "bytes": record["bytes"]}
    return _sample(
        record, COMMITTED, **paths, **_params(record) | seen, flags=_flags(record), seconds=dict(record["stages"])
    )


def describe_quarantined(record: Mapping[str, Any]) -> Sample:
    """The sample of a quarantine record, or of what stands for a damaged one (`records.quarantine`)."""
    message = record["message"].strip().partition("\n")[0]
    failure = {"class": record["class"], "message": clamp(message, MAX_MESSAGE_CHARS)}
    return _sample(record, QUARANTINED, **_params(record), **failure)


def describe_withdrawn(tombstone: Mapping[str, Any]) -> Sample:
    """The sample of a tombstone. Nothing of the withdrawn sample is shown but its name and the reason."""
    return _sample(tombstone, WITHDRAWN, message=clamp(tombstone["reason"], MAX_MESSAGE_CHARS))


def describe_pending(planned: Mapping[str, Any]) -> Sample:
    """A sample of the plan (`shards.planned.PlannedSamples`), with the fields of a record that the plan determines."""
    return _sample(planned, PENDING, **_params(planned))


def describe_damaged(planned: Mapping[str, Any]) -> Sample:
    """A committed sample whose record cannot be read. `verify` reports the damage."""
    return _sample(planned, COMMITTED, **_params(planned), flags=[DAMAGED])


def clamp(text: str, chars: int) -> str:
    """A text of at most `chars` characters that UTF-8 can hold."""
    text = clean_text(text)
    return text if len(text) <= chars else f"{text[: chars - 1]}…"


def shape_name(sample: Mapping[str, Any]) -> str | None:
    """`HEIGHTxWIDTHxFRAMES`; None if unknown."""
    size = [sample[name] for name in ("height", "width", "frames")]
    return None if None in size else "x".join(map(str, size))


def _sample(place: Mapping[str, Any], state: str, **facts: Any) -> Sample:
    return {
        "id": clamp(place["id"], MAX_ID_CHARS),
        "key": place["key"],
        "row": str(place["row"]),
        "video": place["video_index"],
        "state": state,
        "prompt": clamp(place["params"].get("prompt", ""), MAX_PROMPT_CHARS) if "params" in place else "",
        **dict.fromkeys(("file", "poster", "bytes", *_PRODUCED, *_PARAMS, "fps"), None),
        "flags": [],
        "facets": _categories(place.get("extra", {})),
        "class": None,
        "message": None,
        "seconds": {},
        **facts,
    }


_PRODUCED = {"width": "width", "height": "height", "frames": "num_frames"}
_PARAMS = {"steps": "num_inference_steps", "seed": "seed", "guidance": "guidance_scale", "cfg": "cfg_scale"}


def _params(place: Mapping[str, Any]) -> dict[str, Any]:
    params = place["params"]
    names = {**_PRODUCED, **_PARAMS}
    return {name: params.get(field) for name, field in names.items()} | {"fps": place.get("fps")}


def _flags(record: Mapping[str, Any]) -> list[str]:
    flags = []
    if scores := record.get("scores"):
        flags += [seen] if (seen := look(scores, record["produced"]["num_frames"])) != GOOD else []
    lost = record["places"].get("encode", {})
    # Fields that the schema of a record does not check.
    if any(isinstance(count := lost.get(f"{name}tokens_lost"), int) and count > 0 for name in ("", "negative_")):
        flags.append(TRUNCATED)
    return flags


def _categories(extra: Mapping[Any, Any]) -> dict[str, str]:
    """The values of the manifest's own columns that are short: longer ones are no categories."""
    found: dict[str, str] = {}
    for name, value in extra.items():
        text = _category(value)
        if text is not None and isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS - len("extra_"):
            name = clean_text(name)
            found[f"extra_{name}" if name in RESERVED else name] = text
        if len(found) == min(MAX_COLUMNS, MAX_FACETS):
            break
    return found


def _category(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 2**53 else None
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS:
        return clean_text(value)
    return None
