"""Captions of scenes of the toy world, in many wordings. Each caption determines every attribute of its scene.

An attribute that a caption omits has its default value: a thing without a size is of medium size, a thing without a
motion does not move, a background without a pattern is plain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hv_batch.toy.world import Camera, Motion, Pattern, Scene, Shape, Size, Thing, random_scene

NOUNS: Mapping[Shape, Sequence[str]] = {
    Shape.CIRCLE: ("circle", "disc", "round dot"),
    Shape.SQUARE: ("square",),
    Shape.TRIANGLE: ("triangle",),
    Shape.STAR: ("star", "five-pointed star"),
}
SIZES: Mapping[Size, Sequence[str]] = {
    Size.SMALL: ("small", "little", "tiny"),
    Size.MEDIUM: ("", "", "medium"),
    Size.LARGE: ("large", "big", "huge"),
}
MOTIONS: Mapping[Motion, Sequence[str]] = {
    Motion.STILL: ("stands still", "does not move", "rests", ""),
    Motion.RIGHT: ("moves from left to right", "moves to the right", "drifts to the right", "glides right"),
    Motion.LEFT: ("moves from right to left", "moves to the left", "drifts to the left", "glides left"),
    Motion.UP: ("moves up", "rises", "moves from bottom to top", "floats upward"),
    Motion.DOWN: ("moves down", "falls", "moves from top to bottom", "sinks downward"),
}
GROUNDS: Mapping[Pattern, Sequence[str]] = {
    Pattern.PLAIN: ("on {a} {} background", "in front of {a} {} background", "against a plain {} backdrop"),
    Pattern.STRIPED: ("on a striped {} background", "in front of {} stripes", "against a striped {} backdrop"),
}
CAMERAS: Mapping[Camera, Sequence[str]] = {
    Camera.FIXED: ("",),
    Camera.PAN_RIGHT: ("the camera pans to the right", "the camera pans right"),
    Camera.PAN_LEFT: ("the camera pans to the left", "the camera pans left"),
}
OPENINGS = ("", "", "a video of ", "an animation of ")
IMAGE_OPENINGS = ("", "", "a picture of ", "an image of ")
HELD_OUT = 12  # one of this many combinations of shape, colour and background is excluded from training


def caption(scene: Scene, rng: np.random.Generator, num_frames: int) -> str:
    """Return a caption of the scene. That of a single frame names no motion, so nothing in the scene may move."""
    is_image = num_frames == 1
    ground = _choose(rng, GROUNDS[scene.pattern]).format(scene.background, a=_article(scene.background))
    phrases = [_phrase(thing, rng, is_image) for thing in scene.things]
    subject = _pair(phrases, rng) if len(phrases) == 2 else " ".join(filter(None, phrases[0]))
    opening = _choose(rng, IMAGE_OPENINGS if is_image else OPENINGS)
    camera = "" if is_image else _choose(rng, CAMERAS[scene.camera])
    text = f"{opening}{subject} {ground}" if rng.random() < 0.75 else f"{ground}, {subject}"
    if camera:
        text = f"{text}, {camera}" if rng.random() < 0.7 else f"{camera}: {text}"
    return f"{text[0].upper()}{text[1:]}." if rng.random() < 0.5 else text


def is_held_out(scene: Scene) -> bool:
    """Return whether the scene shows a combination that is excluded from training."""
    return any(
        hashlib.sha256(f"{thing.shape}/{thing.colour}/{scene.background}".encode()).digest()[0] % HELD_OUT == 0
        for thing in scene.things
    )


def captioned_scenes(seed: int | tuple[int, ...], num_frames: int, *, held_out: bool) -> Iterator[tuple[Scene, str]]:
    """Yield an endless series of random scenes and their captions: only held-out scenes, or only training scenes."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, moves=num_frames > 1)
        if is_held_out(scene) == held_out:
            yield scene, caption(scene, rng, num_frames)


def _phrase(thing: Thing, rng: np.random.Generator, is_image: bool) -> tuple[str, str]:
    """Return the thing with its article, and the phrase of its motion."""
    noun = " ".join(filter(None, (_choose(rng, SIZES[thing.size]), thing.colour, _choose(rng, NOUNS[thing.shape]))))
    return f"{_article(noun)} {noun}", "" if is_image else _choose(rng, MOTIONS[thing.motion])


def _pair(phrases: Sequence[tuple[str, str]], rng: np.random.Generator) -> str:
    named = [(name, side, motion) for (name, motion), side in zip(phrases, ("left", "right"), strict=True)]
    order = named if rng.random() < 0.7 else named[::-1]
    if rng.random() < 0.5:
        parts = [" ".join(filter(None, (name, f"on the {side}", motion))) for name, side, motion in order]
    else:
        parts = [" ".join(filter(None, (f"on the {side}", name, motion))) for name, side, motion in order]
    return " and ".join(parts)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _choose(rng: np.random.Generator, wordings: Sequence[str]) -> str:
    return wordings[int(rng.integers(len(wordings)))]
