"""The real engine with slower steps, for chaos runs of the toy."""

from __future__ import annotations

from typing import Any

from tests.chaos.engine import STEP_LIMIT_S, arm
from tests.support.faulty_engine import FaultyVideo


class ToyEngine(FaultyVideo):
    """`video` holds the options of HunyuanVideo. Each step takes `step_seconds` longer."""

    def __init__(self, *, marks: str, step_seconds: float, video: dict[str, Any], loras: Any = None) -> None:
        options = video | {"loras": loras}
        super().__init__(marks=marks, step_seconds=step_seconds, patience_s=STEP_LIMIT_S, video=options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        arm()
