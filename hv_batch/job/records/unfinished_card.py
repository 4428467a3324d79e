"""The dataset card of a run that is not finished.

Dataset loaders read sealed shards only, so they would drop the media of open shards without a word. This card names a
data file that does not exist: `datasets.load_dataset(ROOT)` fails, and its message contains the name of the file.
"""

from __future__ import annotations

from hv_batch.job import layout
from hv_batch.job.documents.card import CardState, parse_card, sign_card
from hv_batch.job.storage.store import Store

UNFINISHED_CARD = sign_card(
    """---
configs:
- config_name: default
  data_files: this-run-is-not-finished--see-its-README.md
---

# This run is not finished

Samples are still to be rendered, so this folder is not a complete dataset, and `datasets.load_dataset` refuses it.
`hv-batch status` shows what is left, and `hv-batch resume` renders it. This card is then replaced.

To load the shards that are complete so far:

```python
datasets.load_dataset("videofolder", data_dir="THIS_FOLDER/data")
```

This call returns the rows of sealed shards (those with a `metadata.parquet`) and ignores all other media. While no
shard is sealed, it returns the media without metadata.

""",
    CardState(is_finished=False),
)


def announce_run(store: Store) -> None:
    """Write the card of an unfinished run unless there is a card."""
    store.put_new(layout.CARD, UNFINISHED_CARD)


def reopen_card(store: Store) -> None:
    """Replace the card by that of an unfinished run, unless it is the user's own. To be called before a shard opens."""
    try:
        data = store.get(layout.CARD)
    except FileNotFoundError:
        data = b""
    if data != UNFINISHED_CARD and (not data or not is_own_card(data)):
        store.put(layout.CARD, UNFINISHED_CARD)


def is_own_card(data: bytes) -> bool:
    """Whether the user has written this card."""
    try:
        return parse_card(data) is None
    except ValueError:
        return False
