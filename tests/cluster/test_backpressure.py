"""Stages of unequal speed: a slow stage slows those before it, or gets more workers if its pool is `auto`."""

from __future__ import annotations

import pytest

from tests.support.runs import (
    PROMPTS,
    command,
    count,
    dataset,
    finish,
    records,
    render,
    start,
    videos,
    wait_for,
    write_config,
    write_manifest,
)

STORE_BYTES = 80 * 2**20
SIDE = 4096  # an image whose latents take as many bytes as it has pixels, 16 MiB: five of them would be spilled to disk


def images(folder):
    """Config and manifest of four images, for two groups and a decoder on a node of three GPUs."""
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    config = write_config(
        folder,
        marks,
        defaults={"height": SIDE, "width": SIDE, "num_frames": 1, "num_inference_steps": 1},
        parallel={"ulysses_degree": 1},
        groups={"count": 2},
        encoders={"gpus": 0.5},
        decoders={"gpus": 0.5},
    )
    return config, write_manifest(folder, PROMPTS[:4])


@pytest.fixture(scope="module")
def held(fleet_head, tmp_path_factory):
    """A run whose first decode is held until nothing else moves: its folder, and the bytes of the node's object store
    that were then used, and ever spilled.
    """
    folder = tmp_path_factory.mktemp("held")
    node = fleet_head.add_node(gpus=3, store_bytes=STORE_BYTES)
    config, manifest = images(folder)
    marks = folder / "marks"
    (marks / "hold-decodes").touch()
    driver = start(command(config, manifest, folder / "out", fleet_head.address))
    wait_for(lambda: count(marks, "denoised").total() >= 2 and count(marks, "decoded"), "two denoises and a decode")
    used = fleet_head.object_store(node).object_store_bytes_used
    (marks / "hold-decodes").unlink()
    code, text = finish(driver)
    assert code == 0, text
    spilled = fleet_head.object_store(node).spilled_bytes_total
    fleet_head.clear()
    return folder, used, spilled


@pytest.mark.slow
def test_a_held_decoder_stops_the_groups_before_the_store_is_full(held):
    """P7: two groups make one sample each, which is all that their shares of the store hold, and wait; no byte is
    spilled; then everything is committed.
    """
    folder, used, spilled = held
    assert len(records(folder / "out")) == 4
    assert SIDE**2 <= used < 3 * SIDE**2
    assert spilled == 0
    began = (folder / "marks" / "trace").read_text().split()
    lead = [began[: i + 1].count("denoising") - began[: i + 1].count("decoded") for i in range(len(began))]
    assert max(lead) == 2, f"a denoise whose result had no room: {began}"


@pytest.mark.slow
def test_groups_that_had_to_wait_render_the_same(held, ray_head, tmp_path):
    """P3, P7: the output root equals that of a run without limits, byte for byte."""
    code, text = render(*images(tmp_path), tmp_path / "out", ray_head[0])
    assert code == 0, text
    assert dataset(held[0] / "out") == dataset(tmp_path / "out")


@pytest.mark.slow
def test_an_auto_pool_grows_until_the_groups_need_not_wait(ray_head, tmp_path, marks, expected):
    """Stages, P3: one decoder that takes several times as long as a denoise is joined by others, which is
    reported with the reason; every sample is committed, and its bytes are the same.
    """
    config = write_config(
        tmp_path,
        marks,
        {"decode_seconds": 1.2},
        parallel={"ulysses_degree": 1},
        groups={"count": 2},
        decoders={"count": "auto"},
    )
    output = tmp_path / "out"
    # More than the queue holds: groups that were through would be released, and need no decoders any more.
    manifest = write_manifest(tmp_path, [f"prompt {i}" for i in range(12)])
    driver = start(command(config, manifest, output, ray_head[0]))
    text = ""
    while "decoder(s) instead of 1: a decode takes " not in text:
        line = driver.stdout.readline()
        assert line, f"the pool never grew:\n{text}"
        text += line
    (marks / "hold-decodes").touch()  # so that the new ones, however late they come, find something to do
    wait_for(lambda: len(count(marks, "decoded")) > 1, "a second decoder at work")
    (marks / "hold-decodes").unlink()
    code, rest = finish(driver)
    assert code == 0, text + rest
    assert len(records(output)) == 12
    assert expected <= videos(output).items(), "ten of them"
