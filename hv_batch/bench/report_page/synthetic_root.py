"""An output root of a synthetic report: documents, records, posters and clips, without a render."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hv_batch.bench.report_page.synthetic import SyntheticReport
from hv_batch.job import layout
from hv_batch.job.report.page import render_page

VARIANTS = 8  # different posters


def commit_record(sample: Mapping[str, Any], shard: int) -> dict[str, Any]:
    """A commit or quarantine record of a sample of a part."""
    params = {
        "prompt": sample["prompt"], "negative_prompt": "", "height": sample["height"], "width": sample["width"],
        "num_frames": sample["frames"], "num_inference_steps": sample["steps"], "seed": sample["seed"],
        "guidance_scale": 6.0, "cfg_scale": 1.0, "guidance_rescale": 0.0, "flow_shift": 7.0,
    }  # fmt: skip
    common = {"key": sample["key"], "id": sample["id"], "row": 1, "video_index": sample["video"], "shard": shard,
              "params": params, "attempts": 1, "history": [], "versions": {"hv_batch": "0.2.0", "torch": "2.13.0"},
              "fingerprint": "c3" * 32, "created_at": "2026-11-29T01:00:00+00:00"}  # fmt: skip
    if sample["state"] != "committed":
        failure = {"class": sample["class"], "message": sample["message"], "traceback": "Traceback ...\nValueError"}
        return {"schema": "hv_batch/quarantine/1", **common, **failure}
    places = {
        "encode": {"node": "10.0.0.4", "worker": "encode-0.0"},
        "denoise": {"node": "10.0.0.5", "worker": "denoise-0.0", "group": "Ulysses 8 x ring 1", "ranks": 8},
        "decode": {"node": "10.0.0.6", "worker": "decode-0.0", "upload_seconds": 0.4},
    }
    return {"schema": "hv_batch/commit/1", **common, "file": sample["file"], "sha256": "ab" * 32, "fps": 24,
            "bytes": sample["bytes"], "poster": sample["poster"], "frames_sha256": "cd" * 32, "extra": sample["facets"],
            "produced": {"num_frames": sample["frames"], "height": sample["height"], "width": sample["width"]},
            "stages": sample["seconds"], "places": places, "licence": "tencent-hunyuan-community"}  # fmt: skip


def write_root(root: Path, documents: SyntheticReport, *, clip_bytes: int = 20_000_000, media: bool = True) -> None:
    """Write the documents, records, posters and clips below `root`. The media are hard links to a few files."""
    _write(root / "report/report.json", json.dumps(documents.report))
    _write(root / layout.REPORT, render_page(documents.report, documents.first))
    for name, part in documents.parts.items():
        _write(root / "report" / name, json.dumps(part))
        for sample in part["samples"]:
            if sample["state"] in ("committed", "quarantined") and layout.is_sample_key(sample["key"]):
                key = layout.commit_key if sample["state"] == "committed" else layout.quarantine_key
                _write(root / key(part["shard"], sample["key"]), json.dumps(commit_record(sample, part["shard"])))
    if media:
        _link_media(root, documents.samples, clip_bytes)


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")


def _link_media(root: Path, samples: Sequence[Mapping[str, Any]], clip_bytes: int) -> None:
    posters, clips = {}, {}
    for number, sample in enumerate(sample for sample in samples if sample["file"]):
        shape, variant = (sample["height"], sample["width"]), number % VARIANTS
        if shape not in clips:
            clips[shape] = root / f".clip-{shape[0]}.mp4"
            write_clip(clips[shape], *shape, clip_bytes)
        if (*shape, variant) not in posters:
            posters[*shape, variant] = root / f".poster-{shape[0]}-{variant}.jpg"
            posters[*shape, variant].write_bytes(poster(*shape, variant))
        for field, source in (("file", clips[shape]), ("poster", posters[*shape, variant])):
            target = root / sample[field]
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)


def poster(height: int, width: int, variant: int) -> bytes:
    """A JPEG of at most 640 pixels width: a sky, a sun and a skyline."""
    from PIL import Image, ImageDraw, ImageOps

    size = (160, 160 * height // width) if width >= height else (160 * width // height, 160)
    rng = random.Random(variant)
    ground, sky = (tuple(rng.randrange(*span) for _ in range(3)) for span in ((10, 90), (110, 250)))
    picture = ImageOps.colorize(Image.linear_gradient("L").resize(size), sky, ground)
    draw, radius = ImageDraw.Draw(picture), size[1] // 9
    x, y = rng.randrange(radius, size[0] - radius), rng.randrange(radius, size[1] // 2)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 236, 200))
    for _ in range(9):
        left, top = rng.randrange(size[0]), rng.randrange(size[1] // 2, size[1])
        draw.rectangle((left, top, left + rng.randrange(5, 22), size[1]), fill=ground)
    encoded = io.BytesIO()
    picture.resize((4 * size[0], 4 * size[1]), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=82)
    return encoded.getvalue()


def write_clip(path: Path, height: int, width: int, size: int) -> None:
    """Write a playable MP4 of `size` bytes: two seconds of video, then an empty box, which takes no disk space."""
    from imageio_ffmpeg import get_ffmpeg_exe

    source = f"testsrc=size={width // 8 * 2}x{height // 8 * 2}:rate=12:duration=2"
    command = [get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p",
               "-c:v", "libx264", "-preset", "ultrafast", str(path)]  # fmt: skip
    subprocess.run(command, check=True, timeout=60)
    padding = size - path.stat().st_size
    if padding < 8:
        raise ValueError(f"a clip of {size} bytes is too small; it must have at least {path.stat().st_size + 8}")
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(struct.pack(">I4s", padding, b"free"))
        file.truncate(size)
