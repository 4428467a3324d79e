"""Loading a model needs no anonymous host memory of its size: the weights stay in the shared page cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.repository import ROOT

# Runs in a separate process, because free heap memory of this process would hide allocations.
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.architecture import DiTConfig
from hv_batch.engine.dit.model import HYVideoDiT
from hv_batch.engine.checkpoint.loading import load_dit
from hv_batch.weights.conversion import Recipe, convert

folder = Path(sys.argv[1])
CONFIG = DiTConfig(
    hidden_size=1024, heads_num=8, mm_double_blocks_depth=3, mm_single_blocks_depth=7, text_states_dim=1024
)

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def growth(fp8="none", dtype=torch.bfloat16, **tree):
    before = anonymous()
    model = load_dit(CheckpointTree(folder, **tree), CONFIG, "sdpa", dtype, torch.device("cpu"), fp8)
    sum(float(p.view(torch.uint8).view(-1)[::4096].sum()) for p in model.parameters() if p.numel())  # touch every page
    return anonymous() - before

with torch.device("meta"):
    shapes = {name: tensor.shape for name, tensor in HYVideoDiT(CONFIG).state_dict().items()}
pt = folder / "mp_rank_00_model_states.pt"
torch.save({"module": {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}}, pt)

base, peak = anonymous(), 0
def watch(_):
    global peak
    peak = max(peak, anonymous() - base)
convert(pt, folder / "bf16", Recipe(shard_bytes=200 * 10**6), watch)
convert(pt, folder / "fp8", Recipe(fp8=True), watch)
sizes = {"file": pt.stat().st_size, "convert": peak}
sizes["pt"] = growth(dit_weight=pt)
sizes["safetensors"] = growth(dit_weight=folder / "bf16")
sizes["fp8"] = growth("storage", dit_weight=folder / "fp8")
sizes["cast"] = growth(dtype=torch.float16, dit_weight=folder / "bf16")
print(json.dumps(sizes))
"""


@pytest.mark.slow  # it writes 1.5 GB
def test_a_rank_needs_no_anonymous_memory_of_the_models_size(tmp_path):
    """26 GB of weights must not take 26 GB of private memory per rank; a conversion needs memory for a few tensors.

    The bound is a tenth of a 500 MB file. A cast to another dtype, which needs private memory, validates the
    measurement.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert sizes["file"] > 450e6
    for way in ("pt", "safetensors", "fp8"):
        assert sizes[way] < 0.1 * sizes["file"], sizes
    assert sizes["convert"] < 0.25 * sizes["file"], sizes  # a Linear in fp32 and its quotients take 29 MB each
    assert sizes["cast"] > 0.5 * sizes["file"], sizes
