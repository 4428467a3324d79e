"""Runs with LoRAs on Ray, with the real engine at toy width."""

from __future__ import annotations

import json

import pytest
import yaml

from hv_batch.architecture import DiTConfig
from hv_batch.job.config.run_config import load_config
from hv_batch.runtime.render import render
from hv_batch.runtime.run_end import ExitCode
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from tests.support.lora_files import official, random_adapter, write
from tests.support.repository import CONFIGS
from tests.support.runs import records, table, videos

SMALL = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "cfg_scale": 1.0}
LORAS = ["film", "none", "film:0.3,grain", None, "film", "none"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_row_n_has_the_bytes_of_the_same_row_rendered_alone(ray_environment, tmp_path):
    """P3: rows with other LoRAs before it change no byte; the default set applies to rows without the column."""
    config = yaml.safe_load((CONFIGS / "demo_cpu.yaml").read_text())
    files = {
        name: {
            "path": str(write(tmp_path / f"{name}.safetensors", official(random_adapter(DiTConfig(**TOY_DIT), seed))))
        }
        for seed, name in enumerate(("film", "grain"))
    }
    config["model"]["options"] |= {"model_base": str(write_toy_checkpoint(tmp_path / "toy"))}
    config["model"]["loras"] = files
    config["defaults"] = SMALL | {"lora": "grain:0.5"}
    config["parallel"]["ulysses_degree"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"id": f"s{i}", "prompt": f"prompt {i}", **({"lora": lora} if lora else {})} for i, lora in enumerate(LORAS)
    ]

    def run(name, rows):
        manifest = tmp_path / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = render(load_config(str(tmp_path / "config.yaml")), str(manifest), str(tmp_path / name), address="local")
        assert code is ExitCode.COMMITTED
        return tmp_path / name

    together, alone = run("together", rows), run("alone", [rows[2]])
    (file,) = videos(alone)
    assert videos(together)[file] == videos(alone)[file]
    assert len(set(videos(together).values())) == len(rows)
    chosen = [records(together)[row["id"]]["params"].get("lora") for row in rows]
    assert chosen == ["film", None, "film:0.3,grain", "grain:0.5", "film", None]
    assert [row["lora"] for row in table(together)] == ["film", None, "film:0.3,grain", "grain:0.5"]
    identity = json.loads((together / "run.json").read_text())["identity"]["model"]["loras"]
    assert identity.keys() == {"film", "grain"}
