"""The document `report/report.json`, from the sums over all shards, the run and its events.

schema, generated_at (unix s), finished, running (a live lease), refresh_s (of an open page, or null), name
run          facts to show: manifest, rows, engine, group, seed, fingerprint, licence, identities
totals       samples, committed, quarantined, withdrawn, pending; media: seconds, frames, bytes; gpu_seconds: by use
             or loss; wall_seconds; price_per_gpu_hour or null
shards       shard, the counts of samples, part (relative to report/, or null if it has no record yet), bytes of the
             part, facets
facets       facet -> value -> samples, most frequent first; the rest is "other". They count the samples of the parts:
             pending samples of a shard without a part are in `totals` only
causes       class, message, count, examples (id, key, shard, prompt), traceback, retry (a command)
stages       shape -> stage -> count, mean, min, p10, p50, p90, max (seconds)
progress     [unix time, committed, quarantined, pending], at most `pace.MAX_POINTS`
timeline     from, to, rows: worker, stage, node, gpus, spans: [from, to, what, samples] (`timeline`)
eta_s        seconds until no sample is pending, or null
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hv_batch.job.documents.report import REPORT_SCHEMA
from hv_batch.job.event_log.reader import DriverEvents
from hv_batch.job.redaction import public_url
from hv_batch.job.report.causes import with_retry
from hv_batch.job.report.gpus import Gpus
from hv_batch.job.report.pace import Pace
from hv_batch.job.report.samples import clamp
from hv_batch.job.report.sums import ReportSums
from hv_batch.job.report.timeline import Timeline, make_timeline

MAX_IDENTITIES = 20
MAX_CHANGES = 20
MAX_FACT_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When and in which state of the run a report was made."""

    now: float  # unix seconds
    running: bool
    refresh_s: int | None
    price_per_gpu_hour: float | None


def make_document(
    url: str,
    run: Mapping[str, Any],
    sums: ReportSums,
    events: Sequence[DriverEvents],
    gpus: Gpus,
    moment: Moment,
) -> dict[str, Any]:
    """`run` is the run.json of the root at `url`."""
    pace = Pace(sums.committed_at, sums.quarantined_at, sums.counts["samples"], sums.counts["withdrawn"])
    timeline = make_timeline(events, sums.spans(), sums.finished_at(), now=moment.now if moment.running else None)
    facets = sums.facets()
    return {
        "schema": REPORT_SCHEMA,
        "generated_at": round(moment.now),
        "finished": sums.is_finished,
        "running": moment.running,
        "refresh_s": moment.refresh_s,
        "name": clamp(root_name(url), 200),
        "run": describe_run(run, sums),
        "totals": _totals(sums, timeline, moment),
        "shards": sums.shards(facets),
        "facets": facets,
        "causes": with_retry(sums.causes, public_url(url)),
        "stages": sums.spreads.to_dict(),
        "progress": pace.points(timeline.begin),
        "timeline": timeline.to_dict(),
        "eta_s": _eta(pace, sums, moment),
    }


def root_name(url: str) -> str:
    public = public_url(url).rstrip("/")
    return public.rpartition("/")[2] or public


def _totals(sums: ReportSums, timeline: Timeline, moment: Moment) -> dict[str, Any]:
    return {
        **sums.counts,
        "media": {**sums.media, "seconds": round(sums.media_seconds, 3)},
        "gpu_seconds": timeline.gpu_seconds(sums.gpu_seconds),
        "wall_seconds": round(timeline.wall_seconds),
        "price_per_gpu_hour": moment.price_per_gpu_hour,
    }


def _eta(pace: Pace, sums: ReportSums, moment: Moment) -> int | None:
    eta_s = pace.eta_s(moment.now, sums.counts["pending"]) if moment.running else None
    return None if eta_s is None else round(eta_s)


def describe_run(run: Mapping[str, Any], sums: ReportSums) -> dict[str, Any]:
    """The facts of run.json that the report shows."""
    config, manifest, parallel = run["config"], run["manifest"], run["identity"]["parallel"]
    plans = dict.fromkeys(map(_degrees, parallel.get("plans", {"": parallel}).values()))
    urls = [manifest["url"]] if isinstance(manifest["url"], str) else manifest["url"]
    return {
        "manifest": clamp(", ".join(map(public_url, urls)), MAX_FACT_CHARS),
        "rows": manifest["rows"],
        "engine": clamp(config.get("model", {}).get("engine", ""), MAX_FACT_CHARS),
        "group": clamp(f"{parallel['device']}, {' or '.join(plans)}", MAX_FACT_CHARS),
        "seed": config.get("seed", 0),
        "fingerprint": run["fingerprint"],
        "licence": clamp(run["licence"], MAX_FACT_CHARS),
        "identities": _identities(run, sums),
    }


def _identities(run: Mapping[str, Any], sums: ReportSums) -> list[dict[str, Any]]:
    """The identities of a run that has continued with changes, oldest first, with the committed samples of each."""
    earlier = run.get("earlier", ())
    steps = [(each["fingerprint"], each["replaced_at"], each["changed"]) for each in earlier]
    steps.append((run["fingerprint"], None, ()))
    last = {fingerprint: at for at, (fingerprint, _, _) in enumerate(steps)}
    lines = [
        {
            "fingerprint": fingerprint,
            # An identity to which the run went back is counted where it is named last.
            "committed": sums.fingerprints[fingerprint] if last[fingerprint] == at else 0,
            "replaced_at": replaced_at,
            "changed": [clamp(path, 200) for path in changed[:MAX_CHANGES]],
        }
        for at, (fingerprint, replaced_at, changed) in enumerate(steps)
    ]
    return lines[-MAX_IDENTITIES:] if earlier else []


def _degrees(parallel: Mapping[str, Any]) -> str:
    branches = f"CFG {parallel['cfg_degree']} × " if parallel.get("cfg_degree", 1) > 1 else ""  # absent in older runs
    return f"{branches}Ulysses {parallel.get('ulysses_degree', 1)} × ring {parallel.get('ring_degree', 1)}"
