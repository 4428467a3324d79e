"""The types of the fields of an output root's objects: strict, bounded and finite."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from hv_batch.job import layout
from hv_batch.job.config.field_rules import MAX_TEXT_CHARS, ROW_RULES, find_fault
from hv_batch.job.user_input import shorten
from hv_batch.sampling_params import OPTIONAL_FIELDS, RULES

MAX_SAMPLES = 10**8  # of a run: ten times the largest manifest that was checked, which takes 0.8 GB
MAX_SHARD_SAMPLES = 10**6  # whose keys and records a reader holds
MAX_MESSAGE_CHARS = 1_000_000  # of an error or a traceback; they are cut to 10,000 when they are written


class Document(BaseModel):
    """An object of an output root, or a part of one. Fields of later versions are allowed and ignored.

    Strict: true and "7" are not numbers.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)


def _check_key(value: str) -> str:
    if not layout.is_sample_key(value):
        raise ValueError("allowed: a sample key of at most 102 letters, digits, '.', '_' and '-'")
    return value


def check_text(max_chars: int, value: Any) -> Any:
    """Unlike pydantic's `str`, this allows lone surrogates, which prompts and file names may contain."""
    if not isinstance(value, str) or len(value) > max_chars:
        raise ValueError(f"allowed: a text of at most {max_chars:,} characters")
    return value


def _check_time(value: str) -> str:
    try:
        datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("allowed: a time in ISO 8601") from None
    return value


def _check_fields(names: Iterable[str], values: dict[str, Any]) -> dict[str, Any]:
    for name in names:
        if name not in values:
            if name in OPTIONAL_FIELDS:
                continue
            raise ValueError(f"the field {name} is missing")
        if (allowed := find_fault(name, values[name])) is not None:
            raise ValueError(f"{name} = {shorten(values[name])}; allowed: {allowed}")
    return values


def check_row_values(values: dict[str, Any]) -> dict[str, Any]:
    """`values` if they are known columns of a manifest row with allowed values. Raises ValueError if not."""
    if unknown := values.keys() - ROW_RULES.keys():
        raise ValueError(f"unknown columns: {', '.join(sorted(unknown))}")
    return _check_fields(values, values)


Key = Annotated[str, AfterValidator(_check_key)]
Hex64 = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
Name = Annotated[str, Field(max_length=1024)]
Text = Annotated[str, PlainValidator(partial(check_text, MAX_TEXT_CHARS))]
LongText = Annotated[str, PlainValidator(partial(check_text, MAX_MESSAGE_CHARS))]
Time = Annotated[str, Field(max_length=64), AfterValidator(_check_time)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Samples = Annotated[int, Field(ge=0, le=MAX_SAMPLES)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Fps = Annotated[int, AfterValidator(lambda value: _check_fields(["fps"], {"fps": value})["fps"])]
Params = Annotated[dict[str, Any], AfterValidator(lambda values: _check_fields(RULES, values))]
FailureName = Annotated[str, Field(pattern=r"\A[A-Z_]{1,32}\z")]  # not an enumeration: a later version may add one
Versions = Annotated[dict[Name, Name], Field(max_length=100)]
Extra = Annotated[dict[Any, Any], Field(max_length=1000)]  # keys as `Text`; JSON has no others
