"""The documents of a report of a run that never was: the same for the same arguments."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hv_batch.job import layout

SHAPES = ((720, 1280, 129), (960, 960, 65), (1280, 720, 97))  # height, width, frames
CAUSES = (
    (
        "POISON",
        "ValueError: latents of step # are not finite",
        "Traceback (most recent call last):\n  File ...\nValueError",
    ),
    ("GPU_OOM", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate # GiB", ""),
)
SUBJECTS = (
    "a lighthouse",
    "an old tram",
    "a field of barley",
    "two dancers",
    "a paper boat",
    "the market hall",
    "a fox",
)
PLACES = ("at dusk", "in heavy rain", "under northern lights", "seen from above", "in the first snow", "by the harbour")
STYLES = (
    "35 mm film, shallow depth of field, slow dolly towards the subject",
    "hand-held camera, natural light, muted colours, a long lens that compresses the background",
    "a single continuous shot that begins on a detail and ends on the whole scene",
)
START = 1_790_000_000.0
FIRST = 60


def synthetic_samples(samples: int, *, videos: int = 1, committed: float = 0.97) -> Iterator[dict[str, Any]]:
    """Yield samples as in a part, in the order of the plan. `committed` is their share; the rest fails or waits."""
    rng = random.Random(21)
    for number in range(samples):
        row, video = divmod(number, videos)
        height, width, frames = SHAPES[row % len(SHAPES)]
        key = f"{SUBJECTS[row % len(SUBJECTS)].split()[-1]}-{row:06d}" + (f".v{video}" if videos > 1 else "")
        prompt = (
            f"{SUBJECTS[row % len(SUBJECTS)]} {PLACES[row % len(PLACES)]}, {STYLES[row % len(STYLES)]}".capitalize()
        )
        draw = rng.random()
        state = "committed" if draw < committed else "quarantined" if draw < committed + 0.02 else "pending"
        done, failed = state == "committed", CAUSES[row % len(CAUSES)] if state == "quarantined" else None
        yield {
            "id": key, "key": key, "row": f"row-{row:06d}", "video": video, "state": state, "prompt": prompt,
            "file": f"data/%s/{key}-{number:08x}.mp4" if done else None,
            "poster": f"posters/%s/{key}-{number:08x}.jpg" if done else None,
            "bytes": 20_000_000 if done else 0, "width": width, "height": height, "frames": frames, "fps": 24,
            "steps": 50, "seed": rng.getrandbits(63), "guidance": 6.0, "cfg": 1.0,
            "flags": ["still"] if rng.random() < 0.01 else [],
            "facets": {"category": PLACES[row % len(PLACES)], "camera": STYLES[row % len(STYLES)].split(",")[0]},
            "class": failed and failed[0], "message": failed and failed[1].replace("#", str(row % 50)),
            "seconds": {"encode": 0.4, "denoise": 60 + 20 * rng.random(), "decode": 9 + rng.random()} if done else {},
        }  # fmt: skip


class SyntheticReport:
    """The documents of one report: `report`, `parts` by their names in report/, and the samples themselves."""

    def __init__(self, samples: Sequence[dict[str, Any]], *, shard_size: int = 250, running: bool = False) -> None:
        self.parts: dict[str, dict[str, Any]] = {}
        self.samples: list[dict[str, Any]] = []
        shards, facets = (
            [],
            {name: Counter[str]() for name in ("state", "shape", "class", "flags", "category", "camera")},
        )
        for shard, start in enumerate(range(0, len(samples), shard_size)):
            members = [_in_shard(sample, shard) for sample in samples[start : start + shard_size]]
            self.samples += members
            name = f"parts/{layout.shard_name(shard)}.json"
            self.parts[name] = {"schema": "hv_batch/report_part/1", "shard": shard, "samples": members}
            counts = {name: Counter[str]() for name in facets}
            for sample in members:
                for facet, values in _facets(sample).items():
                    counts[facet].update(values)
            for facet, found in counts.items():
                facets[facet].update(found)
            size = 900 * len(members)  # about
            shards.append(
                {
                    "shard": shard,
                    "samples": len(members),
                    **_states(members),
                    "part": name,
                    "bytes": size,
                    "facets": counts,
                }
            )
        self.report = self._report(shards, facets, running)
        self.first = [{**sample, "shard": number // shard_size} for number, sample in enumerate(self.samples[:FIRST])]

    def _report(self, shards: list[dict[str, Any]], facets: Mapping[str, Any], running: bool) -> dict[str, Any]:
        states, done = _states(self.samples), [sample for sample in self.samples if sample["state"] == "committed"]
        wall = 8 * 3600.0
        return {
            "schema": "hv_batch/report/1", "generated_at": START + wall, "finished": not states["pending"],
            "running": running, "refresh_s": 60 if running else None, "name": "harbour-night-17",
            "run": {
                "manifest": "s3://studio/prompts/harbour.parquet", "rows": len({s["row"] for s in self.samples}),
                "engine": "hv_batch.engine.hunyuan:HunyuanVideo", "group": "cuda, Ulysses 8 × ring 1", "seed": 7,
                "fingerprint": "c3" * 32, "licence": "Tencent Hunyuan Community License Agreement. " * 4,
                "identities": [{"identity": "c3c3c3c3", "videos": len(done), "until": "now", "then changed": ""}],
            },
            "totals": {
                "samples": len(self.samples), **states,
                "media": {"seconds": sum(s["frames"] / s["fps"] for s in done),
                          "frames": sum(s["frames"] for s in done), "bytes": sum(s["bytes"] for s in done)},
                "gpu_seconds": {"denoise": 70.0 * len(done), "decode": 9.5 * len(done), "encode": 0.4 * len(done),
                                "start_up": 9000.0, "idle": 4000.0, "lost": 2500.0},
                "wall_seconds": wall, "price_per_gpu_hour": 2.5,
            },
            "shards": shards, "facets": facets, "causes": _causes(self.samples), "stages": _spreads(done),
            "progress": _progress(states, wall), "timeline": _timeline(wall), "eta_s": 5400.0 if running else None,
        }  # fmt: skip


def _in_shard(sample: dict[str, Any], shard: int) -> dict[str, Any]:
    name = layout.shard_name(shard)
    return {**sample, **{field: sample[field] and sample[field].replace("%s", name) for field in ("file", "poster")}}


def _shape(sample: Mapping[str, Any]) -> str:
    return f"{sample['height']}x{sample['width']}x{sample['frames']}"


def _facets(sample: Mapping[str, Any]) -> dict[str, list[str]]:
    kinds = [sample["class"]] if sample["class"] else []
    return {"state": [sample["state"]], "shape": [_shape(sample)], "class": kinds, "flags": sample["flags"]} | {
        name: [value] for name, value in sample["facets"].items()
    }


def _states(samples: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts = Counter(sample["state"] for sample in samples)
    return {state: counts[state] for state in ("committed", "quarantined", "withdrawn", "pending")}


def _causes(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    causes = []
    for kind, message, trace in CAUSES:
        failed = [sample for sample in samples if sample["class"] == kind]
        examples = [{name: sample[name] for name in ("id", "key", "prompt")} | {"shard": 0} for sample in failed[:3]]
        retry = f"hv-batch retry s3://studio/harbour-night-17 --class {kind} --yes"
        cause = {"class": kind, "message": message, "count": len(failed), "examples": examples}
        causes += [{**cause, "traceback": trace, "retry": retry}] if failed else []
    return causes


def _spreads(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    spreads: dict[str, Any] = {}
    by_shape: dict[str, list[Mapping[str, float]]] = {}
    for sample in done:
        by_shape.setdefault(_shape(sample), []).append(sample["seconds"])
    for shape, seconds in sorted(by_shape.items()):
        for stage in ("encode", "denoise", "decode"):
            times = sorted(each[stage] for each in seconds)
            pick = {f"p{share}": times[len(times) * share // 100] for share in (10, 50, 90)}
            spread = {"count": len(times), "mean": sum(times) / len(times), **pick, "max": times[-1] * 1.3}
            spreads.setdefault(shape, {})[stage] = spread
    return spreads


def _progress(states: Mapping[str, int], wall: float) -> list[list[float]]:
    points, total = [], sum(states.values())
    for step in range(121):
        share = min(1.0, max(0.0, (step - 4 - min(10, max(0, step - 60))) / 106))
        committed, quarantined = int(states["committed"] * share), int(states["quarantined"] * share)
        points.append([START + wall * step / 120, committed, quarantined, total - committed - quarantined])
    return points


def _timeline(wall: float) -> dict[str, Any]:
    rng, rows = random.Random(3), []
    for stage, workers, gpus in (("encode", 1, 0.2), ("denoise", 8, 8), ("decode", 4, 0.2)):
        for worker in range(workers):
            at = START + 240.0 + 60 * rng.random()
            spans: list[list[Any]] = [[START, at, "start", 0]]
            while at < START + wall:
                until = min(START + wall, at + 600 + 3000 * rng.random())
                spans.append([at, until, "work", int((until - at) // 70)])
                gap, kind = rng.choice([(200, "idle"), (400, "start"), (300, "drain"), (60, "lost")])
                spans.append([until, min(START + wall, until + gap), kind, 0])
                at = until + gap
            rows.append({"worker": f"{stage}-{worker}.0", "stage": stage, "node": f"10.0.0.{worker + 4}", "gpus": gpus,
                         "spans": spans})  # fmt: skip
    return {"from": START, "to": START + wall, "rows": rows}
