"""The text of a dataset card: YAML front matter, which the Hugging Face Hub and its loaders read, and Markdown.

The values come from records and manifests, so they are hostile: the front matter is written by PyYAML, `markdown`
escapes texts outside code, and `code_block` removes what could end a block of code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from hv_batch.job.formatting import duration, plural, size
from hv_batch.job.licences import hub_licence, licence_notice, run_licence
from hv_batch.job.manifest.extra_columns import clean_text
from hv_batch.job.quality import SCORES
from hv_batch.job.redaction import printable_text

MAX_COLUMNS = 200  # described in the card; a manifest may have a thousand
MAX_NAME_CHARS = 100
MAX_JSON_CHARS = 20_000  # of the run's identity, which lists a plan for each shape

DESCRIPTIONS: Mapping[str, str] = {
    "file_name": "the media file, beside the table; loaders open it as `video` or `image`",
    "id": "the id in the manifest, or a hash of the row",
    "key": "the id as it is used in file names; unique",
    "row": "number of the row in the manifest, from 1",
    "video_index": "number of the video of its row, from 0",
    "prompt": "the text that was rendered",
    "negative_prompt": "the text that guidance moves away from; unused unless `cfg_scale` is above 1",
    "height": "pixels",
    "width": "pixels",
    "num_frames": "frames; 1 for an image",
    "fps": "frames a second",
    "num_inference_steps": "denoising steps",
    "seed": "of the initial noise",
    "guidance_scale": "embedded guidance",
    "cfg_scale": "classifier-free guidance; 1 is off",
    "guidance_rescale": "rescaling of classifier-free guidance",
    "flow_shift": "shift of the timesteps",
    "bytes": "size of the file",
    "sha256": "of the file",
    "frames_sha256": "of the frames before compression",
    "fingerprint": "hash of everything in the run that changes pixels",
    "licence": "of the file",
    **SCORES,
}

_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+.!|~$&<>:@-])")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says about a dataset. `schema` is that of its tables, with the user's columns."""

    videos: int
    images: int
    quarantined: int
    bytes: int
    seconds: float  # of the videos
    schema: pa.Schema
    withdrawn: int = 0

    @property
    def media_column(self) -> str:
        return "video" if self.videos else "image"


def card_text(run: Mapping[str, Any], facts: CardFacts, *, for_hub: bool = False) -> str:
    """The card of the dataset of a run. It depends on the run.json and the facts only (P3).

    `for_hub` leaves the images of a mixed dataset out of the configuration: the Hub's loader reads one kind of media.
    """
    front = yaml.safe_dump(_front_matter(run, facts, for_hub), sort_keys=False, allow_unicode=False, width=1000)
    sections = [
        f"---\n{front}---",
        f"# {_title(run)}",
        _counts(facts),
        _loading(facts, for_hub),
        f"## Licence\n\n{licence_notice(run_licence(run))}",
        f"## Columns\n\n{_columns(facts.schema)}",
        f"## How it was made\n\n{_origin(run)}",
    ]
    return "\n\n".join(sections) + "\n\n"


def _front_matter(run: Mapping[str, Any], facts: CardFacts, for_hub: bool) -> dict[str, Any]:
    total = facts.videos + facts.images
    values: dict[str, Any] = {
        **hub_licence(run_licence(run)),
        "pretty_name": _title(run),
        "size_categories": [_SIZES[min(max(0, len(str(total)) - 3), len(_SIZES) - 1)]],
        "task_categories": ["text-to-video" if facts.videos else "text-to-image"],
        "tags": ["synthetic", "hv_batch"],
    }
    if total:
        suffix = "mp4" if facts.videos else "png"
        paths = ["data/*/metadata.parquet", f"data/*/*.{suffix}"]
        config: dict[str, Any] = {"config_name": "default", "data_files": [{"split": "train", "path": paths}]}
        if for_hub and facts.videos and facts.images:
            config["filters"] = [["num_frames", ">", 1]]
        values["configs"] = [config]
    return values


def _title(run: Mapping[str, Any]) -> str:
    return f"Videos of the hv_batch run {run['fingerprint'][:8]}"


def _counts(facts: CardFacts) -> str:
    lines = [f"{plural(facts.videos, 'video')} ({duration(facts.seconds)})"] if facts.videos else []
    lines += [plural(facts.images, "image")] if facts.images else []
    text = f"{' and '.join(lines) or 'No media'}, {size(facts.bytes)}, rendered from prompts by a model."
    if facts.quarantined:
        text += f" {plural(facts.quarantined, 'sample')} of the run failed and have no file."
    if facts.withdrawn:
        text += f" Withdrawn: {plural(facts.withdrawn, 'sample')}, whose files were removed."
    return text


def _loading(facts: CardFacts, for_hub: bool) -> str:
    column = facts.media_column
    lines = ["import datasets", "", 'rows = datasets.load_dataset(PATH, split="train")  # this folder or repository']
    if column == "video":
        lines.append('rows = rows.cast_column("video", datasets.Video(decode=False))  # paths instead of decoders')
    text = "## Loading\n\n```python\n" + "\n".join(lines) + "\n```"
    if column == "video":
        text += '\n\nWithout the last line, `rows[0]["video"]` decodes the file and needs the package torchcodec.'
    if facts.videos and facts.images:
        text += (
            f" The {plural(facts.images, 'image')} are not in this configuration; their rows are in the tables."
            if for_hub
            else " A row with `num_frames` 1 is an image: its `video` is the path of a PNG file. To open the images: "
            '`load_dataset("imagefolder", data_dir=PATH + "/data", filters=[("num_frames", "==", 1)])`.'
        )
    return text + "\n\nThe loader has an order of its own; `row` and `video_index` give that of the manifest."


def _columns(schema: pa.Schema) -> str:
    lines = ["| column | type | content |", "|---|---|---|"]
    for field in list(schema)[:MAX_COLUMNS]:
        content = DESCRIPTIONS.get(field.name, "from the manifest")
        lines.append(f"| {markdown(field.name)} | {markdown(str(field.type))} | {content} |")
    if (more := len(schema) - MAX_COLUMNS) > 0:
        lines.append(f"| and {plural(more, 'more column')} | | |")
    return "\n".join(lines)


def _origin(run: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{markdown(name)} {markdown(version)}" for name, version in sorted(run["versions"].items()))
    text = json.dumps(run["identity"], indent=1, sort_keys=True)
    if len(text) > MAX_JSON_CHARS:
        text = json.dumps({**run["identity"], "parallel": "see the metadata of the tables"}, indent=1, sort_keys=True)
    return (
        "Rendered by hv_batch, a batch renderer for HunyuanVideo. Its run has the fingerprint "
        f"`{run['fingerprint']}`. Versions: {versions or 'not recorded'}. Everything that determines the pixels, "
        f"except for the columns above:\n\n{code_block(text[:MAX_JSON_CHARS])}"
    )


def markdown(text: str) -> str:
    """A text as Markdown that shows it and means nothing else, on one line of at most MAX_NAME_CHARS characters."""
    line = " ".join(printable_text(clean_text(text)).split())
    line = line if len(line) <= MAX_NAME_CHARS else line[: MAX_NAME_CHARS - 1] + "…"
    return _MARKUP.sub(lambda found: {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(found[1], "\\" + found[1]), line)


def code_block(ascii_json: str) -> str:
    """JSON with ASCII escapes as a block of code."""
    return "```json\n" + ascii_json.replace("`", "\\u0060") + "\n```"


def facts_of_rows(
    rows: Sequence[Mapping[str, Any]], quarantined: int, schema: pa.Schema, withdrawn: int = 0
) -> CardFacts:
    """The facts of rows with `num_frames`, `fps` and `bytes`, of tables with this schema."""
    videos = [row for row in rows if row["num_frames"] > 1]
    seconds = sum(row["num_frames"] / row["fps"] for row in videos)
    total = sum(row["bytes"] for row in rows)
    return CardFacts(len(videos), len(rows) - len(videos), quarantined, total, round(seconds, 3), schema, withdrawn)
