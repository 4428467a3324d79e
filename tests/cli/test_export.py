"""`hv-batch export` as a command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hv_batch.cli.main import app
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.small_runs import run_small, some_samples


@pytest.fixture
def root(tmp_path: Path) -> str:
    run_small(Store(str(tmp_path / "root")), some_samples(6))
    return str(tmp_path / "root")


def call(*arguments: str):
    return CliRunner().invoke(app, ["export", *arguments])


def test_it_reports_what_it_has_written_as_json(root, tmp_path):
    result = call(root, "--vbench", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["schema"], report["mode"], report["links"]) == ("hv_batch/export/1", "vbench", 6)


def test_it_says_how_to_push_to_the_hub_and_the_command_exists(root, tmp_path):
    """The command that the message names is one of the installed `hf`."""
    result = call(root, "--hub", str(tmp_path / "out"))
    assert f"hf upload USER/NAME {tmp_path / 'out'} . --repo-type dataset" in result.stdout
    options = subprocess.run(["hf", "upload", "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "--repo-type" in options


@pytest.mark.parametrize("flags", [[], ["--vbench", "a", "--hub", "b"], ["--hub", "b", "--prompt-column", "x"]])
def test_one_mode_must_be_chosen(root, flags):
    result = call(root, *flags)
    assert isinstance(result.exception, UserError)
    assert "--vbench" in str(result.exception)
