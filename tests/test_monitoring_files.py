"""The monitoring files of cluster/: promtool runs the alerts, and every metric and label in them is one of the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml

from hv_batch.runtime.driver.metrics import DEFINITIONS, exported_names
from tests.support.repository import ROOT

CLUSTER = ROOT / "cluster"
RULES = yaml.safe_load((CLUSTER / "prometheus-rules.yaml").read_text())["groups"][0]["rules"]
EXPORTED = {export: name for name, it in DEFINITIONS.items() for export in exported_names(name, it.kind)}
OWN_LABELS = {"nights"}  # those that label_replace makes


def expressions():
    """(where, PromQL) of each alert and panel."""
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])


def labels_of(expression):
    lists = re.findall(r"\b(?:by|on|group_left) \(([\w, ]*)\)", expression)
    return {label for names in lists for label in names.split(", ") if label} | set(
        re.findall(r"[{,] ?(\w+)(?:=~|!~|!=|=)\"", expression)
    )


def test_the_alerts_fire_when_they_should_and_only_then():
    """P5: promtool evaluates the rules on the series of cluster/prometheus-tests.yaml."""
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is missing: `apt-get install prometheus`, or put it on PATH, to test the alerts")
    for command in (["check", "rules", "prometheus-rules.yaml"], ["test", "rules", "prometheus-tests.yaml"]):
        done = subprocess.run([promtool, *command], cwd=CLUSTER, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", sorted(rule["alert"] for rule in RULES))
def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(alert):
    cases = [
        bool(case["exp_samples"])
        for test in yaml.safe_load((CLUSTER / "prometheus-tests.yaml").read_text())["tests"]
        for case in test["promql_expr_test"]
        if alert in case["expr"]
    ]
    assert set(cases) == {True, False}


@pytest.mark.parametrize("where", sorted({where for where, _ in expressions()}))
def test_alerts_and_panels_use_metrics_and_labels_that_exist(where):
    """An alert or a panel on a misspelt metric, label or value would be empty for ever."""
    found = [expression for title, expression in expressions() if title == where]
    for expression in found:
        used = {EXPORTED.get(name) for name in re.findall(r"\bray_\w+", expression)}
        assert used
        assert None not in used, expression
        tags = {"run", *(tag for name in used for tag in DEFINITIONS[name].tags)}
        assert labels_of(expression) <= tags | OWN_LABELS | {"le"}
        values = {value for name in used for tag in DEFINITIONS[name].tags.values() for value in tag}
        for label, value in re.findall(r"(\w+)!?=\"([^\"$]*)\"", expression):
            assert value in values, f"{label} is never {value}"


def test_the_texts_of_alerts_and_panels_use_labels_of_their_result():
    for rule in RULES:
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert used <= set(re.findall(r"\bby \((\w+)\)", rule["expr"]))
        assert rule["annotations"]["remedy"]
        assert rule["labels"]["severity"] in {"page", "ticket"}
    for panel in json.loads((CLUSTER / "grafana.json").read_text())["panels"]:
        for target in panel["targets"]:
            used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert used <= labels_of(target["expr"]) | {
                t for n in re.findall(r"\bray_hv_\w+", target["expr"]) for t in DEFINITIONS[EXPORTED[n]].tags
            } | {"run"}


def test_the_panels_cover_what_an_operator_asks_for():
    text = " ".join(expression for _, expression in expressions())
    asked = ("eta_seconds", "gpu_seconds_total", "driver_loop_seconds", "output_root_away_seconds", "videos_total")
    assert not [name for name in asked if f"ray_hv_{name}" not in text]
    assert "$price" in text


def test_the_table_of_metrics_in_the_readme_is_that_of_the_code():
    section = (CLUSTER / "README.md").read_text().partition("## Monitoring")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(ray_hv_\w+)`(?: \(histogram\))? \| (.*) \| (.*) \|$", section, re.MULTILINE)
    expected = []
    for name, it in DEFINITIONS.items():
        shown = f"ray_{name}" + ("_total" if it.kind == "counter" else "")
        tags = "; ".join(f"`{tag}`: {', '.join(values)}" for tag, values in it.tags.items())
        expected.append((shown, tags, it.meaning))
    assert rows == expected
