"""Stations of unequal speed: a slow one slows those before it, or is given more workers where its pool is `auto`."""

from __future__ import annotations

import time

from tests.cluster.runs import command, count, finish, records, start, write_config, write_manifest

DEADLINE_S = 120  # of a wait; a machine that is busy with other things takes its time to start a worker
STORE_BYTES = 80 * 2**20
SIDE = 4096  # an image whose latents take as many bytes as it has pixels, 16 MiB: five of them would be spilled to disk


def wait_for(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never saw {what}"
        time.sleep(0.05)


def test_a_held_decoder_stops_the_groups_before_the_store_is_full(fleet, tmp_path, marks):
    """P7: two groups make one sample each, which is all that their shares of the store hold, and wait; no byte is
    spilled; then everything is committed.
    """
    node = fleet.add_node(gpus=3, store_bytes=STORE_BYTES)
    config = write_config(
        tmp_path,
        marks,
        defaults={"height": SIDE, "width": SIDE, "num_frames": 1, "num_inference_steps": 1},
        parallel={"ulysses_degree": 1},
        groups={"count": 2},
        encoders={"gpus": 0.5},
        decoders={"gpus": 0.5},
    )
    (marks / "hold-decodes").touch()
    output = tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, [f"prompt {i}" for i in range(4)]), output, fleet.address))
    wait_for(lambda: count(marks, "denoised").total() >= 2 and count(marks, "decoded"), "two denoises and a decode")
    held = fleet.object_store(node).object_store_bytes_used
    (marks / "hold-decodes").unlink()
    code, text = finish(driver)
    assert code == 0, text
    assert len(records(output)) == 4
    assert SIDE**2 <= held < 3 * SIDE**2
    assert fleet.object_store(node).spilled_bytes_total == 0
    began = (marks / "trace").read_text().split()
    lead = [began[: i + 1].count("denoising") - began[: i + 1].count("decoded") for i in range(len(began))]
    assert max(lead) == 2, f"a denoise that nobody had room for: {began}"


def test_an_auto_pool_grows_until_the_groups_need_not_wait(ray_head, tmp_path, marks):
    """Stations: one decoder that takes several times as long as a denoise is joined by others, which is said with the
    reason, and every sample is committed.
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
