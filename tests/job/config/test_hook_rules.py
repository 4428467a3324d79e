"""An output root names hooks, and the operator decides which of them are run (P2, issue of trust)."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import pytest

from hv_batch.job import layout
from hv_batch.job.config.hook_rules import identify_hooks
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.config.sections import HooksConfig
from hv_batch.job.records.run_document import read_run_config
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.nightly import NightlyRequest
from hv_batch.runtime.nightly import _recorded as recorded_night
from tests.support.cli_calls import files, hv_batch
from tests.support.runs import FAKE_CONFIG
from tests.support.small_runs import run_small, some_samples


@pytest.fixture
def root(tmp_path) -> Path:
    run_small(Store(str(tmp_path / "root")), some_samples(2))
    return tmp_path / "root"


def name_hooks(root: Path, **hooks) -> None:
    """Somebody with access to the bucket writes this into run.json."""
    run = json.loads((root / layout.RUN).read_text())
    run["config"]["hooks"] = hooks
    (root / layout.RUN).write_text(json.dumps(run))


@pytest.mark.parametrize("kind", ["prompt", "sample"])
@pytest.mark.parametrize("command", [["resume"], ["verify", "--repair"]])
def test_a_root_cannot_have_a_hook_run(root, tmp_path, command, kind):
    """The message has the complete command, so that the owner of the hook continues by copying it."""
    hook = f"touch {tmp_path}/executed 'a file'"
    name_hooks(root, **{kind: hook})
    (root / layout.SUCCESS).unlink()
    next(root.glob("data/*/s001-*")).unlink()
    before = files(str(root))
    with pytest.raises(UserError) as caught:
        hv_batch(*command[:1], root, *command[1:])
    assert f"hv-batch resume {root} --hook {shlex.quote(hook)}" in str(caught.value)
    assert f"hooks.{kind} = {hook}" in str(caught.value)
    assert not (tmp_path / "executed").exists()
    assert {name: data for name, data in files(str(root)).items() if "lease" not in name} == before


def test_the_command_of_the_message_has_the_engine_as_well(root):
    """The operator copies it and need not add anything."""
    name_hooks(root, sample="true")
    with pytest.raises(UserError, match=f"hv-batch resume {root} --engine studio:Engine --hook true "):
        hv_batch("resume", root, "--engine", "studio:Engine")


def test_a_hook_that_the_operator_names_again_is_accepted(root):
    name_hooks(root, sample="true --level 3", prompt="cat")
    config, _ = read_run_config(str(root), hooks=["cat", "true --level 3"])
    assert config.hooks.sample == "true --level 3"
    with pytest.raises(UserError, match=r"hooks\.prompt = cat, hooks\.sample = true --level 3"):
        read_run_config(str(root), hooks=["cat", "true --level 4"])


def test_a_hostile_hook_does_not_reach_the_terminal(root):
    name_hooks(root, sample="\x1b[2Jtrue")
    with pytest.raises(UserError) as caught:
        hv_batch("resume", root)
    assert "\x1b" not in str(caught.value)


def test_reading_a_root_runs_no_hook(root, tmp_path):
    name_hooks(root, sample=f"touch {tmp_path}/executed", prompt=f"touch {tmp_path}/executed")
    for command in (["status"], ["verify"], ["gc"], ["retry"]):
        hv_batch(*command, root)
    assert not (tmp_path / "executed").exists()


def test_hooks_are_identified_only_if_they_are_set():
    """P2: the identity of a run without hooks is what it was."""
    assert identify_hooks(HooksConfig()) == {}
    found = identify_hooks(HooksConfig(sample="true"))
    assert list(found) == ["sample"]
    assert found["sample"]["name"] == "true"


def test_a_missing_hook_is_reported_before_the_run():
    """P6: with the key, the value and the remedy."""
    with pytest.raises(UserError, match=r"hooks\.sample = no_such_program .*does not exist.*on every node"):
        identify_hooks(HooksConfig(sample="no_such_program --x"))


def test_a_hook_must_end_before_its_worker_counts_as_hung():
    config = {**FAKE_CONFIG, "hooks": {"sample": "true"}}
    with pytest.raises(ValueError, match=r"hooks\.sample_timeout_s = 300 with timeouts\.stall_s = 60"):
        RunConfig.model_validate(config)
    RunConfig.model_validate({**config, "hooks": {"sample": "true", "sample_timeout_s": 30.0}})


@pytest.mark.parametrize(("tonight", "allowed"), [("true --level 3", True), ("true --level 4", False), (None, False)])
def test_an_earlier_night_runs_only_the_hooks_of_tonights_config(tmp_path, tonight, allowed):
    """The config that `nightly` gets names its hooks."""
    root = tmp_path / "2026-11-19"
    run_small(Store(str(root)), some_samples(2))
    name_hooks(root, sample="true --level 3", sample_timeout_s=30.0)
    config = RunConfig.model_validate({**FAKE_CONFIG, "hooks": {"sample": tonight, "sample_timeout_s": 30.0}})
    request = NightlyRequest(
        config=config, manifest="{date}.jsonl", output=str(tmp_path), day=date(2026, 11, 20), until=None, catch_up=1
    )
    with nullcontext() if allowed else pytest.raises(UserError, match="names programs to run"):
        assert recorded_night(request, date(2026, 11, 19))[0].hooks.sample == "true --level 3"
