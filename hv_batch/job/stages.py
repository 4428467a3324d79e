"""The three stages of a sample."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """The stages of a sample, in order."""

    ENCODE = 0
    DENOISE = 1
    DECODE = 2


STAGES = tuple(Stage)  # iterating over the enum itself is ten times slower
