"""The layout that VBench evaluates: `videos/{original prompt}-{i}.mp4`, and `prompts.json` with all prompts.

VBench finds the videos of a prompt by this name, so a name is the exact prompt if it can be: without a slash or a
control character, in 255 bytes, and different from the names of other prompts where the file system ignores case. Any
other prompt gets a shortened name with eight digits of its hash. `prompts.json` is the prompt file of VBench's mode
custom_input, with paths relative to the export.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from hv_batch.job.dataset.card import table_schema
from hv_batch.job.export.destination import Destination
from hv_batch.job.export.sealed_shards import count_rows, media_file, media_rows, sealed_shards
from hv_batch.job.manifest.extra_columns import clean_text
from hv_batch.job.redaction import printable_text
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError

VIDEOS = "videos"
VIDEOS_PER_PROMPT = 5  # 25 for the dimension temporal_flickering
ORIGINAL_PROMPT = ("prompt_original", "prompt_en", "prompt")  # the first column of these that the dataset has
MAX_STEM_BYTES = 255 - len("-999999.mp4")
MAX_HASH_DIGITS = 64


def export_vbench(
    store: Store,
    run: Mapping[str, Any],
    destination: Destination,
    *,
    shards: Collection[int] | None = None,
    prompt_column: str | None = None,
    progress: Callable[[int], Callable[[int], None]],
) -> dict[str, Any]:
    """Fill `destination`. `prompt_column` holds the original prompts. Returns the facts for the command's report.

    `progress(total)` begins a progress display and returns its `advance`. Holds the names of all videos in memory.
    Raises UserError if a shard is open or the column does not exist.
    """
    chosen = sealed_shards(store, run, shards)
    column = _prompt_column(store, run, prompt_column)
    names = VideoNames(distinguishes_case=destination.distinguishes_case())
    advance = progress(sum(count_rows(store, chosen)))
    prompts: dict[str, str] = {}
    images = 0
    files = []
    for shard, row in media_rows(store, chosen, column):
        if row["num_frames"] == 1:
            images += 1
            advance(1)
            continue
        prompt = str(row[column] if row[column] is not None else row["prompt"])
        name = f"{VIDEOS}/{names.next(prompt)}{Path(row['file_name']).suffix}"
        prompts[name] = prompt
        files.append(media_file(shard, row, name))
    destination.add(files, advance)
    destination.write("prompts.json", json.dumps(prompts, indent=1, ensure_ascii=False).encode("utf-8", "replace"))
    return {
        "videos": len(files),
        "images_left_out": images,
        "prompt_column": column,
        "prompts": len(names.counts),
        "prompts_with_fewer_than_5_videos": sum(count < VIDEOS_PER_PROMPT for count in names.counts.values()),
        "renamed_prompts": names.renamed,
    }


def _prompt_column(store: Store, run: Mapping[str, Any], wanted: str | None) -> str:
    columns = table_schema(store, run).names
    if wanted is None:
        return next(name for name in ORIGINAL_PROMPT if name in columns)
    if wanted not in columns:
        raise UserError(f"The dataset has no column {wanted!r}; it has {', '.join(sorted(columns))}.")
    return wanted


class VideoNames:
    """The names of videos without suffix: the prompt and the number of its video, from 0."""

    def __init__(self, *, distinguishes_case: bool) -> None:
        self.counts: Counter[str] = Counter()  # videos by prompt
        self.renamed: dict[str, str] = {}  # the stems that differ from their prompt
        self._distinguishes_case = distinguishes_case
        self._stems: dict[str, str] = {}  # by prompt
        self._owners: dict[str, str] = {}  # the prompt of each stem, as the file system compares them

    def next(self, prompt: str) -> str:
        """The name of the next video of `prompt`."""
        if prompt not in self._stems:
            self._stems[prompt] = stem = self._stem(prompt)
            if stem != prompt:
                self.renamed[prompt] = stem
        self.counts[prompt] += 1
        return f"{self._stems[prompt]}-{self.counts[prompt] - 1}"

    def _stem(self, prompt: str) -> str:
        plain = "".join("_" if _is_unsafe(char) else char for char in clean_text(prompt))
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
        candidates = [plain] if plain == prompt and len(plain.encode()) <= MAX_STEM_BYTES else []
        candidates += [_cut(plain, digits) + f"~{digest[:digits]}" for digits in (8, 16, MAX_HASH_DIGITS)]
        for stem in candidates:
            if self._owners.setdefault(self._compared(stem), prompt) == prompt:
                return stem
        raise AssertionError("two prompts have one sha256")

    def _compared(self, stem: str) -> str:
        """What decides whether two names are one file. File systems that ignore case may also normalise Unicode."""
        return stem if self._distinguishes_case else unicodedata.normalize("NFKC", stem).casefold()


def _is_unsafe(char: str) -> bool:
    return char == "/" or printable_text(char) != char or char in "\n\t\0"


def _cut(text: str, digits: int) -> str:
    return text.encode()[: MAX_STEM_BYTES - digits - 1].decode("utf-8", "ignore")
