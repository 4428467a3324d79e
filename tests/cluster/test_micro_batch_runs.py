"""Micro-batches on a real Ray: a failure of one sample does not charge the others."""

from __future__ import annotations

import re

from tests.support.runs import count, records, render, table, write_config, write_manifest

PICTURE = {"height": 64, "width": 64, "num_frames": 1, "num_inference_steps": 2, "negative_prompt": ""}
COUNT = 120
POISONED, KILLER = 60, 90  # late enough to meet a group that knows how quick such samples are


def test_in_a_parcel_only_the_one_to_blame_is_charged(ray_head, tmp_path, marks):
    """P1, P5: a poisoned sample and one that kills its group, each amid a task of several: nobody is charged for what
    the task met, all but the poisoned one are committed, and that is quarantined after its own tries alone.
    """
    prompts = [f"{i}" for i in range(COUNT)]
    prompts[POISONED], prompts[KILLER] = f"{POISONED} !nan-denoise", f"{KILLER} !kill-denoise-once"
    config = write_config(tmp_path, marks, defaults=PICTURE, output={"shard_size": 50})
    output = tmp_path / "out"
    code, text = render(config, write_manifest(tmp_path, prompts), output, ray_head[0])
    assert code == 3, text
    together = [match.split(", ") for match in re.findall(r"denoise-0\.\d+ with (s[s\d, ]+): ", text)]
    assert any(f"s{POISONED}" in task and len(task) > 1 for task in together), text
    assert any(f"s{KILLER}" in task and len(task) > 1 for task in together), text
    committed, quarantined = records(output), records(output, "quarantine")
    assert committed.keys() == {f"s{i:02d}" for i in range(COUNT)} - {f"s{POISONED}"}
    assert {key: record["attempts"] for key, record in committed.items()} == dict.fromkeys(committed, 1)
    assert list(quarantined) == [f"s{POISONED}"]
    assert [failure["kind"] for failure in quarantined[f"s{POISONED}"]["history"]] == ["POISON", "POISON"]
    assert [row["id"] for shard in range(3) for row in table(output, shard)] == sorted(committed, key=_number)
    assert not list((output / "latents").rglob("*.safetensors"))
    assert sum(count(marks, "decoded").values()) == len(committed)


def _number(key: str) -> int:
    return int(key[1:])
