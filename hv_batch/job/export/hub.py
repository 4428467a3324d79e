"""The folder to push to the Hugging Face Hub: the dataset card and the sealed shards, and nothing else of the root.

Records, lineage, reports and run.json name machines, users and paths, so they stay in the output root. The limits of a
repository of the Hub are checked before a file is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from hv_batch.job import layout
from hv_batch.job.dataset.card import table_schema
from hv_batch.job.dataset.card_text import card_text, facts_of_rows
from hv_batch.job.export.destination import Destination, ExportedFile
from hv_batch.job.export.sealed_shards import count_rows, media_file, media_rows, sealed_shards
from hv_batch.job.records.run_document import plan_size
from hv_batch.job.records.withdrawn import all_withdrawn
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

MAX_REPOSITORY_FILES = 100_000
MAX_FOLDER_FILES = 10_000

ADVICE = (
    "To push it: `hf upload USER/NAME {folder} . --repo-type dataset`. If it stops, run the same command again: it "
    "continues. Older versions of huggingface_hub have `hf upload-large-folder USER/NAME {folder} --repo-type "
    "dataset` for many files."
)


def export_hub(
    store: Store,
    run: Mapping[str, Any],
    destination: Destination,
    *,
    shards: Collection[int] | None = None,
    progress: Callable[[int], Callable[[int], None]],
) -> dict[str, Any]:
    """Fill `destination`. Returns the facts for the command's report; `progress` as in `export_vbench`.

    Raises UserError if a shard is open, or if the files exceed a limit of the Hub.
    """
    chosen = sealed_shards(store, run, shards)
    counts = count_rows(store, chosen)
    _check_limits(counts)
    advance = progress(sum(counts) + len(chosen))
    rows = []
    files = []
    for shard, row in media_rows(store, chosen):
        files.append(media_file(shard, row, layout.media_dir(shard) + row["file_name"]))
        rows.append({name: row[name] for name in ("num_frames", "fps", "bytes")})
    destination.add(files, advance)
    destination.add([ExportedFile(key, key) for key in map(layout.metadata_key, chosen)], advance)
    samples, shard_size = plan_size(run)[0], run["config"]["output"]["shard_size"]
    planned = sum(min(shard_size, samples - shard * shard_size) for shard in chosen)
    of_shards = all_withdrawn(store)
    withdrawn = sum(len(of_shards.get(shard, ())) for shard in chosen)
    facts = facts_of_rows(rows, max(0, planned - len(rows) - withdrawn), table_schema(store, run), withdrawn)
    destination.write(layout.CARD, card_text(run, facts, for_hub=True).encode())
    return {"media": len(rows), "shards": len(chosen), "advice": ADVICE.format(folder=destination.folder)}


def _check_limits(counts: list[int]) -> None:
    total = sum(counts) + len(counts) + 1
    if total > MAX_REPOSITORY_FILES:
        raise UserError(
            f"The export has {total:,} files, and a repository of the Hub should have less than "
            f"{MAX_REPOSITORY_FILES:,}. Export parts of it with --shards into several repositories, or upload the tars "
            "of a run with output.webdataset: true, one file for each shard."
        )
    if counts and max(counts) + 1 > MAX_FOLDER_FILES:
        raise UserError(
            f"A shard has {max(counts):,} files, and a folder of the Hub should have less than {MAX_FOLDER_FILES:,}. "
            "Render with a smaller output.shard_size, or upload the tars of a run with output.webdataset: true."
        )
