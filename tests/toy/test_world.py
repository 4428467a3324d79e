"""hv_batch.toy.world, .captions and .scorer: the scorer reads drawn scenes back, also from blurred and noisy frames."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from hv_batch.toy.captions import GROUNDS, NOUNS, caption, captioned_scenes, is_held_out
from hv_batch.toy.scorer import read_scene, score
from hv_batch.toy.tokenizers import CAPTION_WORDS, WORDS
from hv_batch.toy.world import COLOURS, Camera, Motion, Pattern, Scene, Shape, Size, Thing, draw

SCENE = Scene((Thing(Shape.STAR, "red", Size.LARGE, Motion.UP),), "blue")
things = st.builds(Thing, st.sampled_from(Shape), st.just("red"), st.sampled_from(Size), st.sampled_from(Motion))


def degraded(frames: np.ndarray, seed: int) -> np.ndarray:
    """Blur the frames over about three pixels and add noise: a lower quality than that of a small model."""
    noise = np.random.default_rng(seed).normal(0, 12, frames.shape)
    blurred = [np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(1.5))) for frame in frames]
    return np.clip(np.stack(blurred) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("num_frames", "height", "width"), [(9, 128, 128), (9, 96, 160), (1, 128, 128)])
@pytest.mark.parametrize("degrade", [lambda frames, _: frames, degraded], ids=["clean", "degraded"])
def test_all_attributes_are_read_back(num_frames, height, width, degrade):
    """The scorer reads every attribute of a caption from the pixels, for any jitter."""
    rng = np.random.default_rng(7)
    for number, (scene, _) in enumerate(islice(captioned_scenes(11, num_frames, held_out=False), 8)):
        result = score(scene, degrade(draw(scene, num_frames, height, width, rng), number))
        assert all(result.right.values()), (scene, result.right)
        assert result.share == 1


@settings(max_examples=25)
@given(thing=things, other=things)
def test_wrong_attributes_are_detected(thing, other):
    """An attribute is scored as right only if the video and the expected scene agree in it."""
    frames = draw(Scene((other,), "blue"), 5, 64, 64)
    right = score(Scene((thing,), "blue"), frames).right
    assert right["background"]
    assert right["colour"]
    for what in ("shape", "size", "motion"):
        assert right[what] == (getattr(thing, what) == getattr(other, what))


@pytest.mark.parametrize("pixels", ["noise", "grey", "one colour"])
def test_frames_without_a_thing_score_nothing(pixels):
    """Output of an untrained model is neither scored as right nor an error."""
    rng = np.random.default_rng(0)
    frames = {
        "noise": rng.integers(0, 256, (5, 64, 64, 3), np.uint8),
        "grey": np.full((5, 64, 64, 3), 128, np.uint8),
        "one colour": np.full((5, 64, 64, 3), COLOURS["blue"], np.uint8),
    }[pixels]
    assert not any(score(SCENE, frames).right[what] for what in ("shape", "colour", "size", "motion"))


def test_a_turning_camera_is_distinguished_from_a_moving_thing():
    """If stripes and thing move together, the camera turns in the opposite direction and the thing does not move."""
    scene = Scene((Thing(Shape.CIRCLE, "red", Size.MEDIUM, Motion.STILL),), "white", Pattern.STRIPED, Camera.PAN_LEFT)
    assert read_scene(draw(scene, 17, 96, 128)) == scene


def test_captions_have_no_unknown_words():
    """The vocabulary of the towers has every word of every wording; unknown words would be encoded as bytes."""
    known = set(f"{WORDS} {CAPTION_WORDS}".lower().split())
    for num_frames in (1, 33):
        for _, text in islice(captioned_scenes(1, num_frames, held_out=False), 400):
            assert {word.strip(".,:").lower() for word in text.replace("-", " ").split()} <= known, text


def test_captions_describe_their_scene():
    """Every wording names shape, colours and pattern, so that a caption determines what the scorer reads."""
    rng = np.random.default_rng(2)
    texts = [caption(SCENE, rng, 33).lower() for _ in range(60)]
    assert all("red" in text and "blue" in text and any(noun in text for noun in NOUNS[Shape.STAR]) for text in texts)
    assert not any("strip" in text for text in texts)
    assert len(set(texts)) > len(GROUNDS) * 10


def test_held_out_scenes_are_excluded_from_training():
    """The combinations of shape, colour and background in the evaluation do not occur in the training."""
    for held_out in (True, False):
        scenes = [scene for scene, _ in islice(captioned_scenes(5, 33, held_out=held_out), 100)]
        assert all(is_held_out(scene) == held_out for scene in scenes)
    every = [
        Scene((Thing(shape, colour, Size.SMALL, Motion.STILL),), ground)
        for shape in Shape
        for colour in COLOURS
        for ground in COLOURS
    ]
    assert 0.03 < sum(map(is_held_out, every)) / len(every) < 0.15
