"""The README's first command, run as a user runs it: a local Ray, the toy checkpoint, the shipped manifest."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import imageio_ffmpeg
import numpy as np
import pytest

from hv_batch.toy.accuracy import accuracy_by_attribute
from hv_batch.toy.scorer import score
from hv_batch.toy.world import Camera, Motion, Pattern, Scene, Shape, Size, Thing
from tests.support.runs import dataset, finish, records, start, table

DEADLINE_S = 240


def one(shape, colour, size=Size.MEDIUM, motion=Motion.STILL):
    return Thing(Shape(shape), colour, size, motion)


# What the prompts of the shipped manifest say; the row without guidance is not checked.
SCENES = {
    "circle-crosses": Scene((one("circle", "red", motion=Motion.RIGHT),), "blue"),
    "star-rises": Scene((one("star", "red", Size.LARGE, Motion.UP),), "yellow"),
    "triangle-falls": Scene((one("triangle", "green", motion=Motion.DOWN),), "white"),
    "square-drifts": Scene((one("square", "black", Size.SMALL, Motion.LEFT),), "green"),
    "disc-rests": Scene((one("circle", "white", Size.LARGE),), "green", Pattern.STRIPED),
    "pan-right": Scene((one("triangle", "yellow"),), "purple", Pattern.STRIPED, Camera.PAN_RIGHT),
    "pan-left": Scene((one("star", "black", Size.LARGE),), "green", Pattern.STRIPED, Camera.PAN_LEFT),
    "up-and-down": Scene((one("circle", "red", motion=Motion.UP), one("square", "yellow", motion=Motion.DOWN)), "blue"),
    "still-life": Scene((one("star", "green", Size.SMALL), one("circle", "orange", Size.LARGE)), "white"),
    "star-glides": Scene((one("star", "blue", motion=Motion.RIGHT),), "orange"),
    "picture-v0": Scene((one("star", "orange", Size.LARGE),), "blue"),
    "picture-v1": Scene((one("star", "orange", Size.LARGE),), "blue"),
}


@pytest.fixture(scope="module")
def home(ray_environment, tmp_path_factory):
    """An empty cache folder, shared by the demos of this file."""
    folder = tmp_path_factory.mktemp("demo")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    yield folder
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


def demo(output):
    return start([sys.executable, "-m", "hv_batch", "demo", "--output", str(output)])


@pytest.fixture(scope="module")
def finished(home):
    code, text = finish(demo(home / "first"), timeout=DEADLINE_S)
    assert code == 0, text
    return home / "first", text


def test_the_demo_renders_its_manifest(finished):
    """The README's promise: every row of the shipped manifest ends as a video (one as an image) with its metadata."""
    output, text = finished
    found = records(output)
    assert len(found) == 13
    assert sorted(record["file"].rpartition(".")[2] for record in found.values()) == ["mp4"] * 11 + ["png"] * 2
    assert all({"imageio-ffmpeg", "pillow"} <= record["versions"].keys() for record in found.values()), (
        "what coded them"
    )
    assert sum(record["params"]["cfg_scale"] > 1 for record in found.values()) == 12
    assert {"picture-v0", "picture-v1"} <= set(found)
    assert all(
        record["produced"] == {side: record["params"][side] for side in ("num_frames", "height", "width")}
        for record in found.values()
    )
    assert table(output)[0]["category"] == "motion", "further columns are carried into the metadata"
    assert str(output) in text
    assert (output / "report" / "index.html").as_uri() in text
    assert re.search(r"metrics for Prometheus: http://[^ ]+:\d+/metrics", text), "in a local run as well"


def test_the_videos_depend_on_their_prompts(finished):
    """No two of the demo's videos have the same frames."""
    found = records(finished[0]).values()
    assert len({record["frames_sha256"] for record in found}) == len(found)


def test_the_videos_show_what_their_prompts_say(finished):
    """The videos show what their prompts say, as far as the small toy can."""
    output, _ = finished
    found = records(output)
    scores = {name: score(scene, shown(output / found[name]["file"])) for name, scene in SCENES.items()}
    assert accuracy_by_attribute(scores.values())["all"] >= 0.9, scores


def shown(file):
    """The frames [F, H, W, 3] of a media file."""
    reader = imageio_ffmpeg.read_frames(str(file))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


@pytest.mark.slow
def test_a_killed_demo_goes_on_to_the_same_bytes(finished, home):
    """P2, P3: SIGKILL while it renders, the same command again, and the dataset is that of an undisturbed run."""
    output = home / "second"
    victim = demo(output)
    deadline = time.monotonic() + DEADLINE_S
    while len(records(output)) < 4:
        assert time.monotonic() < deadline
        assert victim.poll() is None, finish(victim)[1]
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    finish(victim)
    assert not (output / "_SUCCESS").exists()
    code, text = finish(demo(output), timeout=DEADLINE_S)
    assert code == 0, text
    assert dataset(output) == dataset(finished[0])


def test_a_second_demo_renders_nothing(finished):
    """P2: a second run of the demo reports that there is nothing to render."""
    before = dataset(finished[0])
    code, text = finish(demo(finished[0]), timeout=DEADLINE_S)
    assert code == 0, text
    assert "nothing to render" in text
    assert dataset(finished[0]) == before
