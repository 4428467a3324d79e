"""Public prompt sets: the table in hv_batch/job/README.md, each row with a file of the same layout.

The files are written here. None of their texts comes from the sets.
"""

import csv
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hv_batch.cli.run_flags import with_manifest_flags
from hv_batch.job.config.run_config import RunConfig
from tests.support.manifests import check_file, refusal_of
from tests.support.repository import ROOT

README = ROOT / "hv_batch" / "job" / "README.md"
PROMPTS = ["A kite above a beach", "A clock, close up", "Café at night", "A clock, close up"]  # one is repeated


def lines(end="\n", last=""):
    return (end.join(PROMPTS) + last).encode()


def as_json(value):
    return json.dumps(value, indent=2).encode()


def as_jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(header, *rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue().encode()


def as_parquet(columns):
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


MEDIA = pa.array([{"bytes": b"\0" * 1000, "path": "a.mp4"}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
FULL_INFO = [{"prompt_en": text, "dimension": ["color"], "auxiliary_info": {"color": "red"}} for text in PROMPTS[:2]]
VALIDATION = {
    "caption": "A kite",
    "image_path": None,
    "video_path": None,
    "num_inference_steps": 20,
    "height": 480,
    "width": 832,
    "num_frames": 77,
}
COSMOS = {
    "inference_type": "text2world",
    "name": "kite",
    "prompt": "A kite",
    "input_path": None,
    "num_output_frames": 93,
    "seed": 0,
    "guidance": 7,
    "num_steps": 35,
}
OPENVID = ["a.mp4", "A kite", 5.1, 3.2, 0.99, "pan_left", 120, 29.97, 4.0]
OPENVID_NAMES = [
    "video",
    "caption",
    "aesthetic score",
    "motion score",
    "temporal consistency score",
    "camera motion",
    "frame",
    "fps",
    "seconds",
]
MINDONE = {"path": "a.mp4", "resolution": {"height": 1080, "width": 1920}, "cap": "A", "fps": 23.976, "num_frames": 120}
VIDPROM_NAMES = [
    "uuid",
    "prompt",
    "time",
    "toxicity",
    "obscene",
    "identity_attack",
    "insult",
    "threat",
    "sexual_explicit",
]
VIDPROM = ["00a-1", "A kite", "2023-10-01", 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
PENGUIN = as_csv(["", "prompt"], *([str(n), text] for n, text in enumerate(PROMPTS)))
BATCH = {"custom_id": "r-1", "method": "POST", "url": "/v1/videos", "body": {"prompt": "A kite"}}

# file of the table -> its content, and the expected number of videos (0: refused, with a part of the message)
SETS = {
    "hunyuan_all_dimension.txt": (lines("\r\n"), 4),
    "VBench_full_info.json": (as_json(FULL_INFO), 2),
    "VBench2_full_text.txt": (lines(last="\n"), 4),
    "VBench2_text_info.json": (as_json({"A kite": {"caption": "A red kite", "dimension": "color"}}), "with the key"),
    "PenguinVideoBenchmark.csv": (PENGUIN, 4),
    "VidProM_unique.csv": (as_csv(VIDPROM_NAMES, VIDPROM), 1),
    "vidprom.parquet": (as_parquet(dict(zip(VIDPROM_NAMES, ([value] for value in VIDPROM), strict=True))), 1),
    "OpenVid-1M.csv": (as_csv(OPENVID_NAMES, OPENVID), 1),
    "mindone.json": (as_json([MINDONE]), 1),
    "validation.json": (as_json({"data": [VALIDATION]}), 1),
    "captions.csv": (as_csv(["video", "caption"], ["a.mp4", "A kite"]), 1),
    "prompt.txt": (lines(), 4),
    "diffsynth_metadata.csv": (as_csv(["video", "prompt"], ["a.mp4", "A kite"]), 1),
    "musubi.txt": (b"# 1: a kite\nA kite --w 640 --h 480 --f 25 --d 1 --s 20\n\nA clock --w 960 --h 544 --f 1\n", 2),
    "cosmos.jsonl": (as_jsonl(COSMOS), 1),
    "hf_videos.parquet": (as_parquet({"video": MEDIA, "caption": ["A kite", "A clock"]}), 2),
    "openai_batch.jsonl": (as_jsonl(BATCH), "prompt is missing"),
    "comfyui_api.json": (as_json({"3": {"class_type": "KSampler", "inputs": {"steps": 20}}}), "with the key"),
}


def documented():
    """File -> the flags of its row in the table."""
    section = README.read_text("utf-8").partition("### Public prompt sets")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|[^|]*\|[^|]*`([^`|]+)`[^|]*\|([^|]*)\|[^|]*\|$", section, re.MULTILINE)
    return {file: re.findall(r"`(--[^`]+)`", flags) for file, flags in rows}


def options_of(flags):
    parts = [part for flag in flags for part in flag.replace("'", "").split(" --")]
    pairs = [part.removeprefix("--").split(" ", 1) for part in parts]
    column = [value for name, value in pairs if name == "column"]
    carry = [value for name, value in pairs if name == "carry"]
    return with_manifest_flags(RunConfig(), column, carry, None).manifest.model_dump()


@pytest.mark.parametrize("file", SETS)
def test_a_public_prompt_set_is_read_with_the_flags_of_the_table(file, tmp_path):
    """The table says what to type; a set that needs flags is refused without them, with a remedy."""
    content, expected = SETS[file]
    (tmp_path / file).write_bytes(content)
    flags = documented()[file]
    if isinstance(expected, str):
        assert expected in refusal_of(tmp_path / file)
        return
    samples = list(check_file(tmp_path / file, **options_of(flags)))
    assert len(samples) == expected
    assert not any("--" in sample.params.prompt for sample in samples)
    if flags and any("prompt=" in flag or "steps" in flag for flag in flags):
        assert "--column" in refusal_of(tmp_path / file)


def test_every_row_of_the_table_is_tested():
    """A set that is added to the table needs a file here."""
    assert documented().keys() == SETS.keys()


def test_the_values_of_a_mapped_set_reach_the_videos(tmp_path):
    """The parameters of Cosmos, musubi-tuner and FastVideo, which were once lost."""

    def first(file):
        (tmp_path / file).write_bytes(SETS[file][0])
        return next(iter(check_file(tmp_path / file, **options_of(documented()[file]))))

    cosmos = first("cosmos.jsonl")
    assert (cosmos.key, cosmos.params.num_frames, cosmos.params.num_inference_steps) == ("kite", 93, 35)
    assert cosmos.params.cfg_scale == 7.0
    musubi = first("musubi.txt").params
    assert (musubi.width, musubi.height, musubi.num_frames, musubi.seed) == (640, 480, 25, 1)
    fastvideo = first("validation.json").params
    assert (fastvideo.prompt, fastvideo.num_frames, fastvideo.num_inference_steps) == ("A kite", 77, 20)
    openvid = first("OpenVid-1M.csv")
    assert (openvid.fps, openvid.extra["extra_fps"], openvid.extra["frame"]) == (24, "29.97", "120")
