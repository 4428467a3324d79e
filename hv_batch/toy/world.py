"""The world of the toy model: one or two flat shapes on a background, drawn from a description.

A `Scene` has exactly the attributes that captions describe and the scorer reads; `draw` renders it to frames. The
random variation that a caption does not determine (the jitter) is small on purpose: the model then learns one picture
per prompt instead of a distribution.

Lengths are fractions of the shorter side of the frame. Positions are fractions of its width and height; (0, 0) is the
top left corner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # [F, H, W, 3]


class Shape(StrEnum):
    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    STAR = "star"


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Motion(StrEnum):
    """Direction in which a shape moves."""

    STILL = "still"
    RIGHT = "right"
    LEFT = "left"
    UP = "up"
    DOWN = "down"


class Camera(StrEnum):
    """Direction in which the camera turns. The scene moves in the opposite direction."""

    FIXED = "fixed"
    PAN_RIGHT = "pan right"
    PAN_LEFT = "pan left"


class Pattern(StrEnum):
    """Pattern of the background."""

    PLAIN = "plain"
    STRIPED = "striped"  # vertical stripes in two shades; without them a turning camera is not visible


COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (215, 38, 38),
    "orange": (245, 140, 30),
    "yellow": (245, 226, 60),
    "green": (46, 160, 67),
    "blue": (45, 85, 215),
    "purple": (140, 60, 180),
    "white": (244, 244, 244),
    "black": (22, 22, 22),
}
SIZES = ((128, 128), (96, 160), (160, 96))  # (height, width) of the training frames
# Radius of the circle with the same area: all shapes of a size cover about the same area.
RADII: Mapping[Size, float] = {Size.SMALL: 0.11, Size.MEDIUM: 0.155, Size.LARGE: 0.21}
HEADINGS: Mapping[Motion, tuple[float, float]] = {
    Motion.STILL: (0, 0),
    Motion.RIGHT: (1, 0),
    Motion.LEFT: (-1, 0),
    Motion.UP: (0, -1),
    Motion.DOWN: (0, 1),
}
TRAVEL = 0.5  # distance that a shape moves between the first and the last frame
PAN = 0.4  # distance that the scene moves if the camera turns
STRIPES = 4  # pairs of stripes per frame width
SHADE = 0.72  # brightness of a darker stripe, relative to the colour of the background
SIDES = (0.27, 0.73)  # horizontal positions of the left and the right one of two shapes
PLACE_JITTER = 0.05
RADIUS_JITTER = 0.06
STAR_INNER = 0.45  # radius of the notches of a star, relative to that of its points
REACH = 1.6  # distance of the farthest point of any shape from its centre, relative to its radius


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape with its attributes."""

    shape: Shape
    colour: str
    size: Size
    motion: Motion


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing in the middle, or a left and a right one. If the camera turns, the things themselves do not move."""

    things: tuple[Thing, ...]
    background: str
    pattern: Pattern = Pattern.PLAIN
    camera: Camera = Camera.FIXED


def random_scene(rng: np.random.Generator, *, moves: bool = True) -> Scene:
    """Return a random scene: a quarter have two things, the others one; in a sixth the camera turns.

    If `moves` is false, neither the things nor the camera move.
    """
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    kind = rng.random()
    if moves and kind < 1 / 6:
        camera = Camera.PAN_LEFT if rng.random() < 0.5 else Camera.PAN_RIGHT
        return Scene((_thing(rng, colours[0], [Motion.STILL]),), colours[1], Pattern.STRIPED, camera)
    pattern = Pattern.STRIPED if rng.random() < 1 / 6 else Pattern.PLAIN
    if kind > 3 / 4:
        upright = [Motion.STILL, Motion.UP, Motion.DOWN] if moves else [Motion.STILL]
        pair = (_thing(rng, colours[0], upright), _thing(rng, colours[1], upright))
        return Scene(pair, colours[2], pattern)
    return Scene((_thing(rng, colours[0], list(Motion) if moves else [Motion.STILL]),), colours[1], pattern)


def _thing(rng: np.random.Generator, colour: str, motions: list[Motion]) -> Thing:
    shape, size = list(Shape)[rng.integers(len(Shape))], list(Size)[rng.integers(len(Size))]
    return Thing(shape, colour, size, motions[rng.integers(len(motions))])


def draw(scene: Scene, num_frames: int, height: int, width: int, rng: np.random.Generator | None = None) -> Frames:
    """Return uint8 frames [F, H, W, 3] of the scene. A single frame shows the middle of the motion.

    With `rng`, positions and sizes vary slightly.
    """
    times = np.linspace(-0.5, 0.5, num_frames, dtype=np.float32) if num_frames > 1 else np.zeros(1, np.float32)
    pan = {Camera.FIXED: 0.0, Camera.PAN_RIGHT: -PAN, Camera.PAN_LEFT: PAN}[scene.camera] * times
    frames = _background(scene, pan, height, width)
    homes = (0.5,) if len(scene.things) == 1 else SIDES
    for home, thing in zip(homes, scene.things, strict=True):
        heading = HEADINGS[thing.motion]
        jitter = np.zeros(3) if rng is None else rng.uniform(-1, 1, 3)
        x = home + PLACE_JITTER * jitter[0] + heading[0] * TRAVEL * times + pan
        y = 0.5 + PLACE_JITTER * jitter[1] + heading[1] * TRAVEL * times
        radius = RADII[thing.size] * (1 + RADIUS_JITTER * jitter[2]) * min(height, width)
        for frame, across, down in zip(frames, x * width, y * height, strict=True):
            _paint(frame, thing, across, down, radius)
    return np.rint(frames).astype(np.uint8)


def _paint(frame: NDArray[np.float32], thing: Thing, x: float, y: float, radius: float) -> None:
    """Draw the thing in place onto a frame [H, W, 3] with its centre at (x, y) in pixels.

    Only the part of the frame that the thing may cover is computed.
    """
    height, width, _ = frame.shape
    reach = REACH * radius + 1
    left, right = (int(np.clip(edge, 0, width)) for edge in (x - reach, x + reach + 1))
    top, bottom = (int(np.clip(edge, 0, height)) for edge in (y - reach, y + reach + 1))
    part = frame[top:bottom, left:right]
    covered = cover(thing.shape, x - left, y - top, radius, *part.shape[:2])[..., None]
    part += covered * (np.array(COLOURS[thing.colour], np.float32) - part)


def _background(scene: Scene, pan: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    colour = np.array(COLOURS[scene.background], np.float32)
    frames = np.empty((len(pan), height, width, 3), np.float32)
    frames[:] = colour
    if scene.pattern is Pattern.STRIPED:
        across = (np.arange(width, dtype=np.float32) + 0.5) / width - pan[:, None]
        wave = np.sin(2 * np.pi * STRIPES * across) * width / (2 * np.pi * STRIPES)  # about the pixels to the next edge
        frames += np.clip(0.5 + wave, 0, 1)[:, None, :, None] * (np.array(shade(scene.background)) - colour)
    return frames


def shade(colour: str) -> tuple[float, float, float]:
    """Return the second colour (RGB) of the stripes of a background: darker, or lighter if `colour` is black."""
    if colour == "black":
        return (75.0, 75.0, 75.0)
    red, green, blue = COLOURS[colour]
    return (red * SHADE, green * SHADE, blue * SHADE)


def cover(shape: Shape, x: float, y: float, radius: float, height: int, width: int) -> NDArray[np.float32]:
    """Return the fraction (0 to 1) of each pixel [H, W] that the shape covers. `x`, `y`, `radius` are in pixels."""
    across = (np.arange(width) + 0.5 - x)[None, :]
    down = (np.arange(height) + 0.5 - y)[:, None]
    distance = outside(shape, across.astype(np.float32), down.astype(np.float32), radius)
    covered: NDArray[np.float32] = (0.5 - distance).clip(0, 1)
    return covered


def outside(shape: Shape, across: NDArray[np.float32], down: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """Return the approximate distance of points from the edge of the shape (negative inside), in the input unit."""
    if shape is Shape.CIRCLE:
        return np.sqrt(across**2 + down**2) - radius
    if shape is Shape.SQUARE:
        half = radius * np.pi**0.5 / 2
        return np.maximum(abs(across), abs(down)) - half
    if shape is Shape.TRIANGLE:
        inner = radius * (np.pi / 3**1.5) ** 0.5  # inradius of the equilateral triangle with the area of the circle
        return np.maximum(0.75**0.5 * abs(across) - down / 2, down) - inner
    # A five-pointed star: fold the plane onto one half of a point, whose edge is a straight line.
    points = radius * (np.pi / (5 * STAR_INNER * np.sin(np.pi / 5))) ** 0.5
    turn = np.arctan2(across, -down)
    folded = abs((turn + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    distance = np.hypot(across, down)
    px, py = distance * np.cos(folded), distance * np.sin(folded)
    notch = (points * STAR_INNER * np.cos(np.pi / 5), points * STAR_INNER * np.sin(np.pi / 5))
    edge = (notch[0] - points, notch[1])
    normal = np.array((edge[1], -edge[0]), np.float32) / np.hypot(*edge)
    return (px - points) * normal[0] + py * normal[1]
