"""Micro-batches on a real Ray: a failure of one sample does not charge the others."""

from __future__ import annotations

import re

import pytest

from tests.support.runs import count, records, render, table, write_config, write_manifest

PICTURE = {"height": 64, "width": 64, "num_frames": 1, "num_inference_steps": 2, "negative_prompt": ""}
COUNT = 120
POISONED, KILLER = 60, 90  # late enough to meet a group that knows how quick such samples are


@pytest.mark.slow
def test_only_the_failing_sample_of_a_micro_batch_is_charged(ray_head, tmp_path, marks):
    """P1, P5: a poisoned sample and one that kills its group, each in a task of several. The task's failure is charged
    to no sample; all but the poisoned one are committed, and that one is quarantined after tries of its own.
    """
    prompts = [f"{i}" for i in range(COUNT)]
    prompts[POISONED], prompts[KILLER] = f"{POISONED} !nan-denoise", f"{KILLER} !kill-denoise-once"
    config = write_config(tmp_path, marks, defaults=PICTURE, output={"shard_size": 50})
    output = tmp_path / "out"
    code, text = render(config, write_manifest(tmp_path, prompts), output, ray_head[0])
    assert code == 3, text
    in_batches = re.findall(r"denoise-0\.\d+ with (s\d+) \(one of \d+ samples of its task\): ", text)
    assert {f"s{POISONED}", f"s{KILLER}"} <= set(in_batches), text
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
