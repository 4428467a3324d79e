"""LoRAs on the command line: `hv-batch plan`, and `hv-batch sample --lora`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hv_batch.architecture import DiTConfig
from hv_batch.cli.plan import render_plan
from hv_batch.cli.sample import command as sample
from hv_batch.cli.sample.flags import parse_lora_flags
from hv_batch.job.config.hardware import GPUS
from hv_batch.job.config.run_config import load_config
from hv_batch.job.cost_model.estimate import make_plan
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from tests.support.lora_files import diffusion_pipe, official, random_adapter, write

CONFIG = DiTConfig(**TOY_DIT)


@pytest.fixture
def film(tmp_path):
    return write(tmp_path / "film.safetensors", official(random_adapter(CONFIG, only="double_blocks.0")))


def plan(tmp_path, rows, **loras):
    config, manifest = tmp_path / "config.yaml", tmp_path / "prompts.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"options": {"model_base": str(tmp_path / "absent"), "dit": TOY_DIT}, "loras": loras}
    config.write_text(json.dumps({"model": model, "parallel": {"device": "cpu"}, "output": {"shard_size": 4}}))
    return make_plan(load_config(str(config)), [str(manifest)], GPUS["h100"])


def test_a_plan_counts_samples_by_lora_and_the_changes(tmp_path, film):
    """Needs no weights. Twelve rows in turn, in shards of four: the order of admission changes three times."""
    rows = [{"prompt": f"p{i}", **({"lora": "film:0.5"} if i % 2 else {})} for i in range(12)]
    report = plan(tmp_path, rows, film={"path": str(film)})
    assert report["loras"] == {"samples": {"": 6, "film:0.5": 6}, "changes": 3}
    assert "none: 6, film:0.5: 6; a group changes them at most 3 times" in render_plan(report)
    assert "loras" not in plan(tmp_path, [{"prompt": "a"}])


def test_a_plan_refuses_unusable_loras_without_weights(tmp_path, film):
    """P6: all at once, each with its name, file and key."""
    wan = write(tmp_path / "wan.safetensors", {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)})
    files = {"film": film, "wan": wan, "gone": tmp_path / "gone.safetensors"}
    with pytest.raises(UserError) as caught:
        plan(tmp_path, [{"prompt": "a"}], **{name: {"path": str(path)} for name, path in files.items()})
    message = str(caught.value)
    assert "loras.wan" in message
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in message
    assert f"loras.gone: {tmp_path}/gone.safetensors does not exist" in message
    assert "film" not in message


def test_sample_merges_the_loras_of_its_flags(tmp_path, film, capsys):
    """In any order."""
    base = write_toy_checkpoint(tmp_path / "toy")
    grain = write(tmp_path / "my grain.safetensors", diffusion_pipe(random_adapter(CONFIG, 1, only="single_blocks")))
    size = ["--video-size", "32", "--video-length", "1", "--infer-steps", "1", "--device", "cpu", "--precision", "fp32"]
    fixed = ["--prompt", "a cat", "--seed", "1", "--latents-only", "--model-base", str(base), *size]

    def render(*flags):
        assert sample.main([*fixed, "--save-path", str(tmp_path / "out"), *flags]) == 0
        path = capsys.readouterr().out.split("\n")[0]
        return load_file(path)["latents"]

    plain = render()
    both = render("--lora", f"{film}:0.5", "--lora", str(grain))
    assert not np.array_equal(plain, both)
    assert np.array_equal(both, render("--lora", str(grain), "--lora", f"{film}:0.50"))
    with pytest.raises(UserError, match=r"film\.safetensors"):
        render("--lora", f"{film}.safetensors")


def test_names_of_flags_come_from_the_files():
    loras = parse_lora_flags(
        ["a/film.safetensors:0.5", "b/film.safetensors", "C:/x y.safetensors", "/:odd:/é.safetensors"]
    )
    assert loras == {
        "film": {"path": "a/film.safetensors", "strength": 0.5},
        "film-2": {"path": "b/film.safetensors"},
        "x-y": {"path": "C:/x y.safetensors"},
        "lora": {"path": "/:odd:/é.safetensors"},
    }
