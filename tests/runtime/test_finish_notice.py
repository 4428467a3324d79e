"""The notice about the end of a command: sent whatever happens, and without influence on it."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from hv_batch.job.records.lease import LeaseHeldError
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from hv_batch.runtime.finish_notice import finish_notice
from hv_batch.runtime.run_end import ExitCode
from tests.support.cli_calls import hv_batch
from tests.support.small_runs import run_small, some_samples


@pytest.fixture
def target(tmp_path):
    code = f"import sys; open({str(tmp_path / 'got')!r}, 'w').write(sys.stdin.read())"
    return f"{sys.executable} -c {shlex.quote(code)}"


@pytest.fixture
def root(tmp_path) -> str:
    run_small(Store(str(tmp_path / "root")), some_samples(3), poison={"s002"})
    return str(tmp_path / "root")


def got(tmp_path) -> dict:
    return json.loads((tmp_path / "got").read_text())


def test_a_finished_run_sends_its_summary(root, target, tmp_path):
    with finish_notice(target, root) as end:
        end.code = ExitCode.QUARANTINED
    document = got(tmp_path)
    assert (document["schema"], document["outcome"], document["exit_code"]) == ("hv_batch/finish/1", "quarantined", 3)
    assert document["summary"]["committed"] == 2
    assert document["text"] == f"hv_batch: {root}: quarantined, 2 of 3 videos, 1 quarantined"
    assert document["error"] is None


def test_a_drained_run_is_reported_as_stopped(root, target, tmp_path):
    with finish_notice(target, root) as end:
        end.code = ExitCode.STOPPED
    assert (got(tmp_path)["outcome"], got(tmp_path)["summary"]) == ("stopped", None)


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (UserError("the cluster\x1b[2J is too small"), "failed", 1),
        (LeaseHeldError("held by another driver"), "held", 4),
        (KeyboardInterrupt(), "stopped", 143),
        (RuntimeError("a fault"), "failed", 1),
    ],
)
def test_an_error_is_reported_and_raised_unchanged(target, tmp_path, error, outcome, code):
    with pytest.raises(type(error)) as caught, finish_notice(target, str(tmp_path / "absent")):
        raise error
    assert caught.value is error
    document = got(tmp_path)
    assert (document["outcome"], document["exit_code"]) == (outcome, code)
    assert "\x1b" not in json.loads(json.dumps(document))["text"]


def test_a_notice_that_fails_does_not_change_the_end(root):
    with finish_notice("false", root) as end:
        end.code = ExitCode.COMMITTED
    assert end.code is ExitCode.COMMITTED


def test_without_a_target_nothing_is_sent(root, tmp_path):
    with finish_notice(None, root) as end:
        end.code = ExitCode.COMMITTED
    assert not (tmp_path / "got").exists()


def test_a_night_sends_its_line(target, tmp_path):
    with finish_notice(target, "s3://bucket/nights") as end:
        end.code = ExitCode.STOPPED
        end.set_night({"schema": "hv_batch/night/1", "date": "2026-11-20", "outcome": "stopped", "nights": []})
    assert got(tmp_path)["text"] == "hv_batch: night of 2026-11-20: stopped"
    assert got(tmp_path)["schema"] == "hv_batch/night/1"


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--config", "/no/such.yaml", "--manifest", "m.jsonl", "--output", "/tmp/out"],
        ["nightly", "--config", "/no/such.yaml", "--manifest", "{date}.jsonl", "--output", "/tmp/out"],
        ["resume", "/no/such/root"],
    ],
)
def test_a_command_that_cannot_begin_is_reported(command, target, tmp_path):
    """A nightly job with a broken config would otherwise fail in silence."""
    with pytest.raises(UserError):
        hv_batch(*command, "--on-finish", target)
    assert (got(tmp_path)["outcome"], got(tmp_path)["exit_code"]) == ("failed", 1)
    assert "/no/such" in got(tmp_path)["error"]
