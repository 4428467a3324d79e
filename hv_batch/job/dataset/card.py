"""The dataset card of a finished run: README.md in the output root, with which `datasets.load_dataset(ROOT)` works.

Before the run is finished, the root has the card of `hv_batch.job.records.unfinished_card`. A card that the user has
written, which is one without the last line of `hv_batch.job.documents.card`, is neither replaced nor checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from hv_batch.job import layout
from hv_batch.job.dataset.card_text import CardFacts, card_text
from hv_batch.job.dataset.seal import read_table, table_columns
from hv_batch.job.documents.card import CardState, parse_card, sign_card
from hv_batch.job.records.commits import find_shards
from hv_batch.job.records.run_document import dataset_schema, plan_size
from hv_batch.job.records.unfinished_card import is_own_card
from hv_batch.job.storage.store import Store


def write_card(store: Store, run: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write the card if the run of `summary` (of `aggregate`) is complete. Must be called before `_SUCCESS` is put."""
    if summary["pending"] or summary["shards_sealed"] < summary["shards"]:
        return
    try:
        if is_own_card(store.get(layout.CARD)):
            return
    except FileNotFoundError:
        pass
    store.put(layout.CARD, render_card(store, run, summary))


def render_card(store: Store, run: Mapping[str, Any], summary: Mapping[str, Any]) -> bytes:
    """The card of a complete run."""
    media = summary.get("media") or {}
    images = media.get("images", 0)
    facts = CardFacts(
        videos=summary["committed"] - images,
        images=images,
        quarantined=summary["quarantined"],
        bytes=media.get("bytes", 0),
        seconds=media.get("seconds", 0.0),
        schema=table_schema(store, run),
        withdrawn=summary.get("withdrawn", 0),
    )
    return sign_card(card_text(run, facts), _state(summary))


def card_problem(store: Store, run: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str | None:
    """What is wrong with the card of a root, in one sentence; None if nothing is. `summary` is None if unfinished.

    Only what the card says about itself is compared, because another version of hv_batch may word it differently. Roots
    of versions without cards need none.
    """
    try:
        state = parse_card(store.get(layout.CARD))
    except FileNotFoundError:
        return f"{layout.CARD} is missing" if run.get("card") else None
    except ValueError as error:
        return f"{layout.CARD}: {error}"
    expected = CardState(is_finished=False) if summary is None else _state(summary)
    if state is None or state == expected:
        return None
    if not state.is_finished:
        return f"{layout.CARD} says that the run is not finished"
    if not expected.is_finished:
        return f"{layout.CARD} says that the run is finished"
    return (
        f"{layout.CARD} says {state.committed:,} committed and {state.quarantined:,} quarantined samples, the summary "
        f"{expected.committed:,} and {expected.quarantined:,}"
    )


def table_schema(store: Store, run: Mapping[str, Any]) -> pa.Schema:
    """The schema of the tables of a run, which all shards share; that of hv_batch's own columns if none is sealed."""
    for shard in find_shards(store, range(plan_size(run)[1]), [layout.MEDIA]):
        try:
            return read_table(store, shard).schema.remove_metadata()
        except (FileNotFoundError, ValueError):  # open, or damaged, which `verify` reports
            continue
    columns = table_columns(dataset_schema(run))
    return pa.schema([("file_name", pa.string()), *((name, dtype) for name, (_, dtype) in columns.items())])


def _state(summary: Mapping[str, Any]) -> CardState:
    return CardState(True, summary["committed"], summary["quarantined"])
