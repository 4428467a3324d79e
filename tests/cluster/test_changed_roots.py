"""A finished root goes on: its manifest has grown, and samples of it were withdrawn."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.runs import PROMPTS, count, dataset, finish, records, render, start, table, write_config
from tests.support.runs import write_manifest as write_rows

WITHDRAWN = "s01"


def hv_batch(*arguments) -> tuple[int, str]:
    return finish(start([sys.executable, "-m", "hv_batch", *map(str, arguments)]))


@pytest.mark.slow
def test_a_grown_manifest_continues_a_root_without_its_withdrawn_sample(ray_head, tmp_path, marks):
    """P2: only appended rows are rendered, shards that stay as they are keep their bytes, and a withdrawn sample is
    never rendered again, neither by the run that continues the root nor by a later resume.
    """
    config, output = write_config(tmp_path, marks), tmp_path / "out"
    code, text = render(config, write_rows(tmp_path, PROMPTS[:6]), output, ray_head[0])
    assert code == 0, text
    code, text = hv_batch("withdraw", output, WITHDRAWN, "--reason", "rights")
    assert code == 0, text
    before = dataset(output)
    code, text = render(config, write_rows(tmp_path, PROMPTS), output, ray_head[0])
    assert code == 0, text
    code, text = hv_batch("resume", output, "--address", ray_head[0])
    assert code == 0, text
    assert count(marks, "denoised") == dict.fromkeys(PROMPTS, 1)
    assert WITHDRAWN not in records(output)
    rows = [row["id"] for shard in range(3) for row in table(output, shard)]
    assert rows == [f"s{i:02d}" for i in range(10) if f"s{i:02d}" != WITHDRAWN]
    after = dataset(output)
    assert {name: after[name] for name in before if "shard-00000" in name or name.endswith(".mp4")} == {
        name: data for name, data in before.items() if "shard-00000" in name or name.endswith(".mp4")
    }
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["committed"], summary["withdrawn"]) == (9, 1)
    assert (output / "_SUCCESS").exists()
