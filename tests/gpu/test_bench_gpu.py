"""The bench on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from hv_batch.cli.main import app

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_every_stage_is_timed_with_its_memory():
    """The same command on the device that is there; memory is that of the CUDA allocator."""
    result = CliRunner().invoke(app, ["bench", "engine", "--preset", "toy", "--device", "cuda", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["machine"].startswith("cuda")
    assert [report["stage"] for report in found["stages"]] == ["text", "dit", "vae"]
    assert all(report["best_s"] > 0 and report["peak_gb"] > 0 for report in found["stages"])
