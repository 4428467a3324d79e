"""The real engine with slower steps, for chaos runs of the toy."""

from __future__ import annotations

import time
from typing import Any

from hv_batch.engine.hunyuan import HunyuanVideo
from tests.chaos.engine import arm


class ToyEngine(HunyuanVideo):
    """`video` holds the options of HunyuanVideo. Each step takes `step_seconds` longer."""

    def __init__(self, *, marks: str, step_seconds: float, video: dict[str, Any], loras: Any = None) -> None:
        super().__init__(**video, loras=loras)
        self.step_seconds = step_seconds

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        arm()

    def join(self, place):
        denoiser = super().join(place)
        denoise = denoiser.denoise

        def slow_denoise(params, positive, negative, on_step, resume=None):
            def after_step(done, read, computed=None):
                time.sleep(self.step_seconds)
                on_step(done, read, computed)

            return denoise(params, positive, negative, after_step, resume)

        denoiser.denoise = slow_denoise
        return denoiser
