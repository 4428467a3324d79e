"""`hv-batch run --dry-run`: every check of a run, and nothing that stays."""

from __future__ import annotations

import pytest

from tests.support.cli_calls import files, json_of, run_main
from tests.support.runs import write_config, write_manifest


@pytest.fixture
def command(tmp_path):
    (tmp_path / "marks").mkdir()
    config = write_config(tmp_path, tmp_path / "marks")
    manifest = write_manifest(tmp_path, ["a cat", "a dog"])
    return ["run", "--config", config, "--manifest", manifest, "--output", tmp_path / "out", "--dry-run"]


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(command, tmp_path):
    before = files(tmp_path)
    code, stdout, _ = run_main(*command)
    assert code == 0
    assert f"{tmp_path}/out has no run yet; this one would start there" in stdout
    assert "2 rows, 2 samples in 1 shards (2 of 64x64x9)" in stdout
    assert "minimum: a group of 2 rank(s) on one node with" in stdout
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reports_the_problems_of_a_run(command, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": ""}\n')
    code, result = json_of(*command, "--manifest", tmp_path / "bad.jsonl", "parallel.ulysses_degree=5")
    assert (code, result["schema"]) == (1, "hv_batch/error/1")
    assert "does not divide 24" in result["error"]
    assert "row 1: prompt" in result["error"]


def test_a_dry_run_on_a_cluster_asks_whether_ray_answers(command):
    code, _, stderr = run_main(*command, "--address", "127.0.0.1:9")
    assert code == 1
    assert "No Ray cluster answers at 127.0.0.1:9" in stderr


def test_a_dry_run_of_a_part_selects_as_the_run_does(command):
    code, result = json_of(*command, "--limit", "1")
    assert (code, result["schema"], result["samples"], result["selected"]) == (0, "hv_batch/dry-run/1", 2, 1)
    assert result["state"] == "new"
