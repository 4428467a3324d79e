"""`choices.json`: what a run has chosen for the engine's open options, such as the kernel of `attention: auto`.

The first group that is ready chooses, before the first denoise. The object is put if absent, so that groups which start
at the same time, on any nodes, compute with equal values, and a resume with those of before (P3).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from hv_batch.job import layout
from hv_batch.job.documents.reading import read
from hv_batch.job.documents.schema import ChoicesDocument
from hv_batch.job.storage.canonical_json import encode
from hv_batch.job.storage.store import Store

SCHEMA = "hv_batch/choices/1"

_REMEDY = "Restore it from a copy: the videos of this root were rendered with its values."


def read_choices(store: Store) -> Mapping[str, str]:
    """The choices of the run, by option; empty if no group has chosen yet. Raises InvalidObjectError as `read`."""
    try:
        choices: Mapping[str, str] = read(store, layout.CHOICES, ChoicesDocument, _REMEDY)["choices"]
    except FileNotFoundError:
        return {}
    return choices


def record_choices(store: Store, choices: Mapping[str, str], worker: str, node: str) -> Mapping[str, str]:
    """Record the choices of a worker, unless another one has recorded its own. Returns those that are recorded."""
    document = {
        "schema": SCHEMA,
        "choices": dict(choices),
        "worker": worker,
        "node": node,
        "chosen_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return choices if store.put_new(layout.CHOICES, encode(document)) else read_choices(store)
