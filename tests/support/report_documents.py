"""Report documents for the tests of the report page: hostile ones, and strategies for random ones."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from hv_batch.bench.report_page.synthetic import SyntheticReport, synthetic_samples

# Each would set window.hacked, or fetch from another host, if a page took it for markup, for a script or for a URL.
ATTACKS = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=2</script>",
    "<!--<script>window.hacked=3</script>",
    '"><img src=x onerror="window.hacked=4">',
    "<svg onload=window.hacked=5>",
    "javascript:window.hacked=6",
    "<iframe srcdoc='<script>parent.hacked=7</script>'></iframe>",
    "{{constructor.constructor('window.hacked=8')()}} ${window.hacked=8}",
    "<a href=//evil.invalid/>x</a><link rel=stylesheet href=//evil.invalid/s.css>",
    "]]>&lt;script&gt;window.hacked=9&lt;/script&gt;\u2028\u2029\u202eesrever \x00\x1b[2J",
    "'; window.hacked=10; '\\",
    "__proto__",
)
# Paths that are not those of the sample. None may become a URL.
PATHS = (
    "javascript:window.hacked=11",
    "//evil.invalid/data/shard-00000/x-00000000.mp4",
    "data/shard-00000/../../../etc/passwd-00000000.mp4",
    "https://evil.invalid/a.mp4",
    "data:text/html,<script>window.hacked=12</script>",
    "data/shard-00001/other-00000000.mp4",
    "data/shard-00000/h0-00000000.svg",
)


def hostile_report(samples: int = 40) -> SyntheticReport:
    """A report in which every free text is an attack. Keys are those that hv_batch allows; some are not, too."""
    documents = SyntheticReport(list(synthetic_samples(samples, committed=0.6)), shard_size=20)
    for number, sample in enumerate(documents.samples):
        attack = ATTACKS[number % len(ATTACKS)]
        key = f"h{number}" if number % 7 else attack
        sample |= {"id": attack, "prompt": attack * 3, "key": key, "message": attack, "flags": [attack], "row": attack}
        sample |= {"facets": {attack: attack, "category": attack}, "class": sample["class"] and attack}
        sample |= {field: PATHS[number % len(PATHS)] for field in ("file", "poster")}
    documents.first = [{**sample, "shard": number // 20} for number, sample in enumerate(documents.samples)]
    report = documents.report
    report["name"] = ATTACKS[1]
    report["run"] = {attack: attack for attack in ATTACKS} | {"rows": [{attack: attack for attack in ATTACKS}]}
    report["facets"] = {attack: {attack: 3} for attack in ATTACKS} | {"state": {"committed": 9, ATTACKS[0]: 4}}
    for cause in report["causes"]:
        cause |= {"class": ATTACKS[3], "message": ATTACKS[1], "traceback": ATTACKS[2], "retry": ATTACKS[5]}
        cause["examples"] = [{"id": a, "key": a, "shard": 0, "prompt": a} for a in ATTACKS[:3]]
    for row in report["timeline"]["rows"]:
        row |= {"worker": ATTACKS[4], "stage": ATTACKS[0], "node": ATTACKS[3]}
    report["stages"] = {ATTACKS[0]: {ATTACKS[3]: {"count": 1, "mean": 1, "p10": 1, "p50": 1, "p90": 1, "max": 2}}}
    report["totals"]["gpu_seconds"] = {ATTACKS[3]: 100.0, "denoise": 5.0}
    return documents


def misshapen_report() -> dict[str, Any]:
    """A document of the right schema in which every field has a wrong type."""
    report = json.loads(json.dumps(SyntheticReport(list(synthetic_samples(3))).report))
    wrong: tuple[Any, ...] = (None, "text", -7, [[]], {"a": {"b": []}}, [None, 3, "x"], True, 1e300)
    names = sorted(report.keys() - {"schema"})
    return report | {name: wrong[number % len(wrong)] for number, name in enumerate(names)}


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON value, with texts that contain attacks, control characters and lone surrogates."""
    characters = st.characters(codec=None, exclude_categories=())
    texts = st.sampled_from(ATTACKS) | st.text(characters, max_size=20)
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
