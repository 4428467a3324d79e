"""Distilled weights that this engine renders: what they need, and how a checkpoint is recognized as one of them.

Their tensors have the released names and shapes, and training has changed all values. So only what lies around the
tensors tells them from the released weights: the repository in fetch.json, the model card, the names of folders and
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.protocol import UserError

CARD_BYTES = 4096  # of a README.md that are read; the title of a model card is within them
NAMED_FOLDERS = 3  # the last folders of a path whose names count; the rest of a path belongs to the user


@dataclass(frozen=True, slots=True)
class Distilled:
    """One set of distilled weights."""

    name: str
    repository: str
    steps: int
    config: str  # the shipped config that renders with them
    marks: tuple[str, ...]  # parts of the names of their files and folders, in lower case
    title: str  # of their model card
    dit_weight: str | None = None  # path of the DiT within the repository, if it is not the released one


# Names and layouts of the repositories, and the steps of their model cards, as of 2026-11. The second mark of
# FastHunyuan is that of the copies for ComfyUI, hunyuan_video_FastVideo_720_*.safetensors.
DISTILLED = (
    Distilled(
        "FastHunyuan",
        "FastVideo/FastHunyuan",
        6,
        "fast_6step",
        ("fasthunyuan", "fastvideo_720"),
        "FastHunyuan Model Card",
    ),
    Distilled(
        "AccVideo",
        "aejion/AccVideo",
        5,
        "accvideo_5step",
        ("accvideo",),
        "# AccVideo",
        "accvideo-t2v-5-steps/diffusion_pytorch_model.pt",
    ),
)


@dataclass(frozen=True, slots=True)
class Recognition:
    """Distilled weights, and the name by which they were recognized."""

    name: str
    steps: int
    config: str
    by: str

    def render(self) -> str:
        return (
            f"by {self.by}, these seem to be the weights of {self.name}. Their tensors have the names and shapes of "
            f"the released ones, so this is not verified. {self.name} is made for {self.steps} steps: render with "
            f"--config {self.config}"
        )


def recognize(base: Path, dit_file: Path | None = None) -> Recognition | None:
    """Return the distilled weights that `base`, a model_base or a DiT, seems to hold; None if nothing names any."""
    repositories = _fetched(base)
    card = _card(base)
    names = _names(base, dit_file)
    for weights in DISTILLED:
        found = next((name for name in names if any(mark in name.lower() for mark in weights.marks)), None)
        if weights.repository in repositories:
            by = f"the repository in fetch.json, {weights.repository}"
        elif weights.title in card:
            by = "the title of README.md"
        elif found:
            by = f"the name {found}"
        else:
            continue
        return Recognition(weights.name, weights.steps, weights.config, by)
    return None


def find_dit(base: Path) -> Path | None:
    """Return the DiT of a repository of distilled weights that does not lie at the released path; None without one."""
    paths = (base / weights.dit_weight for weights in DISTILLED if weights.dit_weight)
    return next((path for path in paths if path.is_file()), None)


def _fetched(base: Path) -> Sequence[str]:
    """Return the repositories in the fetch.json of a model_base; none without a readable one."""
    try:
        return list(read_json(base / "fetch.json")) if (base / "fetch.json").is_file() else []
    except UserError:
        return []


def _card(base: Path) -> str:
    try:
        with (base / "README.md").open("rb") as file:
            return file.read(CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _names(base: Path, dit_file: Path | None) -> list[str]:
    names = list(base.absolute().parts[-NAMED_FOLDERS:])
    if dit_file is not None:
        inside = dit_file.is_relative_to(base) and dit_file != base
        names += dit_file.relative_to(base).parts if inside else dit_file.parts[-NAMED_FOLDERS:]
    return names
