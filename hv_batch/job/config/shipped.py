"""The shipped configs, by name: the folder configs/ of a checkout, or its copy in an installed package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hv_batch.protocol import UserError


def shipped_folder() -> Path:
    """The folder of the shipped configs. Raises UserError if the installation has none."""
    package = Path(__file__).parents[2]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "demo_cpu.yaml").is_file():
            return folder
    raise UserError("The folder configs/ is missing from this installation. Reinstall hv_batch.")


def shipped_configs() -> Mapping[str, Path]:
    """The shipped configs by name, such as `720p_8gpu`."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def find_config(url: str) -> str:
    """The path of the shipped config of this name, unless a file has it; anything else unchanged.

    Raises UserError if `url` looks like a name and nothing has it.
    """
    if "/" in url or not url.strip() or os.path.exists(url):
        return url
    configs = shipped_configs()
    if path := configs.get(url.removesuffix(".yaml")):
        return str(path)
    if Path(url).suffix:
        return url
    raise UserError(
        f"The config {url} does not exist: there is no file {os.path.abspath(url)}, and no shipped config of this "
        f"name. Shipped are {', '.join(configs)}."
    )


def purpose(path: Path) -> str:
    """What a shipped config is for: the first sentence of the comment at its head, without "Use it to"."""
    head = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    sentence = " ".join(head).split(". ")[0].rstrip(".")
    return sentence.removeprefix("Use it to ")
