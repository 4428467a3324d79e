"""Renders the report page as HTML: pure functions from records to markup, in the order of the page.

The page has inline styles and no external assets except the media in the output root (`../data/...`), so it can be
opened from a disk, a bucket browser or a notebook. Prompts, ids and error texts are untrusted: every value must pass
through `text`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any
from urllib.parse import quote

from hv_batch.job.formatting import duration, plural, size
from hv_batch.job.inspection.identity_counts import MAX_LINES as MAX_IDENTITIES
from hv_batch.job.inspection.identity_counts import name_paths
from hv_batch.job.manifest.extra_columns import clean_text
from hv_batch.job.quality import GOOD, describe_looks, look

MEDIA_ROOT = "../"  # from report/ to the root that the records' `file` is relative to

# The order of the data path; other stages follow. The stages in a record are in alphabetical order.
STAGE_ORDER = ("encode", "denoise", "decode")

Record = Mapping[str, Any]


def text(value: Any) -> str:
    """The value as escaped HTML text, safe inside an element and inside a quoted attribute."""
    return html.escape(clean_text(str(value)))


def page(name: str, run: Record, summary: Record, videos: Sequence[Record], quarantined: Sequence[Record]) -> str:
    """The whole page. `videos` and `quarantined` are the records to show, which may be fewer than `summary` counts."""
    template = resources.files(__package__).joinpath("report_page.html").read_text("utf-8")
    return Template(template).substitute(
        title=text(f"{name} - hv_batch"),
        over=text(f"{plural(summary['samples'], 'sample')} in {plural(summary['shards'], 'shard')}"),
        heading=text(name),
        pill=_pill(summary),
        bar=_bar(summary),
        tiles=_tiles(summary),
        panels=_panels(run, summary),
        quarantine=_quarantine(quarantined, summary["quarantined"]),
        gallery=_gallery(videos, summary),
        footer=text(f"Run {run['fingerprint'][:16]}"),
    )


def _pill(summary: Record) -> str:
    if summary["pending"]:
        return f'<span class="pill wait">{text(plural(summary["pending"], "sample"))} pending</span>'
    if summary["quarantined"]:
        return f'<span class="pill bad">finished, {summary["quarantined"]:,} quarantined</span>'
    if summary.get("withdrawn"):
        return f'<span class="pill good">finished, {summary["withdrawn"]:,} withdrawn</span>'
    return '<span class="pill good">all committed</span>'


def _bar(summary: Record) -> str:
    shares = "".join(
        f'<i class="{css}" style="flex-basis:{100 * count / summary["samples"]:.2f}%"></i>'
        for css, count in (("good", summary["committed"]), ("bad", summary["quarantined"]))
        if count
    )
    return f'<div class="bar">{shares}</div>'


def _tiles(summary: Record) -> str:
    media, gpu_seconds = summary["media"], summary["denoise_gpu_seconds"]
    facts = {
        "committed": f"{summary['committed']:,}",
        "quarantined": f"{summary['quarantined']:,}",
        "pending": f"{summary['pending']:,}",
        **({"withdrawn": f"{summary['withdrawn']:,}"} if summary.get("withdrawn") else {}),
        "of footage": duration(media["seconds"]),
        "frames": f"{media['frames']:,}",
        "of media": size(media["bytes"]),
    }
    if gpu_seconds is not None:
        facts["GPU time, denoising"] = duration(gpu_seconds)
    tiles = (f'<div class="tile"><b>{text(value)}</b><span>{name}</span></div>' for name, value in facts.items())
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _panels(run: Record, summary: Record) -> str:
    identities = summary.get("identities", ())
    panels = [
        ("panel", "Time by stage", _stages(summary["stages"])),
        ("panel", "Run", _table(_run_facts(run))),
        *([("panel", "This run has continued with changes", _identities(identities))] if identities else []),
        ("panel licence", "Licence of these videos", f"<p>{text(run['licence'])}</p>"),
    ]
    return "".join(f'<section class="{css}"><h3>{title}</h3>{body}</section>' for css, title, body in panels)


def _stages(stages: Mapping[str, Record]) -> str:
    rows = "".join(
        f'<tr><th>{text(name)}</th><td class="n">{text(duration(stage["seconds"]))}</td>'
        f'<td class="n">{text(duration(stage["mean_seconds"]))}</td></tr>'
        for name, stage in in_path_order(stages)
    )
    return f'<table><thead><tr><th></th><th class="n">total</th><th class="n">per video</th></tr></thead>{rows}</table>'


def _run_facts(run: Record) -> dict[str, Any]:
    config, manifest = run["config"], run["manifest"]
    parallel = run["identity"]["parallel"]
    plans = {_degrees(plan): None for plan in parallel.get("plans", {"": parallel}).values()}
    return {
        "Manifest": manifest["url"] if isinstance(manifest["url"], str) else ", ".join(manifest["url"]),
        "Rows": f"{manifest['rows']:,}",
        "Engine": config.get("model", {}).get("engine", ""),
        "Group": f"{parallel['device']}, {' or '.join(plans)}",
        "Run seed": config.get("seed", 0),
    }


def _identities(identities: Sequence[Record]) -> str:
    """What rendered the videos: one row for each identity of the run."""
    rows = "".join(
        f'<tr><th>{text(each["fingerprint"][:8])}</th><td class="n">{each["committed"]:,}</td>'
        f"<td>{text(each['replaced_at'] or 'now')}</td><td>{text(name_paths(each['changed']))}</td></tr>"
        for each in identities[-MAX_IDENTITIES:]
    )
    head = '<thead><tr><th>identity</th><th class="n">videos</th><th>until</th><th>then changed</th></tr></thead>'
    return f"<table>{head}{rows}</table>"


def _degrees(parallel: Record) -> str:
    branches = f"CFG {parallel['cfg_degree']} × " if parallel.get("cfg_degree", 1) > 1 else ""  # absent in older runs
    return f"{branches}Ulysses {parallel.get('ulysses_degree', 1)} × ring {parallel.get('ring_degree', 1)}"


def _table(facts: Record) -> str:
    return "<table>" + "".join(f"<tr><th>{text(k)}</th><td>{text(v)}</td></tr>" for k, v in facts.items()) + "</table>"


def _quarantine(records: Sequence[Record], total: int) -> str:
    if not records:
        return ""
    note = f'<p class="hint">The first {len(records):,} of {total:,}.</p>' if total > len(records) else ""
    return f"<section><h2>Quarantined</h2>{note}{''.join(map(_failed, records))}</section>"


def _failed(record: Record) -> str:
    trace = record["traceback"]
    details = f"<details><summary>Traceback</summary><pre>{text(trace)}</pre></details>" if trace else ""
    return (
        f'<article class="failed"><div class="id"><span>{text(record["id"])}</span>'
        f'<span class="bad">{text(record["class"])}, {text(plural(record["attempts"], "try", "tries"))}</span></div>'
        f'<p class="prompt" dir="auto">{text(record["params"]["prompt"])}</p>'
        f'<p class="why">{text(record["message"])}</p>{details}</article>'
    )


def _gallery(records: Sequence[Record], summary: Record) -> str:
    if not records:
        return '<p class="hint">No sample is committed yet.</p>'
    note, total = "", summary["committed"]
    if total > len(records):
        note = f'<p class="hint">The first {len(records):,} of {total:,} are shown; all are below data/.</p>'
    if looks := describe_looks(summary.get("looks", {})):
        note += f'<p class="hint">{text(looks)}.</p>'
    search = (
        '<input class="filter" type="search" hidden aria-label="Filter the videos" '
        'placeholder="Filter by prompt, id, size, seed">'
    )
    return f'{search}{note}<div class="grid">{"".join(map(_card, records))}</div>'


def _card(record: Record) -> str:
    params = record["params"]
    chips = [f"{params['width']} × {params['height']}"]
    chips += ["image"] if params["num_frames"] == 1 else [f"{params['num_frames']} frames", f"{record['fps']} fps"]
    chips += [
        f"{params['num_inference_steps']} steps",
        f"seed {params['seed']}",
        f"guidance {params['guidance_scale']:g}",
    ]
    chips += [f"CFG {params['cfg_scale']:g}"] if params["cfg_scale"] > 1 else []
    chips += [seen] if (seen := _look(record)) not in ("", GOOD) else []
    return (
        f'<article class="card"><div class="stage">{_media(record)}</div><div class="text">'
        f'<div class="id"><span>{text(record["id"])}</span>'
        f'<a href="{_link(record)}">{text(size(record["bytes"]))}</a></div>'
        f'<p class="prompt" dir="auto">{text(params["prompt"])}</p>'
        f'<div class="chips">{"".join(f"<span>{text(chip)}</span>" for chip in chips)}</div>'
        f"<details><summary>Details</summary>{_table(_more(record))}</details></div></article>"
    )


def _look(record: Record) -> str:
    """The look of the video, for a chip; empty if the record has no scores."""
    scores = record.get("scores")
    return look(scores, record["produced"]["num_frames"]) if scores else ""


def _media(record: Record) -> str:
    if record["params"]["num_frames"] == 1:
        return f'<img src="{_link(record)}" alt="{text(record["params"]["prompt"])}" loading="lazy">'
    poster = f' poster="{text(MEDIA_ROOT + quote(record["poster"]))}"' if record.get("poster") else ""
    return f'<video src="{_link(record)}"{poster} muted loop autoplay playsinline controls preload="metadata"></video>'


def _link(record: Record) -> str:
    return text(MEDIA_ROOT + quote(record["file"]))


def _more(record: Record) -> dict[str, Any]:
    params = record["params"]
    facts: dict[str, Any] = {"Row": record["row"]}
    if params["cfg_scale"] > 1:
        facts |= {"Negative prompt": params["negative_prompt"], "Guidance rescale": params["guidance_rescale"]}
    facts["Flow shift"] = params["flow_shift"]
    facts |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in record["extra"].items()}
    facts |= {name.capitalize(): duration(seconds) for name, seconds in in_path_order(record["stages"])}
    facts |= {name.replace("_", " ").capitalize(): f"{value:g}" for name, value in (record.get("scores") or {}).items()}
    answer = record.get("hook") or {}
    facts |= {f"Hook: {name}": value if isinstance(value, str) else json.dumps(value) for name, value in answer.items()}
    return facts | {"Tries": record["attempts"]}


def in_path_order(stages: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The items of `stages` (of a record or a summary) in the order of the data path, then any others by name."""
    known = [name for name in STAGE_ORDER if name in stages]
    return [(name, stages[name]) for name in known + sorted(stages.keys() - set(STAGE_ORDER))]
