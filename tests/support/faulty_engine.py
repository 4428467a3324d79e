"""The real engine, some of whose ranks raise, die or hang in the middle of a denoise, once each."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.runtime.groups import step_checkpoints

TROUBLED_STEP = 6


class TroubledVideo(HunyuanVideo):
    """A prompt says what happens to which rank after step TROUBLED_STEP, as in "fox !kill-2", unless there is a mark
    "once-kill" already. Steps take `step_seconds` longer, and one is overdue after `patience_s`. `video`: the options
    of the real engine.
    """

    def __init__(self, *, marks: str, step_seconds: float, patience_s: float, video: dict):
        super().__init__(**video)
        self.marks = Path(marks)
        self.step_seconds = step_seconds
        self.patience_s = patience_s

    def join(self, spec):
        step_checkpoints.LEAST_PATIENCE_S = self.patience_s
        denoiser = super().join(spec)
        denoise = denoiser.denoise

        def troubled(params, positive, negative, on_step, resume=None):
            def after_step(done, read):
                time.sleep(self.step_seconds)
                on_step(done, read)
                if done == TROUBLED_STEP:
                    self.misbehave(params.prompt, spec.rank)

            return denoise(params, positive, negative, after_step, resume)

        denoiser.denoise = troubled
        return denoiser

    def misbehave(self, prompt: str, rank: int) -> None:
        found = re.search(r"!(\w+)-(\d)", prompt)
        if not found or int(found[2]) != rank or not self.first(found[1]):
            return
        if found[1] == "raise":
            raise ValueError(f"told to fail on rank {rank}")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[found[1]])

    def first(self, what: str) -> bool:
        try:
            (self.marks / f"once-{what}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
