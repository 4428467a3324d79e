"""Distilled weights: recognized by names, fetched as one repository, and rendered by the shipped configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hv_batch.cli.main import app
from hv_batch.job.config.run_config import load_config
from hv_batch.job.config.shipped import shipped_configs
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import write_toy_checkpoint
from hv_batch.weights.distilled import DISTILLED, recognize
from hv_batch.weights.fetching import LAYOUTS, fetch

DIT = "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"
ACCVIDEO = "accvideo-t2v-5-steps/diffusion_pytorch_model.pt"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """The repositories of distilled weights at toy width, as plain folders ORG/NAME."""
    root = tmp_path_factory.mktemp("repositories")
    toy = write_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    for weights in DISTILLED:
        shutil.copytree(toy, root / weights.repository)
        (root / weights.repository / "assets.mp4").write_text("large")
    acc = root / "aejion/AccVideo"
    (acc / ACCVIDEO).parent.mkdir()
    shutil.move(acc / DIT, acc / ACCVIDEO)
    config = acc / Path(DIT).with_name("config.json")
    if config.is_file():
        shutil.move(config, (acc / ACCVIDEO).with_name("config.json"))
    return root


def check(path):
    result = CliRunner().invoke(app, ["weights", "check", str(path), "--json"])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("weights", DISTILLED, ids=lambda weights: weights.name)
def test_fetched_distilled_weights_are_complete_and_recognized(repositories, tmp_path, weights):
    """One repository becomes a tree that `weights check` accepts. fetch.json says whose weights they are."""
    target = tmp_path / "ckpts"
    flags = ["--distilled", weights.name.lower(), "--from", str(repositories)]
    result = CliRunner().invoke(app, ["weights", "fetch", str(target), *flags])
    assert result.exit_code == 0, result.output
    assert not (target / "assets.mp4").exists()

    code, report = check(target)
    found = report["distilled"]
    assert report["problems"] == []
    assert code == 0
    assert found["name"] == weights.name
    assert (found["steps"], found["config"]) == (weights.steps, weights.config)
    assert weights.repository in found["by"]
    text = CliRunner().invoke(app, ["weights", "check", str(target)]).output
    assert f"--config {weights.config}" in " ".join(text.split())


@pytest.mark.parametrize(
    ("base", "dit", "expected"),
    [
        ("ckpts", None, None),
        ("ckpts", DIT, None),
        ("FastHunyuan", DIT, "FastHunyuan"),
        ("models--FastVideo--FastHunyuan/snapshots/0123", DIT, "FastHunyuan"),
        ("ckpts", "hunyuan_video_FastVideo_720_fp8_e4m3fn.safetensors", "FastHunyuan"),
        ("ckpts", "accvideo-t2v-5-steps_fp8_e4m3fn.safetensors", "AccVideo"),
        ("accvideo-tests/of/a/user/ckpts", DIT, None),
    ],
)
def test_names_of_folders_and_files_tell_distilled_weights(tmp_path, base, dit, expected):
    """Only the last folders of a path count: the rest of it says nothing about the weights."""
    found = recognize(tmp_path / base, dit and tmp_path / base / dit)
    assert (found and found.name) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("README.md", "---\nlicense: other\n---\n# FastHunyuan Model Card\n", "FastHunyuan"),
        ("README.md", "# HunyuanVideo\nSee also FastHunyuan.\n", None),
        ("README.md", " " * 10_000 + "# AccVideo", None),
        ("fetch.json", '{"aejion/AccVideo": {}}', "AccVideo"),
        ("fetch.json", "[", None),
    ],
)
def test_cards_and_fetch_records_tell_distilled_weights(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    found = recognize(tmp_path)
    assert (found and found.name) == expected


@pytest.mark.parametrize("weights", DISTILLED, ids=lambda weights: weights.name)
def test_the_shipped_config_of_distilled_weights_renders_them(weights):
    """Its steps are those of the weights, and its paths those of a fetch into the folder that its comment names."""
    config = load_config(str(shipped_configs()[weights.config]))
    folder = weights.name.lower()
    assert config.defaults.num_inference_steps == weights.steps
    assert config.model.options["model_base"] == folder
    assert config.model.options.get("dit_weight") == (weights.dit_weight and f"{folder}/{weights.dit_weight}")
    assert folder in LAYOUTS


def test_distilled_weights_have_one_layout_and_no_fp8(tmp_path):
    for flags in (["--fp8"], ["--layout", "diffusers"]):
        with pytest.raises(UserError, match="cannot be combined"):
            CliRunner().invoke(
                app, ["weights", "fetch", str(tmp_path), "--distilled", "accvideo", *flags], catch_exceptions=False
            )


def test_a_revision_of_another_repository_is_refused(tmp_path):
    with pytest.raises(UserError, match="FastVideo/FastHunyuan"):
        fetch(tmp_path, layout="fasthunyuan", revisions={"tencent/HunyuanVideo": "main"}, local=tmp_path)
