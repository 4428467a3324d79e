"""hv_batch missing on a node, or in another version, ends the run at once, with the node and the remedy (D4)."""

from __future__ import annotations

import shutil

import pytest

from hv_batch import __version__
from tests.support.repository import ROOT
from tests.support.runs import command, finish, records, render, start, wait_for, write_config, write_manifest

pytestmark = pytest.mark.slow  # each adds nodes

MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "hv_batch":
            raise ModuleNotFoundError("No module named 'hv_batch'", name="hv_batch")

sys.meta_path.insert(0, Missing())
"""
REMEDY = f"Every node needs hv_batch {__version__}"


@pytest.fixture(params=["missing", "other"])
def environment(request, tmp_path):
    """What makes a node one without hv_batch, or with another version; and how the message names that."""
    code = tmp_path / "code"
    code.mkdir()
    if request.param == "missing":
        (code / "sitecustomize.py").write_text(MISSING)
        return {"PYTHONPATH": str(code)}, "No module named 'hv_batch'"
    shutil.copytree(ROOT / "hv_batch", code / "hv_batch")
    (code / "hv_batch" / "__init__.py").write_text('__version__ = "0.0.9"\n')
    (code / "sitecustomize.py").write_text(
        "import sys\nimport hv_batch\nassert hv_batch.__version__ == '0.0.9'\n"  # before Ray adds the driver's folders
    )
    return {"PYTHONPATH": str(code)}, "has hv_batch 0.0.9"


def test_a_node_without_the_code_ends_the_run_before_it_starts(fleet, tmp_path, marks, environment):
    variables, reason = environment
    node = fleet.add_node(gpus=2, environment=variables)
    config, output = write_config(tmp_path, marks), tmp_path / "out"
    code, text = render(config, write_manifest(tmp_path, ["one"]), output, fleet.address)
    assert code == 1, text
    error = text.splitlines()[-1]
    assert reason in error
    assert f"node {node.node_ip_address}" in error
    assert REMEDY in error
    assert "runtime_env.yaml" in error
    assert "Traceback" not in text
    assert not (output / "run.json").exists()


def test_a_node_that_joins_without_the_code_is_excluded(fleet, tmp_path, marks, environment):
    """P5: the run has started on another node, so only the new one is at fault. The warning names it, the reason and
    the remedy, and the run ends on the other node.
    """
    variables, reason = environment
    fleet.add_node(gpus=2)
    config = write_config(tmp_path, marks, {"hold_after": [1]}, groups={"count": 2})
    output = tmp_path / "out"
    driver = start(command(config, write_manifest(tmp_path, ["one", "two", "three"]), output, fleet.address))
    wait_for(lambda: (marks / "steps").exists(), "a step")
    node = fleet.add_node(gpus=2, environment=variables)
    lines = []
    while not lines or "is excluded for the rest of this run" not in lines[-1]:
        lines.append(driver.stdout.readline())
        assert lines[-1], "".join(lines)
    (marks / "go-1").touch()
    code, text = finish(driver)
    assert code == 0, text
    assert len(records(output)) == 3
    assert f"node {node.node_ip_address}" in lines[-1]
    assert reason in lines[-1]
    assert "Install them in the image of the nodes" in lines[-1]
    assert "Traceback" not in "".join(lines) + text
