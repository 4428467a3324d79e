"""A node whose ffmpeg is broken, beside a healthy one, on a real cluster of two nodes with the fake engine (P5)."""

from __future__ import annotations

import json

import imageio_ffmpeg
import pytest

from tests.support.runs import command, finish, records, start, write_config, write_manifest

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
LISTS = f"""#!/bin/sh
case "$*" in *-encoders*) exec {FFMPEG} "$@";; esac
"""
BROKEN = {
    "at each encode": LISTS + "echo 'Illegal instruction' >&2; exit 132\n",
    "after its check": LISTS + f'case "$*" in *64x64*) exec {FFMPEG} "$@";; esac\necho "out of luck" >&2; exit 1\n',
}


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0.5, 0], ids=["decoders with GPUs", "decoders without GPUs"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_ffmpeg_on_a_node_quarantines_nothing(fleet, tmp_path, how, gpus):
    """P5: every sample is committed, and none has failed twice."""
    script = tmp_path / "ffmpeg"
    script.write_text(BROKEN[how])
    script.chmod(0o755)
    fleet.add_node(gpus=3, cpus=1, environment={"IMAGEIO_FFMPEG_EXE": str(script)})
    fleet.add_node(gpus=3, cpus=1)
    (tmp_path / "marks").mkdir()
    config = write_config(
        tmp_path,
        tmp_path / "marks",
        defaults={"height": 64, "width": 96},
        decoders={"gpus": gpus, "cpus": 0.5, "count": 2},
        groups={"count": 1},
    )
    manifest, output = write_manifest(tmp_path, [f"prompt {i}" for i in range(12)]), tmp_path / "out"
    code, text = finish(start(command(config, manifest, output, fleet.address)), timeout=200)
    assert code == 0, text
    found = records(output)
    assert len(found) == 12
    assert all([failure["kind"] for failure in record["history"]] in ([], ["INFRA"]) for record in found.values())
    excluded = json.loads((output / "summary.json").read_text())["excluded_nodes"]
    assert all("ffmpeg" in reason for reason in excluded.values())  # empty if the run ended before a second failure


@pytest.mark.slow
def test_a_run_whose_only_ffmpeg_is_missing_names_it(fleet, tmp_path):
    """P5, P6: nothing is quarantined; the run ends with the path of the ffmpeg, not with a fault of the output root."""
    fleet.add_node(gpus=3, environment={"IMAGEIO_FFMPEG_EXE": str(tmp_path / "absent")})
    (tmp_path / "marks").mkdir()
    config = write_config(tmp_path, tmp_path / "marks", decoders={"gpus": 0.5}, retries={"worker": 2})
    output = tmp_path / "out"
    code, text = finish(
        start(command(config, write_manifest(tmp_path, ["prompt 0"]), output, fleet.address)), timeout=200
    )
    assert code == 1
    assert f"The ffmpeg {tmp_path / 'absent'} does not exist" in text.splitlines()[-1]
    assert "output root cannot be written" not in text
    assert not list(output.glob("quarantine/*/*"))
