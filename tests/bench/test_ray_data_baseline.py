"""hv_batch.bench.ray_data_baseline: Ray Data runs the stages of a run, without durability."""

import json

import numpy as np
import pytest
from PIL import Image

from hv_batch.bench import ray_data_baseline
from hv_batch.bench.job_throughput import SIDE, Load, job_config
from hv_batch.protocol import UserError
from hv_batch.sampling_params import latent_shape


@pytest.mark.parametrize(("frames", "suffixes"), [(1, (".png",)), (5, (".mp4", ".jpg"))])
def test_the_three_stages_render_every_sample(tmp_path, frames, suffixes):
    """The baseline is fair: it runs the same engine and writes the same files: media, poster of a video, and record."""
    config = job_config(Load(samples=3, groups=1, decoders=1, steps=2, step_seconds=0.0, frames=frames))
    rows = {"number": np.arange(3), "prompt": np.array(["a", "b", "c"], object)}
    rows = ray_data_baseline._Denoise(config)(ray_data_baseline._Encode(config)(rows))
    assert rows["latents"].shape == (3, *latent_shape(SIDE, SIDE, frames))
    assert len(ray_data_baseline._Decode(config, tmp_path)(rows)["end"]) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{number}{ending}" for number in range(3) for ending in (*suffixes, ".json")
    )
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text())["bytes"] == path.with_suffix(suffixes[0]).stat().st_size
    if frames == 1:
        with Image.open(tmp_path / "0.png") as image:
            assert image.size == (SIDE, SIDE)


def test_a_missing_package_of_ray_data_is_reported_before_the_run(monkeypatch):
    """P6: the option needs pandas, which a run does not need. The message names the package and the remedy."""
    ray_data_baseline.check_ray_data()
    monkeypatch.setattr(ray_data_baseline.importlib.util, "find_spec", lambda name: None if name == "pandas" else name)
    with pytest.raises(UserError, match=r"--with-ray-data: Ray Data needs pandas, .* Install it"):
        ray_data_baseline.check_ray_data()
