"""--json: every command has it, and prints objects with a schema, also for errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from hv_batch.cli.main import app
from hv_batch.job.storage.store import Store
from tests.support.cli_calls import json_of, run_main
from tests.support.small_runs import run_small, some_samples

PARSED_BY_ITSELF = {"sample"}  # its flags are those of the release


def commands(group: typer.core.TyperGroup, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - PARSED_BY_ITSELF))
def test_every_command_has_a_json_flag(name):
    assert "--json" in {flag for parameter in COMMANDS[name].params for flag in parameter.opts}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rendered") / "root"
    run_small(Store(str(root)), some_samples(3), poison={"s001"})
    return root


@pytest.mark.parametrize(
    ("command", "schema", "code"),
    [
        (["status", "ROOT"], "hv_batch/status/1", 0),
        (["verify", "ROOT", "--sample-decode", "0"], "hv_batch/verification/1", 0),
        (["report", "ROOT"], "hv_batch/report-location/1", 0),
        (["retry", "ROOT"], "hv_batch/retry/1", 0),
        (["gc", "ROOT"], "hv_batch/gc/1", 0),
        (["diff", "ROOT", "ROOT"], "hv_batch/diff/1", 0),
        (["config", "list"], "hv_batch/configs/1", 0),
        (["config", "show", "720p_8gpu"], "hv_batch/config/1", 0),
        (["config", "explain", "groups"], "hv_batch/config-keys/1", 0),
        (["status", "nowhere"], "hv_batch/error/1", 1),
        (["sample", "--video-size", "0", "--prompt", "x"], "hv_batch/error/1", 1),
        (["run", "--config", "720p_8gpu"], "hv_batch/error/1", 2),
        (["statsu"], "hv_batch/error/1", 2),
        (["status", "ROOT", "--no-such-flag"], "hv_batch/error/1", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_command_prints_one_object_that_names_its_schema(root, command, schema, code):
    """Nothing else is on stdout, so that a program can read it; the exit code is that without --json."""
    arguments = [str(root) if one == "ROOT" else one for one in command]
    ended, printed = json_of(*arguments)
    assert (printed["schema"], ended) == (schema, code)
    if schema == "hv_batch/error/1":
        assert printed["error"]
        assert printed["exit_code"] == code
    assert run_main(*arguments)[0] == code


def test_an_error_is_one_valid_object_whatever_bytes_a_path_has(tmp_path):
    """Control characters are escaped as JSON escapes them, not as for a terminal."""
    code, printed = json_of("status", tmp_path / "a\x1b[2J\x7fb")
    assert code == 1
    assert "a\x1b[2J\x7fb" in printed["error"]
