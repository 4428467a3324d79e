"""Baseline of `hv-batch bench job`: the same samples through Ray Data's `map_batches`, without durability.

The same engine runs in the same three kinds of actors. The last actor writes each media file and a short JSON file into
a folder. There is no fsync, no put-if-absent, no retry and no resume.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hv_batch.bench.throughput import MIDDLE, Meter, Throughput, per_second
from hv_batch.job.config.engine_factory import build_engine
from hv_batch.job.config.run_config import RunConfig
from hv_batch.media.writer import write_media
from hv_batch.protocol import Engine, ParallelPlan, RankSpec, UserError
from hv_batch.sampling_params import SamplingParams

Rows = dict[str, np.ndarray]  # a batch in the format of Ray Data: columns of equal length


def check_ray_data() -> None:
    """Raises UserError if a package that Ray Data needs is missing."""
    if missing := [name for name in ("pandas", "pyarrow") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--with-ray-data: Ray Data needs {' and '.join(missing)}, which is not installed. Install it with "
            "`pip install 'ray[data]'`, or omit the option."
        )


def measure_map_batches(config: RunConfig, samples: int, decoders: int, folder: Path) -> Throughput:
    """Return the throughput at which Ray Data writes `samples` samples into `folder`. Ray must be initialized.

    One actor encodes, `config.groups.count` actors denoise, and `decoders` actors decode.
    """
    import ray.data  # takes seconds to import and needs pandas, which is optional

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = ray.data.from_items([{"number": number, "prompt": f"sample {number}"} for number in range(samples)])
    encoders, groups = config.encoders, config.groups
    ends = (
        rows.map_batches(_Encode, batch_size=encoders.batch_size, **_pool(1, encoders.cpus, config))
        .map_batches(_Denoise, batch_size=1, **_pool(groups.count, groups.cpus_per_rank, config))
        .map_batches(_Decode, batch_size=1, **_pool(decoders, config.decoders.cpus, config, folder))
    )
    meter, seconds = Meter(), []
    for row in ends.iter_rows():
        seconds.append(row["end"])
        if len(seconds) in [int(share * samples) for share in MIDDLE]:
            meter.read(len(seconds))
    return Throughput(per_second(seconds), meter.cpu_ms())


def _pool(actors: int, cpus: float, *arguments: Any) -> dict[str, Any]:
    return {"concurrency": actors, "num_cpus": cpus, "fn_constructor_args": arguments}


def _engine(config: RunConfig) -> Engine:
    return build_engine(config.model.engine, config.model.engine_options())


class _Encode:
    def __init__(self, config: RunConfig) -> None:
        self._encoder = _engine(config).text_encoder("cpu")
        self._is_image = config.defaults.num_frames == 1

    def __call__(self, rows: Rows) -> Rows:
        self._encoder.encode(list(rows["prompt"]), image=self._is_image)
        return rows


class _Denoise:
    def __init__(self, config: RunConfig) -> None:
        place = RankSpec(
            rank=0, local_rank=0, plan=ParallelPlan(), device="cpu", address="", timeout_s=config.timeouts.start_s
        )
        self._denoiser = _engine(config).join(place)
        values: Mapping[str, Any] = config.defaults.model_dump(exclude={"fps", "num_videos"})
        self._params = SamplingParams(prompt="", seed=0, **values)

    def __call__(self, rows: Rows) -> Rows:
        numbers = rows["number"].tolist()
        params = [
            replace(self._params, prompt=prompt, seed=n) for prompt, n in zip(rows["prompt"], numbers, strict=True)
        ]
        latents = [
            self._denoiser.denoise(each, None, None, lambda _done, _read, _computed=None: None) for each in params
        ]
        return {"number": rows["number"], "latents": np.stack(latents)}


class _Decode:
    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._decoder = _engine(config).decoder("cpu")
        self._defaults, self._media = config.defaults, config.media
        self._folder = folder

    def __call__(self, rows: Rows) -> Rows:
        defaults = self._defaults
        for number, latents in zip(rows["number"].tolist(), rows["latents"], strict=True):
            media = write_media(
                self._decoder.decode(latents),
                self._folder / str(number),
                height=defaults.height,
                width=defaults.width,
                num_frames=defaults.num_frames,
                fps=defaults.fps,
                media=self._media,
            )
            facts = {"number": number, "bytes": media.bytes, "sha256": media.sha256}
            (self._folder / f"{number}.json").write_text(json.dumps(facts))
        return {"end": np.full(len(rows["number"]), time.time())}
