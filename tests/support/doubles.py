"""A fake engine: fast, deterministic, and able to fail on command.

A prompt says what goes wrong with it, as in "... !kill-denoise-once". Faults that happen once leave a mark in `marks`,
a folder that all actors share, and so do all calls: tests read there how often something was really done.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import ray

from hv_batch.job.storage import store as store_module
from hv_batch.job.storage.local_disk import LocalDisk
from hv_batch.job.storage.store import Store
from hv_batch.protocol import DeviceError, NonFiniteError, StepState

logger = logging.getLogger("hv_batch.engine.fake")


@dataclass(frozen=True)
class FakeEmbedding:
    text: str
    num_tokens: int
    tokens_lost: int = 0


class FakeEngine:
    """`hold_after` names steps after which rank 0 waits until there is a mark "go-<step>".

    `decode_faults`: by the width of a video, what a group's first decode of it meets: "kill-<rank>" or "nan".
    """

    def __init__(
        self,
        *,
        marks: str,
        step_seconds: float = 0.0,
        hold_after: Sequence[int] = (),
        check: list[str] | None = None,
        revision: str = "a",
        dies_after: list[str] | None = None,
        decode_seconds: float = 0.0,
        root_goes_away: bool = False,
        decode_faults: dict[int, str] | None = None,
    ):
        self.marks = Path(marks)
        self.dies_after = dies_after or []
        self.root_goes_away = root_goes_away
        self.decode_faults = decode_faults or {}
        self._arm()
        self.step_seconds = step_seconds
        self.decode_seconds = decode_seconds
        self.hold_after = hold_after
        self.problems = check or []
        self.revision = revision

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._arm()

    def _arm(self):
        """This process, driver or actor, dies after it has written the first object whose key starts with a prefix.

        With `root_goes_away` the output root takes no file while there is a mark "away".
        """
        if self.root_goes_away:
            store_module.PAUSES_S = ()
            LocalDisk.put_finished = self._going_away(LocalDisk.put_finished)
        for prefix in self.dies_after:
            for name in ("create", "put", "put_file", "put_finished"):
                setattr(LocalDisk, name, self._dying(getattr(LocalDisk, name), prefix))

    def _dying(self, act, prefix):
        def wrapped(disk, what, *args):
            result = act(disk, what, *args)
            keys = [what] if isinstance(what, str) else what
            if any(key.startswith(prefix) for key in keys) and self.first(f"died-after-{prefix.replace('/', '')}"):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def _going_away(self, act):
        def wrapped(disk, files):
            if (self.marks / "away").exists():
                self.mark("refused", " ".join(files))
                raise ConnectionError("the output root is away")
            return act(disk, files)

        return wrapped

    def check(self):
        return list(self.problems)

    def identity(self):
        return {"fake": self.revision}

    def group_problems(self, plan, shapes=()):
        return [] if 24 % plan.ulysses_degree == 0 else [f"ulysses_degree {plan.ulysses_degree} does not divide 24"]

    def text_encoder(self, device):
        self.mark_gpus("encoder")
        return FakeEncoder(self)

    def host_rendezvous(self, host, world_size):
        return f"{host}:0"

    def join(self, place):
        self.mark(f"join-{place.rank}-of-{place.plan.world_size}", place.address)
        self.mark(f"pid-{place.rank}", str(os.getpid()))
        host = ray.util.get_node_ip_address()
        self.mark("ranks", f"{host} {place.rank} {place.local_rank} {os.getpid()}")
        if (self.marks / f"sick-{host}").exists():
            raise RuntimeError(f"no device works on {host}")
        if place.rank and (self.marks / "never-meets").exists() and self.first("never-met"):
            os.kill(os.getpid(), signal.SIGSTOP)
        self.mark_gpus(f"rank-{place.rank}")
        return FakeDenoiser(self, place)

    def decoder(self, device):
        self.mark("decoders", ray.util.get_node_ip_address())
        self.mark_gpus("decoder")
        return FakeDecoder(self)

    # ------------------------------------------------------------------------------------------------------------------

    def mark(self, what, text=""):
        with (self.marks / what).open("a") as file:
            file.write(text.replace("\n", " ") + "\n")

    def mark_gpus(self, who):
        """Record the GPUs that Ray has reserved for this actor. On a CPU, Ray's public API returns all GPUs."""
        held = ray._private.worker.global_worker.core_worker.resource_ids()
        names = [name for name in held if re.fullmatch("GPU(_group_[0-9a-f]+)?", name)]
        self.mark("gpus", " ".join([who, *(str(gpu) for name in names for gpu, _ in held[name])]))

    def first(self, what):
        try:
            (self.marks / f"once-{what}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def hold(self, step):
        while step in self.hold_after and not (self.marks / f"go-{step}").exists():
            time.sleep(0.02)

    def misbehave(self, stage, text):
        """Run the commands of the prompt for this stage."""
        for command in (word for word in text.split() if word.startswith("!")):
            fault, where, *once = command[1:].split("-")
            if where != stage or (once and not self.first(f"{command[1:]}-{text.split()[0]}")):
                continue
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "raise":
                raise ValueError(f"made to fail at {stage}: {text}")
            elif fault == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
                threading.Event().wait()  # the signal may reach this thread later than the others
            elif fault == "log":
                logger.warning(f"made to log at {stage}: {text}")
            elif fault == "hold":
                self.mark("held", text)
                while not (self.marks / "go").exists():
                    time.sleep(0.02)


class ChoosingEngine(FakeEngine):
    """Has one open option, the kernel. `kernels` are those that every node can run, fastest first; a mark
    "kernels-<host>" replaces them on a node.

    With `together`, a rank that chooses waits until as many ranks do, and each chooses another kernel.
    """

    def __init__(self, *, marks: str, kernels: Sequence[str], together: int = 1, hold_after: Sequence[int] = ()):
        super().__init__(marks=marks, hold_after=hold_after)
        self.kernels = kernels
        self.together = together

    def open_options(self):
        return ("kernel",)

    def join(self, place):
        able = self.able()
        if not (choices := place.choices):
            self.mark("choosing", str(os.getpid()))
            while len((self.marks / "choosing").read_text().split()) < self.together:
                time.sleep(0.02)
            choices = {"kernel": next(name for name in able if self.together == 1 or self.first(f"chose-{name}"))}
        denoiser = ChoosingDenoiser(self, place)
        denoiser.use_choices(choices)
        super().join(place)
        return denoiser

    def able(self):
        path = self.marks / f"kernels-{ray.util.get_node_ip_address()}"
        return path.read_text().split() if path.exists() else self.kernels


class FakeEncoder:
    def __init__(self, engine):
        self.engine = engine

    def encode(self, prompts, *, image):
        for prompt in prompts:
            self.engine.misbehave("encode", prompt)
            self.engine.mark("encoded", prompt)
        return [FakeEmbedding(prompt, len(prompt.split())) for prompt in prompts]


class FakeDenoiser:
    """Every step adds its own noise, so that a skipped or repeated step changes the result."""

    def __init__(self, engine, place):
        self.engine = engine
        self.rank = place.rank
        self.decodes = place.decodes

    def self_check(self):
        if self.rank and (self.engine.marks / "disagree").exists() and self.engine.first("disagreed"):
            raise RuntimeError("this rank computes something else")

    def denoise(self, params, positive, negative, on_step, resume=None):
        assert positive.text == params.prompt
        assert (negative is not None) == params.uses_cfg
        if "!nan" in params.prompt:
            raise ValueError("latents are not finite")
        if self.rank == 0:
            self.engine.mark("denoising", params.prompt)
            self.engine.mark("trace", "denoising")
        latents = resume.latents if resume else self.noise(params, 0)
        for step in range(resume.step if resume else 0, params.num_inference_steps):
            time.sleep(self.engine.step_seconds)
            latents = np.float32(0.5) * latents + self.noise(params, step + 1)
            if self.rank == 0:
                self.engine.mark("steps", f"{params.prompt} {step + 1}")
            on_step(step + 1, partial(StepState, step + 1, latents.copy()))
            if self.rank == 0:
                self.engine.hold(step + 1)
            if (self.engine.marks / f"faulty-{ray.util.get_node_ip_address()}").exists():
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            if step == params.num_inference_steps // 2 and self.rank == 0:
                self.engine.misbehave("denoise", params.prompt)
        if self.rank == 0:
            self.engine.mark("denoised", params.prompt)
        return latents

    def decode(self, latents):
        assert self.decodes
        fault = self.engine.decode_faults.get(8 * latents.shape[-1])
        if fault == f"kill-{self.rank}" and self.engine.first(fault):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.rank == 0:
            if fault == "nan" and self.engine.first(fault):
                raise NonFiniteError("the decoded frames are not finite")
            yield from FakeDecoder(self.engine).decode(latents)

    @staticmethod
    def noise(params, step):
        drawn = np.random.default_rng([params.seed, step]).standard_normal(params.latent_shape)
        return drawn.astype(np.float32) * np.float32(2.0 if params.uses_cfg else 1.0)


class ChoosingDenoiser(FakeDenoiser):
    def choices(self):
        return self.chosen

    def use_choices(self, choices):
        if choices["kernel"] not in self.engine.able():
            raise DeviceError(f"the run has chosen kernel {choices['kernel']}, and this node cannot run it")
        self.chosen = dict(choices)


class FakeDecoder:
    """Grey frames whose level depends on the latents."""

    def __init__(self, engine):
        self.engine = engine

    def decode(self, latents):
        if (self.engine.marks / "decoder-dies").exists() and self.engine.first("decoder-died"):
            os.kill(os.getpid(), signal.SIGKILL)
        if (self.engine.marks / f"faulty-decoder-{ray.util.get_node_ip_address()}").exists():
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        self.engine.mark("decoded", str(os.getpid()))
        time.sleep(self.engine.decode_seconds)
        while (self.engine.marks / "hold-decodes").exists():
            time.sleep(0.02)
        _, frames, height, width = latents.shape
        for index in range(frames):
            level = np.uint8(128 + 40 * np.tanh(latents[:, index].mean() * 10))
            count = 1 if index == 0 else 4
            yield np.full((count, height * 8, width * 8, 3), level, np.uint8)
        self.engine.mark("trace", "decoded")


# A store that dies ----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Simulates the death of the process; no handler of the package catches it."""


class CrashingStore(Store):
    """A real store whose process dies just before or just after change number `at`."""

    def __init__(self, url, at=None, when="before"):
        super().__init__(url)
        self.at = at
        self.when = when
        self.acts = []

    def put_new_all(self, objects):
        return self._act("put_new", objects, lambda: super(CrashingStore, self).put_new_all(objects))

    def put_all(self, objects):
        return self._act("put", objects, lambda: super(CrashingStore, self).put_all(objects))

    def put_file(self, key, path):
        return self._act("put_file", [key], lambda: super(CrashingStore, self).put_file(key, path))

    def put_finished(self, files):
        return self._act("put_file", files, lambda: super(CrashingStore, self).put_finished(files))

    def delete(self, key):
        return self._act("delete", [key], lambda: super(CrashingStore, self).delete(key))

    def _act(self, name, keys, act):
        dies = len(self.acts) == self.at
        self.acts.append(f"{name} {' '.join(keys)}")
        if dies and self.when == "before":
            raise Crash
        result = act()
        if dies:
            raise Crash
        return result
