"""Reads the objects of an output root: bounded, strict, and with the object's key in every error.

An output root is untrusted input. No other module parses an object of a root (`tests/job/documents/test_readers.py`),
so an object that satisfies its model is the only kind that the rest of the program sees.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from hv_batch.job import layout
from hv_batch.job.documents.fields import check_row_values
from hv_batch.job.redaction import public_url
from hv_batch.job.storage.canonical_json import MAX_BYTES, decode, decode_value
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.job.storage.store import Store
from hv_batch.job.user_input import shorten
from hv_batch.protocol import UserError

MAX_PROBLEMS = 3  # fields named in one message

# Remedies, as the last sentence of a message.
REPAIR = "Run `hv-batch verify` to list all damage, or `hv-batch verify --repair` to render the sample again."


class InvalidObjectError(UserError, ValueError):
    """An object of an output root cannot be used. `is_readable` is False if the store did not return its bytes."""

    def __init__(self, key: str, problem: str, *, url: str = "", remedy: str = "", is_readable: bool = True) -> None:
        super().__init__(key, problem, url, remedy, is_readable)
        self.key = key
        self.problem = problem
        self.is_readable = is_readable
        self._url = url
        self._remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self.args

    def __str__(self) -> str:
        where = f" in {public_url(self._url)}" if self._url else ""
        return f"The object {self.key}{where} is damaged ({self.problem}). {self._remedy}".rstrip()


def _rebuild(key: str, problem: str, url: str, remedy: str, is_readable: bool) -> InvalidObjectError:
    return InvalidObjectError(key, problem, url=url, remedy=remedy, is_readable=is_readable)


def parse(model: type[BaseModel], data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, if it satisfies `model`. Raises ValueError with the first problems if not."""
    try:
        values = decode(data)
    except ValueError as error:
        raise ValueError(f"not a JSON object: {error}") from error
    check(model, values)
    return values


def check(model: type[BaseModel], values: Any) -> None:
    """Raises ValueError with the first problems if `values` do not satisfy `model`."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f"; and {len(problems) - MAX_PROBLEMS:,} more" if len(problems) > MAX_PROBLEMS else ""
        raise ValueError("; ".join(map(_describe, problems[:MAX_PROBLEMS])) + more) from error


def parse_row(key: str, content: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The known columns and the further columns of the manifest row `key`, from the index. Raises ValueError."""
    if not layout.is_sample_key(key):
        raise ValueError(f"its key is {shorten(key)}, which is not allowed")
    row = decode_value(content.encode("utf-8", "surrogatepass"))
    if not (isinstance(row, list) and len(row) == 2 and all(isinstance(part, dict) for part in row)):
        raise ValueError("its content is not a pair of objects")
    return check_row_values(row[0]), row[1]


def read(store: Store, key: str, model: type[BaseModel], remedy: str = "") -> dict[str, Any]:
    """The object under `key`.

    Raises FileNotFoundError if there is none, StorageUnavailableError if the store does not answer, and
    InvalidObjectError if the object is invalid or the store refuses only this object.
    """
    try:
        data = store.get(key, MAX_BYTES)
    except (FileNotFoundError, StorageUnavailableError):
        raise
    except OSError as error:
        raise unreadable(store, key, error) from error
    try:
        return parse(model, data)
    except ValueError as error:
        raise InvalidObjectError(key, str(error), url=store.url, remedy=remedy) from error


def read_record(store: Store, key: str, model: type[BaseModel], shard: int, sample: str) -> dict[str, Any]:
    """The record of `sample` (its key) in `shard`. Raises as `read`, and if it is the record of another sample."""
    record = read(store, key, model, REPAIR)
    if problem := misplacement(record, shard, sample):
        raise InvalidObjectError(key, problem, url=store.url, remedy=REPAIR)
    return record


def misplacement(record: dict[str, Any], shard: int, sample: str) -> str | None:
    """Why a valid record does not belong under the key of this sample; None if it does."""
    for name, expected in {"key": sample, "shard": shard}.items():
        if record[name] != expected:
            return f"its {name} is {record[name]!r}, not {expected!r}"
    return None


def unreadable(store: Store, key: str, error: OSError) -> InvalidObjectError:
    """The error for one object that the store does not return, although it returns others.

    Raises `error` itself if run.json cannot be read either: the store is the cause, and the object may be intact.
    """
    if key != layout.RUN:
        try:
            store.get(layout.RUN, MAX_BYTES)
        except OSError:
            raise error from None
    reason = error.strerror or str(error)
    remedy = "Make it readable, or remove it by hand if it is lost; then run `hv-batch verify` again."
    return InvalidObjectError(
        key, f"it cannot be read: {type(error).__name__}: {reason}", url=store.url, remedy=remedy, is_readable=False
    )


def _describe(problem: Any) -> str:
    """One problem that pydantic reports, as text: the field, its value and what is allowed."""
    message = problem["msg"].removeprefix("Value error, ")
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"the field {where} is missing"
    if not where:
        return str(message)
    return f"{where} = {shorten(problem['input'])}: {message[:1].lower()}{message[1:]}"
