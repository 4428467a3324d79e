"""Config keys and values of earlier versions that are still accepted, in configs, overrides and run.json files.

They are removed or replaced before a config is validated. So the models of `hv_batch.job.config.run_config` do not
contain them, and the identity of a run does not depend on them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

# Dotted key -> what the user should do. The key is ignored, whatever its value.
REMOVED_KEYS: Mapping[str, str] = {
    "encoders.cache": "embeddings are no longer shared between runs; remove the key and, if unused, its folder",
}

# Dotted key -> retired text -> (the value that replaces it, what the user should do).
RETIRED_VALUES: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "decoders.placement": {
        "colocated": (
            "pool",
            "decoders need GPUs of their own; set pool, or group to decode on the denoise groups' GPUs",
        ),
    },
}


def replace_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config's `values` without removed keys and with retired values replaced.

    Logs one warning for each key found, once per process, since a command may read run.json several times. A removed
    key that is null was its default, which every run.json of an earlier version holds, so it gives no warning. Values
    of removed keys are not logged: they may hold secrets.
    """
    current = dict(values)
    for key, advice in REMOVED_KEYS.items():
        section, name = _own_section(current, key)
        if section is not None and section.pop(name) is not None:
            _warn(f"the config key {key} is ignored: {advice}")
    for key, replacements in RETIRED_VALUES.items():
        section, name = _own_section(current, key)
        if section is not None and isinstance(section[name], str) and section[name] in replacements:
            retired = section[name]
            section[name], advice = replacements[retired]
            _warn(f"{key} = {retired} is read as {section[name]}: {advice}")
    return current


def _own_section(values: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping in `values` that holds a dotted key, or None, and the key's last part.

    The mappings on the way are replaced by copies: two sections joined by a YAML alias are one object.
    """
    *path, name = key.split(".")
    section = values
    for part in path:
        below = section.get(part)
        if not isinstance(below, dict):
            return None, name
        section[part] = section = dict(below)
    return (section if name in section else None), name


@cache  # logs each text once
def _warn(text: str) -> None:
    logger.warning(text)
