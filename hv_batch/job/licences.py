"""The licence of the rendered files: that of the weights that rendered them.

A run names its licence once, in `run.json`. All its records, tables and its dataset card repeat that name, so a resume
with another copy of the weights cannot give one dataset two licences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TENCENT = "tencent-hunyuan-community"  # of the released weights, and of all weights that declare nothing else

_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")

# Licences whose id the Hugging Face Hub knows. All others are "other" there, with a name.
_HUB_IDS = frozenset({"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"})


def is_licence_id(value: Any) -> bool:
    """Whether `value` is the name of a licence as the Hub writes it: lower case, such as apache-2.0."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def engine_licence(engine: Any) -> str:
    """The licence of the engine's weights, from its optional method `licence()`; else that of the released weights."""
    declared = engine.licence() if hasattr(engine, "licence") else TENCENT
    return declared if is_licence_id(declared) else TENCENT


def run_licence(run: Mapping[str, Any]) -> str:
    """The licence of the videos of a run, from its run.json. Runs of earlier versions do not name it."""
    return str(run.get("licence_id", TENCENT))


def records_licence(records: Sequence[Mapping[str, Any]]) -> str:
    """The licence that commit records of one run name."""
    return str(records[0]["licence"]) if records else TENCENT


def licence_notice(licence: str = TENCENT) -> str:
    """The licence notice for users of the outputs, as one paragraph for `run.json`, the report and the card."""
    if licence != TENCENT:
        return (
            f"The weights that rendered these videos declare the licence {licence}. They are not the HunyuanVideo "
            "weights of Tencent, so the Tencent Hunyuan Community License does not apply to these videos."
        )
    return (
        "The HunyuanVideo weights, and the videos made with them, come under the Tencent Hunyuan Community License "
        f"Agreement (here: {TENCENT}). It does not cover the European Union, the United Kingdom and South Korea, "
        "and so grants nothing there. The videos must not be used to improve any AI model other than Hunyuan and its "
        "derivatives. Read the licence that came with the weights before you use or pass on this dataset."
    )


def hub_licence(licence: str) -> dict[str, str]:
    """The licence as the front matter of a dataset card names it."""
    if licence in _HUB_IDS:
        return {"license": licence}
    link = {"license_link": "https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE"}
    return {"license": "other", "license_name": licence} | (link if licence == TENCENT else {})
