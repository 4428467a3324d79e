"""P2: `resume ROOT` needs nothing but the root while `plan/` is complete (E5)."""

from __future__ import annotations

import os
import sys

import pytest

from tests.support.repository import ROOT
from tests.support.runs import count, finish, records, render, start, write_config, write_manifest

PROMPTS = [f"prompt {i}" for i in range(6)]


def hv_batch(*arguments, **options) -> tuple[int, str]:
    return finish(start([sys.executable, "-m", "hv_batch", *map(str, arguments)], **options))


@pytest.fixture
def unfinished(ray_head, tmp_path, marks):
    """A root with one of two shards; the manifest was given relative to a folder, and is gone."""
    config, output = write_config(tmp_path, marks), tmp_path / "out"
    manifest = write_manifest(tmp_path, PROMPTS)
    relative = os.path.relpath(manifest, ROOT)
    code, text = render(config, relative, output, ray_head[0], "--shards", "0")
    assert code == 0, text
    manifest.unlink()
    return output


@pytest.mark.slow
def test_a_resume_needs_no_manifest(unfinished, ray_head, marks):
    code, text = hv_batch("resume", unfinished, "--address", ray_head[0])
    assert code == 0, text
    assert count(marks, "denoised") == dict.fromkeys(PROMPTS, 1)
    assert (unfinished / "_SUCCESS").exists()
    next(unfinished.glob("data/*/s01-*")).write_bytes(b"?")
    code, text = hv_batch("verify", unfinished, "--repair", "--address", ray_head[0])
    assert code == 0, text
    assert len(records(unfinished)) == len(PROMPTS)


@pytest.mark.slow
def test_without_plan_and_manifest_nothing_is_removed(unfinished, ray_head, tmp_path):
    """The message names what is missing and how to give the manifest's new location."""
    next((unfinished / "plan").glob("*.parquet")).unlink()
    video = next(unfinished.glob("data/*/s01-*"))
    video.write_bytes(b"?")
    before = sorted(unfinished.rglob("*"))
    code, text = hv_batch("verify", unfinished, "--repair", "--address", ray_head[0])
    assert code == 1, text
    assert "Nothing was removed" in text
    assert "is missing or was changed" in text
    assert "Traceback" not in text
    assert sorted(unfinished.rglob("*")) == before
    code, text = hv_batch("resume", unfinished, "--address", ray_head[0])
    assert code == 1, text
    assert "the copy of the manifest in plan/ is missing or damaged" in text
    assert "--manifest" in text
    (tmp_path / "moved").mkdir()
    moved = write_manifest(tmp_path / "moved", PROMPTS)
    code, text = hv_batch("resume", unfinished, "--manifest", moved, "--address", ray_head[0])
    assert code == 0, text
