"""`hv-batch bench engine` on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from hv_batch.cli.main import app

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_stage_is_timed_with_its_memory():
    """The report has the time of every stage and its peak memory of the CUDA allocator."""
    result = CliRunner().invoke(app, ["bench", "engine", "--preset", "toy", "--device", "cuda", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["machine"].startswith("cuda")
    assert [stage["stage"] for stage in report["stages"]] == ["text", "dit", "vae"]
    assert all(stage["best_s"] > 0 and stage["peak_gb"] > 0 for stage in report["stages"])
