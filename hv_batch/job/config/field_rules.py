"""The validation rules of the fields of a manifest row, shared with the config's `defaults`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hv_batch.sampling_params import RULES, SIZE_MULTIPLE, TEMPORAL_COMPRESSION

MAX_FPS = 240  # above any display; catches a frame count in the wrong column
MAX_VIDEOS = 10_000  # of one row; a larger number is a mistake
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,40}")  # 2^63 has 19 digits
REAL_NUMBER = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,4})?")

MAX_TEXT_CHARS = 100_000  # of a prompt or an id; the model reads at most 315 tokens, and a page has 3,000 characters

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is allowed


def _whole_between(low: int, high: int) -> Rule:
    def is_allowed(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return is_allowed, f"a whole number from {low} to {high}"


def _not_too_long(rule: Rule) -> Rule:
    is_text, allowed = rule
    return lambda value: is_text(value) and len(value) <= MAX_TEXT_CHARS, (
        f"{allowed}, of at most {MAX_TEXT_CHARS} characters"
    )


# The rules of a row and of the config's defaults for it: the model's parameters and the two of the job.
ROW_RULES: Mapping[str, Rule] = {
    **RULES,
    "prompt": _not_too_long(RULES["prompt"]),
    "negative_prompt": _not_too_long(RULES["negative_prompt"]),
    "num_videos": _whole_between(1, MAX_VIDEOS),
    "fps": _whole_between(1, MAX_FPS),
}


KNOWN_COLUMNS = ("id", *ROW_RULES)

WHOLE_COLUMNS = ("height", "width", "num_frames", "num_inference_steps", "seed", "num_videos", "fps")
REAL_COLUMNS = ("guidance_scale", "cfg_scale", "guidance_rescale", "flow_shift")

# Fields on a grid, as (first allowed value, step). An error names the nearest allowed values and leaves the choice to
# the user, because another geometry is another video.
_GRID = {
    "height": (SIZE_MULTIPLE, SIZE_MULTIPLE),
    "width": (SIZE_MULTIPLE, SIZE_MULTIPLE),
    "num_frames": (1, TEMPORAL_COMPRESSION),
}


def find_fault(field: str, value: Any) -> str | None:
    """None if `value` is allowed in `field`; otherwise what is allowed, as text for an error message."""
    is_allowed, allowed = ROW_RULES[field]
    if is_allowed(value):
        return None
    if field not in _GRID or not isinstance(value, int) or isinstance(value, bool):
        return allowed
    first, step = _GRID[field]
    below = first + (value - first) // step * step
    nearest = [near for near in (below, below + step) if is_allowed(near)]
    return f"{allowed}; nearest: {' and '.join(map(str, nearest))}" if nearest else allowed


def parse_text(name: str, text: str) -> Any:
    """The value of a column in a format that has only text (CSV, folder names).

    An empty text is None. In a column of numbers, text that is a number is parsed; other text is returned unchanged and
    fails validation.
    """
    if not text:
        return None
    if name not in WHOLE_COLUMNS and name not in REAL_COLUMNS:
        return text
    if name in WHOLE_COLUMNS and WHOLE_NUMBER.fullmatch(text.strip()):
        return int(text)
    return float(text) if REAL_NUMBER.fullmatch(text.strip()) else text
