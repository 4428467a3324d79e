"""The sampling parameters of one video, and the rules for their values. Neither torch nor Ray is imported."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, int, int]  # height, width (pixels), frames

LATENT_CHANNELS = 16
SPATIAL_COMPRESSION = 8  # VAE; the DiT's patch halves height and width once more
TEMPORAL_COMPRESSION = 4
SIZE_MULTIPLE = 16  # VAE stride 8 x patch 2
MAX_SIDE = 8192
MAX_FRAMES = 1025
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1  # torch.Generator takes a signed 64-bit seed

DEFAULT_NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, "
    "bad hands, bad teeth, bad eyes, bad limbs, distortion"
)

MAX_LORAS = 8  # of one video
MAX_LORA_STRENGTH = 100.0
LORA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NO_LORA = "none"  # in a manifest, where an empty cell means the default


def latent_shape(height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
    """Return (channels, latent frames, latent height, latent width) of a video of height x width pixels."""
    return (
        LATENT_CHANNELS,
        (num_frames - 1) // TEMPORAL_COMPRESSION + 1,
        height // SPATIAL_COMPRESSION,
        width // SPATIAL_COMPRESSION,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """All user-chosen values that change the pixels of one video.

    Validate untrusted values with `problems` before you build one.
    """

    prompt: str
    negative_prompt: str
    height: int  # pixels
    width: int  # pixels
    num_frames: int
    num_inference_steps: int
    seed: int
    guidance_scale: float  # embedded guidance, fed to the model as scale * 1000
    cfg_scale: float  # classifier-free guidance; > 1 renders the negative prompt too
    guidance_rescale: float
    flow_shift: float
    lora: str = ""  # names of LoRAs in the form of `canonical_lora`; empty: none

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict. `dataclasses.asdict` takes ten times as long because it looks for containers.

        An empty `lora` is left out, so that records and hashes of videos without one stay as they were before it.
        """
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) or name != "lora"}

    @property
    def uses_cfg(self) -> bool:
        return self.cfg_scale > 1.0

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1

    @property
    def shape(self) -> Shape:
        return self.height, self.width, self.num_frames

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return latent_shape(self.height, self.width, self.num_frames)

    @property
    def latent_bytes(self) -> int:
        """Size of the final latents in bytes. They are float32 in every precision of the model."""
        return 4 * math.prod(self.latent_shape)


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """One invalid value: the field, the value, and a phrase that describes the allowed values."""

    field: str
    value: Any
    allowed: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _prompt(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _side(value: Any) -> bool:
    return _is_int(value) and SIZE_MULTIPLE <= value <= MAX_SIDE and value % SIZE_MULTIPLE == 0


def _frames(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= MAX_FRAMES and (value - 1) % TEMPORAL_COMPRESSION == 0


def _between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low <= value <= high


def parse_lora(text: str) -> dict[str, float | None]:
    """Return the strengths of LoRAs by name, from a text such as "film:0.7,grain". None: the LoRA's own strength.

    Raises ValueError if the text has another form, if a name occurs twice, or if a strength is out of bounds.
    """
    strengths: dict[str, float | None] = {}
    for item in text.split(",") if text.strip() and text.strip() != NO_LORA else ():
        name, colon, number = (part.strip() for part in item.partition(":"))
        strength = float(number) if colon else None
        if not LORA_NAME.fullmatch(name) or name in strengths or name == NO_LORA:
            raise ValueError(f"{name!r} is not the name of a LoRA, or occurs twice")
        if strength is not None and not abs(strength) <= MAX_LORA_STRENGTH:
            raise ValueError(f"{strength} is not from -{MAX_LORA_STRENGTH:g} to {MAX_LORA_STRENGTH:g}")
        strengths[name] = strength
    if len(strengths) > MAX_LORAS:
        raise ValueError(f"{len(strengths)} LoRAs, more than {MAX_LORAS}")
    return strengths


def canonical_lora(value: Any) -> Any:
    """Return the one form of a choice of LoRAs: names in order, each with its strength if it has one.

    `value` is a text such as "film: 0.70, grain", or a list of such texts; "none" and an empty list become "". Equal
    choices get equal texts, and so equal pixels. Any other value is returned unchanged and breaks the rule of `lora`.
    """
    text = ",".join(value) if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value) else value
    if not isinstance(text, str):
        return value
    try:
        strengths = parse_lora(text)
    except ValueError:
        return value
    return ",".join(
        name if strength is None else f"{name}:{float(strength)!r}" for name, strength in sorted(strengths.items())
    )


def _lora(value: Any) -> bool:
    try:
        return isinstance(value, str) and parse_lora(value) is not None and canonical_lora(value) == value
    except ValueError:
        return False


_SIDE_ALLOWED = f"a multiple of {SIZE_MULTIPLE} from {SIZE_MULTIPLE} to {MAX_SIDE}"

# The allowed values of each field of SamplingParams: one table for manifest rows, config defaults and the Python API.
RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_prompt, "a text that is not blank"),
    "negative_prompt": (_text, "a text"),
    "height": (_side, _SIDE_ALLOWED),
    "width": (_side, _SIDE_ALLOWED),
    "num_frames": (_frames, f"4n + 1 from 1 (an image) to {MAX_FRAMES}, as 33, 65 or 129"),
    "num_inference_steps": (lambda v: _is_int(v) and 1 <= v <= MAX_STEPS, f"a whole number from 1 to {MAX_STEPS}"),
    "seed": (lambda v: _is_int(v) and 0 <= v <= MAX_SEED, "a whole number from 0 to 2^63 - 1"),
    "guidance_scale": (_between(0.0, 100.0), "a number from 0 to 100"),
    "cfg_scale": (_between(1.0, 100.0), "a number from 1 (off) to 100"),
    "guidance_rescale": (_between(0.0, 1.0), "a number from 0 (off) to 1"),
    "flow_shift": (lambda v: _is_number(v) and 0.0 < v <= 1000.0, "a number above 0, at most 1000"),
    "lora": (
        _lora,
        f"at most {MAX_LORAS} names of LoRAs, each once and with an optional strength, as film or film:0.7,grain; or "
        f"{NO_LORA}. Paths are not allowed",
    ),
}

# Fields that a record may lack.
OPTIONAL_FIELDS = frozenset({"lora"})


def problems(values: Mapping[str, Any]) -> list[FieldProblem]:
    """Return one `FieldProblem` for each value that breaks its rule. Absent fields are not checked."""
    return [
        FieldProblem(field, values[field], allowed)
        for field, (is_allowed, allowed) in RULES.items()
        if field in values and not is_allowed(values[field])
    ]
