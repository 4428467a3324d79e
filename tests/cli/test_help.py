"""-h, completion, and the time that a command takes to show its help."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.cli_calls import run_main
from tests.support.repository import ROOT

AS_INSTALLED = "import sys; sys.argv[0] = 'hv-batch'; from hv_batch.__main__ import main; main()"


@pytest.mark.parametrize("command", [[], ["run"], ["weights"], ["weights", "check"], ["config", "show"], ["sample"]])
def test_h_is_short_for_help(command):
    code, stdout, _ = run_main(*command, "-h")
    assert code == 0
    assert "usage" in stdout.lower()


@pytest.mark.parametrize(
    ("words", "expected"), [("hv-batch sta", "status"), ("hv-batch run --config thr", "throughput_1gpu")]
)
def test_the_shell_completes_commands_and_shipped_configs(words, expected):
    variables = {"_HV_BATCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-c", AS_INSTALLED]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [expected], done.stderr


def test_help_imports_neither_torch_nor_ray():
    """They take seconds to import."""
    code = "import sys, hv_batch.__main__, hv_batch.cli.main; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"
