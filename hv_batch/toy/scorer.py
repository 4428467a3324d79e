"""Read the attributes of a scene from the frames of a toy video by classical image processing, without a learned model.

    pixels -> nearest named colour -> edge of the frame: background and pattern; changes of the edge: camera
                                   -> areas of another colour are things: area -> size, path -> motion, outline -> shape

Every result is a vote or a median over many pixels and frames, so the scorer also reads blurred and noisy frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hv_batch.toy.world import (
    COLOURS,
    HEADINGS,
    PAN,
    RADII,
    TRAVEL,
    Camera,
    Frames,
    Motion,
    Pattern,
    Scene,
    Shape,
    Size,
    Thing,
    cover,
    shade,
)

EDGE = 1 / 16  # width of the edge of the frame, which shows almost only background, per length of the shorter side
MIN_STRIPED = 0.2  # minimum fraction of each of the two shades in the edge of a striped background
RIM = 2  # pixels; half the maximum width of the transition between two colours, where pixels have a third colour
ROOM = 8  # pixels by which a thing may extend beyond its core, as the points of a star do
MIN_CORE = 0.12  # minimum core area of a thing, relative to the area of a small thing
MIN_SEEN = 0.6  # minimum core area, relative to the median over all frames, in a frame that is evaluated
EVALUATED_FRAMES = 9  # spread over the video

_NAMES = tuple(COLOURS)
_TONES = np.array([*COLOURS.values(), *(shade(name) for name in _NAMES)], np.float32)  # two tones per name

Mask = NDArray[np.bool_]  # [F, H, W]


@dataclass(frozen=True, slots=True)
class Score:
    """Whether the frames show each attribute of a scene, by name ("shape", "right colour", "background", ...)."""

    right: Mapping[str, bool]

    @property
    def share(self) -> float:
        return sum(self.right.values()) / len(self.right)


def score(scene: Scene, frames: Frames) -> Score:
    """Compare uint8 frames [F, H, W, 3] with the scene that they should show."""
    seen = read_scene(frames)
    right = {"background": seen.background == scene.background, "pattern": seen.pattern == scene.pattern}
    if len(frames) > 1:
        right["camera"] = seen.camera == scene.camera
    sides = ("",) if len(scene.things) == 1 else ("left ", "right ")
    for number, (side, thing) in enumerate(zip(sides, scene.things, strict=True)):
        shown = seen.things[number] if len(seen.things) == len(scene.things) else None
        right[f"{side}shape"] = shown is not None and shown.shape == thing.shape
        right[f"{side}colour"] = shown is not None and shown.colour == thing.colour
        right[f"{side}size"] = shown is not None and shown.size == thing.size
        if len(frames) > 1:
            right[f"{side}motion"] = shown is not None and shown.motion == thing.motion
    return Score(right)


def read_scene(frames: Frames) -> Scene:
    """Return the scene that uint8 frames [F, H, W, 3] show. Its things are ordered from left to right.

    The scene has no things if nothing differs from the background.
    """
    tones = _nearest_tones(frames)
    names = tones % len(_NAMES)
    height, width = frames.shape[1:3]
    rim = np.ones((height, width), bool)
    wide = max(1, round(EDGE * min(height, width)))
    rim[wide:-wide, wide:-wide] = False
    ground = int(np.bincount(names[:, rim].ravel(), minlength=len(_NAMES)).argmax())
    of_ground = tones[:, rim][names[:, rim] == ground]
    is_striped = MIN_STRIPED < (of_ground >= len(_NAMES)).mean() < 1 - MIN_STRIPED
    pan = _pan(tones == ground, tones == ground + len(_NAMES)) if is_striped else 0.0
    things = _things(frames, names, ground, pan)
    return Scene(things, _NAMES[ground], Pattern.STRIPED if is_striped else Pattern.PLAIN, _camera(pan))


def _nearest_tones(frames: Frames) -> NDArray[np.intp]:
    """Return the index of the nearest tone of each pixel. The index of a shade is that of its colour + len(_NAMES)."""
    flat = frames.reshape(-1, 3).astype(np.float32)
    distance = (_TONES**2).sum(1) - 2 * flat @ _TONES.T
    return distance.argmin(1).reshape(frames.shape[:3])


def _things(frames: Frames, names: NDArray[np.intp], ground: int, pan: float) -> tuple[Thing, ...]:
    """Return the things: the at most two colours with the largest areas, without the background and transitions."""
    small = np.pi * (RADII[Size.SMALL] * min(frames.shape[1:3])) ** 2
    cores = {colour: _eroded(names == colour) for colour in range(len(_NAMES)) if colour != ground}
    areas = {colour: float(np.median(core.sum((1, 2)))) for colour, core in cores.items()}
    shown = sorted(areas, key=areas.__getitem__, reverse=True)[:2]
    placed = [_thing(frames, cores[one], one, ground, pan) for one in shown if areas[one] >= MIN_CORE * small]
    return tuple(thing for _, thing in sorted(placed, key=lambda place: place[0]))


def _eroded(mask: Mask) -> Mask:
    """Return the mask without the outer RIM pixels of each area. Lines of up to 2 RIM pixels vanish."""
    for _ in range(RIM):
        inner = np.zeros_like(mask)
        inner[:, 1:-1, 1:-1] = (
            mask[:, 1:-1, 1:-1] & mask[:, :-2, 1:-1] & mask[:, 2:, 1:-1] & mask[:, 1:-1, :-2] & mask[:, 1:-1, 2:]
        )
        mask = inner
    return mask


def _thing(frames: Frames, core: Mask, colour: int, ground: int, pan: float) -> tuple[float, Thing]:
    """Return the mean horizontal position (0 to 1) of the thing, and the thing."""
    num_frames, height, width = core.shape
    areas = core.sum((1, 2))
    seen = np.flatnonzero(areas >= max(1, MIN_SEEN * np.median(areas)))
    x = (core.sum(1)[seen] @ (np.arange(width) + 0.5)) / areas[seen] / width
    y = (core.sum(2)[seen] @ (np.arange(height) + 0.5)) / areas[seen] / height
    travel = (_travel(seen, x, num_frames) - pan, _travel(seen, y, num_frames))
    evaluated = seen[np.linspace(0, len(seen) - 1, min(len(seen), EVALUATED_FRAMES)).round().astype(int)]
    outlines = [_outline(frames[frame], core[frame], colour, ground) for frame in evaluated]
    radius = float(np.median([np.sqrt(outline.sum() / np.pi) for outline in outlines])) / min(height, width)
    size = min(RADII, key=lambda one: abs(np.log(radius / RADII[one])))
    shapes = [_shape(outline) for outline in outlines]
    shape = max(Shape, key=shapes.count)
    return float(x.mean()), Thing(shape, _NAMES[colour], size, _motion(*travel))


def _outline(frame: NDArray[np.uint8], core: NDArray[np.bool_], colour: int, ground: int) -> NDArray[np.bool_]:
    """Return a mask of the pixels near the core that are closer to the thing's colour than to the background.

    The mask covers the bounding box of the core, extended by ROOM pixels.
    """
    rows, columns = np.flatnonzero(core.any(1)), np.flatnonzero(core.any(0))
    top, left = max(0, rows[0] - ROOM), max(0, columns[0] - ROOM)
    near = frame[top : rows[-1] + ROOM, left : columns[-1] + ROOM].astype(np.float32)
    to_thing = ((near - _TONES[colour]) ** 2).sum(-1)
    to_ground = np.minimum(*(((near - _TONES[tone]) ** 2).sum(-1) for tone in (ground, ground + len(_NAMES))))
    return to_thing < to_ground


def _travel(frames: NDArray[np.intp], places: NDArray[np.floating], num_frames: int) -> float:
    """Return the distance that a line fitted to the places covers over the whole video."""
    if len(frames) < 2:
        return 0.0
    return float(np.polyfit(frames, places, 1)[0]) * (num_frames - 1)


def _motion(across: float, down: float) -> Motion:
    """Return the nearest motion. Any two motions differ by at least TRAVEL."""
    return min(Motion, key=lambda one: np.hypot(across - TRAVEL * HEADINGS[one][0], down - TRAVEL * HEADINGS[one][1]))


def _shape(mask: NDArray[np.bool_]) -> Shape:
    """Return the shape with the highest overlap (IoU) with the mask at the same place and with the same area."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    radius = float(np.sqrt(len(rows) / np.pi))
    best, most = Shape.CIRCLE, -1.0
    for shape in Shape:
        drawn = cover(shape, width / 2, height / 2, radius, height, width) > 0.5
        drawn_rows, drawn_columns = np.nonzero(drawn)
        # The centroid of the drawn pixels is neither the centre of the shape nor exactly the centroid of the mask.
        x, y = (columns.mean() - drawn_columns.mean() + width / 2, rows.mean() - drawn_rows.mean() + height / 2)
        drawn = cover(shape, x, y, radius, height, width) > 0.5
        common = (drawn & mask).sum() / max(1, (drawn | mask).sum())
        if common > most:
            best, most = shape, common
    return best


def _pan(bright: Mask, dark: Mask) -> float:
    """Return the distance that the stripes move right from the first to the last frame, as a fraction of the width."""
    profile = bright.sum(1, dtype=np.float64) - dark.sum(1)  # [F, W]
    profile -= profile.mean(1, keepdims=True)
    width = profile.shape[1]
    wave = np.fft.rfft(profile, axis=1)
    stripes = 1 + int(np.abs(wave[:, 1 : width // 8]).sum(0).argmax())  # pairs per width
    turns = np.unwrap(np.angle(wave[:, stripes])) / (2 * np.pi)
    return float(turns[0] - turns[-1]) / stripes


def _camera(pan: float) -> Camera:
    if abs(pan) < PAN / 2:
        return Camera.FIXED
    return Camera.PAN_LEFT if pan > 0 else Camera.PAN_RIGHT
