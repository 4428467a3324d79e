"""The HunyuanVideo engine with injected faults: a rank raises, is killed or hangs during a denoise, once each."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.runtime.groups import step_checkpoints

FAULTY_STEP = 6


class FaultyVideo(HunyuanVideo):
    """Injects the fault that the prompt names after step FAULTY_STEP: "fox !kill-2" kills rank 2.

    Faults are "raise", "kill" and "hang". Each occurs once: a file "once-kill" in the folder `marks` records it. Every
    step takes `step_seconds` longer. A step is overdue after `patience_s`. `video` holds the options of HunyuanVideo.
    """

    def __init__(self, *, marks: str, step_seconds: float, patience_s: float, video: dict):
        super().__init__(**video)
        self.marks = Path(marks)
        self.step_seconds = step_seconds
        self.patience_s = patience_s

    def join(self, spec):
        step_checkpoints.MIN_LIMIT_S = self.patience_s
        denoiser = super().join(spec)
        denoise = denoiser.denoise

        def faulty_denoise(params, positive, negative, on_step, resume=None):
            def after_step(done, read, computed=None):
                time.sleep(self.step_seconds)
                on_step(done, read, computed)
                if done == FAULTY_STEP:
                    self.inject_fault(params.prompt, spec.rank)

            return denoise(params, positive, negative, after_step, resume)

        denoiser.denoise = faulty_denoise
        return denoiser

    def inject_fault(self, prompt: str, rank: int) -> None:
        match = re.search(r"!(\w+)-(\d)", prompt)
        if not match or int(match[2]) != rank or not self.is_first(match[1]):
            return
        if match[1] == "raise":
            raise ValueError(f"made to fail on rank {rank}")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[match[1]])

    def is_first(self, fault: str) -> bool:
        """Record the fault; return whether it is the first of its type."""
        try:
            (self.marks / f"once-{fault}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
