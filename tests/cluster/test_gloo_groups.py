"""Groups of the real engine over gloo, in which one rank raises, dies or hangs."""

from __future__ import annotations

import pytest
import yaml

from hv_batch.toy.checkpoint import write_toy_checkpoint
from tests.support.faulty_engine import FAULTY_STEP
from tests.support.repository import ROOT
from tests.support.runs import command, dataset, finish, records, start, write_manifest

TROUBLES = {"raise": 1, "kill": 2, "hang": 3}  # of which rank
PROMPTS = [f"fox !{what}-{rank}" for what, rank in TROUBLES.items()]
STEPS = 8
RUN_S = 400  # a busy machine takes its time to start twelve ranks


def group_config(folder, base, marks, step_cache):
    """Four ranks, Ulysses 2 x ring 2, a checkpoint every step; timeouts.stall_s is too long to detect a hang."""
    config = yaml.safe_load((ROOT / "configs" / "fake_gpus_8rank.yaml").read_text())
    config["model"]["engine"] = "tests.support.faulty_engine:FaultyVideo"
    video = config["model"]["options"] | {"model_base": str(base), "step_cache": step_cache}
    config["model"]["options"] = {"video": video, "marks": str(marks), "step_seconds": 0.5, "patience_s": 15.0}
    config["defaults"] |= {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": STEPS}
    config["parallel"] |= {"ulysses_degree": 2, "ring_degree": 2}
    config["groups"] |= {"checkpoint_every": 1}
    config["timeouts"] |= {"stall_s": 3600}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step_cache", [None, {"kind": "schedule", "computed": 4, "of": STEPS}], ids=["all", "cache"])
def test_a_group_that_raises_dies_or_hangs_renders_the_same(ray_head, tmp_path, step_cache):
    """P3, P4, P5: one rank of four raises while its peers wait for it in a collective, one dies by SIGKILL, one hangs
    by SIGSTOP and is detected because its own steps stop. Each costs one rebuild. A sample that was not refused resumes
    from its last step checkpoint, and the dataset equals that of an undisturbed run, byte for byte.
    """
    base, manifest = write_toy_checkpoint(tmp_path / "toy"), write_manifest(tmp_path, PROMPTS)
    marks = tmp_path / "marks"
    marks.mkdir()
    config = group_config(tmp_path, base, marks, step_cache)
    code, text = finish(start(command(config, manifest, tmp_path / "out", ray_head[0])), RUN_S)
    assert code == 0, text
    assert {path.name for path in marks.iterdir()} == {f"once-{what}" for what in TROUBLES}
    code, text = finish(start(command(config, manifest, tmp_path / "undisturbed", ray_head[0])), RUN_S)
    assert code == 0, text
    assert dataset(tmp_path / "out") == dataset(tmp_path / "undisturbed")
    found = records(tmp_path / "out")
    assert [[failure["kind"] for failure in found[key]["history"]] for key in sorted(found)] == [
        ["POISON"],
        ["INFRA"],
        ["INFRA"],
    ]
    assert "made to fail on rank 1" in found["s00"]["history"][0]["message"]
    assert "no progress for" in found["s02"]["history"][0]["message"]
    resumed = [found[key]["places"]["denoise"].get("resumed_from_step") for key in sorted(found)]
    assert resumed[0] is None, "what led to an error of the sample is not trusted"
    # A predicted step needs no other rank: rank 0 goes on to the next computed step, the last one here.
    last = FAULTY_STEP if step_cache is None else STEPS - 1
    assert all(step in range(1, last + 1) for step in resumed[1:]), resumed
    computed = [found[key]["places"]["denoise"].get("computed_steps") for key in sorted(found)]
    assert computed == [step_cache and 4] * len(PROMPTS)
