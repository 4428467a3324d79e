"""The attributes of a scene of the toy world as class indices, the targets of the classifiers that train the towers."""

from __future__ import annotations

from collections.abc import Mapping

from hv_batch.toy.world import COLOURS, Camera, Motion, Pattern, Scene, Shape, Size

PLACES = ("first", "second")  # things from left to right; a single thing is the first
NONE = 0  # class of every attribute of a missing second thing

_OF_THINGS: Mapping[str, list[str]] = {
    "shape": list(Shape),
    "colour": list(COLOURS),
    "size": list(Size),
    "motion": list(Motion),
}
CLASSES: Mapping[str, int] = {
    "background": len(COLOURS),
    "pattern": len(Pattern),
    "camera": len(Camera),
    **{f"{place} {what}": 1 + len(values) for place in PLACES for what, values in _OF_THINGS.items()},
}


def labels(scene: Scene) -> dict[str, int]:
    """Return the class index of the scene for each name in CLASSES."""
    classes = {
        "background": list(COLOURS).index(scene.background),
        "pattern": list(Pattern).index(scene.pattern),
        "camera": list(Camera).index(scene.camera),
    }
    for place, thing in zip(PLACES, (*scene.things, None), strict=False):
        for what, values in _OF_THINGS.items():
            classes[f"{place} {what}"] = NONE if thing is None else 1 + values.index(getattr(thing, what))
    return classes
