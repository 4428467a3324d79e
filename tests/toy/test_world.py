"""The toy world and its scorer: what is drawn is what is read back, also from blurred and noisy frames."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from hv_batch.toy.captions import GROUNDS, NOUNS, caption, is_held_out, told_scenes
from hv_batch.toy.scorer import read_scene, score
from hv_batch.toy.tokenizers import CAPTION_WORDS, WORDS
from hv_batch.toy.world import COLOURS, Camera, Motion, Pattern, Scene, Shape, Size, Thing, draw

SCENE = Scene((Thing(Shape.STAR, "red", Size.LARGE, Motion.UP),), "blue")
things = st.builds(Thing, st.sampled_from(Shape), st.just("red"), st.sampled_from(Size), st.sampled_from(Motion))


def spoilt(frames: np.ndarray, seed: int) -> np.ndarray:
    """Blurred over about three pixels, with noise: worse than what a small model shows."""
    noise = np.random.default_rng(seed).normal(0, 12, frames.shape)
    blurred = [np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(1.5))) for frame in frames]
    return np.clip(np.stack(blurred) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("num_frames", "height", "width"), [(9, 128, 128), (9, 96, 160), (1, 128, 128)])
@pytest.mark.parametrize("spoil", [lambda frames, _: frames, spoilt], ids=["clean", "spoilt"])
def test_all_attributes_are_read_back(num_frames, height, width, spoil):
    """Every attribute that a caption tells is read from the pixels, whatever jitter they were drawn with."""
    rng = np.random.default_rng(7)
    for number, (scene, _) in enumerate(islice(told_scenes(11, num_frames, held_out=False), 8)):
        found = score(scene, spoil(draw(scene, num_frames, height, width, rng), number))
        assert all(found.right.values()), (scene, found.right)
        assert found.share == 1


@settings(max_examples=25)
@given(thing=things, other=things)
def test_a_wrong_attribute_is_seen(thing, other):
    """The scorer can say no: a video scores only what it has in common with the scene it is held against."""
    frames = draw(Scene((other,), "blue"), 5, 64, 64)
    right = score(Scene((thing,), "blue"), frames).right
    assert right["background"]
    assert right["colour"]
    for what in ("shape", "size", "motion"):
        assert right[what] == (getattr(thing, what) == getattr(other, what))


@pytest.mark.parametrize("pixels", ["noise", "grey", "one colour"])
def test_frames_of_nothing_score_little(pixels):
    """What an untrained model shows is not mistaken for the scene, and is no error."""
    rng = np.random.default_rng(0)
    frames = {
        "noise": rng.integers(0, 256, (5, 64, 64, 3), np.uint8),
        "grey": np.full((5, 64, 64, 3), 128, np.uint8),
        "one colour": np.full((5, 64, 64, 3), COLOURS["blue"], np.uint8),
    }[pixels]
    assert not any(score(SCENE, frames).right[what] for what in ("shape", "colour", "size", "motion"))


def test_a_turning_camera_is_told_from_a_moving_thing():
    """Stripes that move with the thing: the camera turns the other way, and the thing stands still."""
    scene = Scene((Thing(Shape.CIRCLE, "red", Size.MEDIUM, Motion.STILL),), "white", Pattern.STRIPED, Camera.PAN_LEFT)
    assert read_scene(draw(scene, 17, 96, 128)) == scene


def test_captions_need_no_unknown_word():
    """The towers' vocabulary holds every word of every wording; else it would be spelt in bytes."""
    known = set(f"{WORDS} {CAPTION_WORDS}".lower().split())
    for num_frames in (1, 33):
        for _, text in islice(told_scenes(1, num_frames, held_out=False), 400):
            assert {word.strip(".,:").lower() for word in text.replace("-", " ").split()} <= known, text


def test_a_caption_tells_its_scene():
    """Every wording names shape, colours and pattern, so that nothing a scorer asks for is left to chance."""
    rng = np.random.default_rng(2)
    texts = [caption(SCENE, rng, 33).lower() for _ in range(60)]
    assert all("red" in text and "blue" in text and any(noun in text for noun in NOUNS[Shape.STAR]) for text in texts)
    assert not any("strip" in text for text in texts)
    assert len(set(texts)) > len(GROUNDS) * 10


def test_held_out_scenes_are_not_trained_with():
    """Combinations of shape, colour and background that are asked for in the end were never seen before."""
    for held_out in (True, False):
        scenes = [scene for scene, _ in islice(told_scenes(5, 33, held_out=held_out), 100)]
        assert all(is_held_out(scene) == held_out for scene in scenes)
    every = [
        Scene((Thing(shape, colour, Size.SMALL, Motion.STILL),), ground)
        for shape in Shape
        for colour in COLOURS
        for ground in COLOURS
    ]
    assert 0.03 < sum(map(is_held_out, every)) / len(every) < 0.15
