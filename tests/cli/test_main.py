"""Commands that need no Ray: every refusal is one clear message with exit code 1 and no traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from hv_batch import __version__
from hv_batch.cli.main import main
from hv_batch.job.failure import Failure, FailureClass
from hv_batch.job.redaction import public_text, public_url, public_values
from tests.support.repository import ROOT
from tests.support.runs import write_config, write_manifest


def hv_batch(*arguments):
    """Exit code, stdout and stderr of a command that runs in this process, which saves the imports."""
    stdout, stderr = io.StringIO(), io.StringIO()
    command = patch.object(sys, "argv", ["hv-batch", *map(str, arguments)])
    environment = patch.dict(os.environ, {"RAY_ADDRESS": ""})
    with command, environment, chdir(ROOT), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    if isinstance(code, str):  # Python's own way with it, when it ends the process
        print(code, file=stderr)
        code = 1
    return code, stdout.getvalue(), stderr.getvalue()


@pytest.fixture
def good(tmp_path):
    """(config, manifest, output root) of a valid run."""
    (tmp_path / "marks").mkdir()
    config = write_config(tmp_path, tmp_path / "marks")
    return config, write_manifest(tmp_path, ["a prompt"]), tmp_path / "out"


def refused(config, manifest, output, *overrides):
    code, _, stderr = hv_batch("run", "--config", config, "--manifest", manifest, "--output", output, *overrides)
    assert code == 1
    assert stderr.startswith("error: ") or "\nerror: " in stderr
    assert not (output / "run.json").exists(), "a refused run must not claim its output root"
    return stderr


def test_the_version_is_that_of_the_package():
    """The number that every record carries."""
    command = [sys.executable, "-m", "hv_batch", "--version"]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == f"hv_batch {__version__}\n"


def test_every_bad_row_is_reported_at_once(good, tmp_path):
    """P6: row number, field, value and allowed values, for all rows at once."""
    manifest = tmp_path / "bad.jsonl"
    rows = [{"prompt": "ok"}, {"prompt": "x", "height": 100}, {"prompt": ""}, {"prompt": "y", "num_frames": 8}]
    manifest.write_text("\n".join(map(json.dumps, rows)) + "\n{not json\n")
    text = refused(good[0], manifest, good[2])
    for expected in ("row 2: height = 100", "row 3: prompt", "row 4: num_frames = 8", "row 5", "multiple of 16"):
        assert expected in text


def test_unknown_config_keys_are_errors(good):
    """P6: a misspelt key is named together with the closest known one."""
    assert "groups.cuont" in refused(*good, "groups.cuont=2")


def test_a_missing_weight_file_names_path_and_layout(good, tmp_path):
    """P6: the path expected and the layout of the tree."""
    text = refused(
        ROOT / "configs" / "720p_8gpu.yaml", good[1], good[2], f"model.options.model_base={tmp_path / 'ckpts'}"
    )
    assert f"model_base {tmp_path / 'ckpts'}" in text
    assert "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt" in text
    assert "text_encoder_2/" in text


def test_heads_that_do_not_split_are_reported(good):
    """P6: an impossible parallel plan is refused before Ray is touched."""
    assert "does not divide 24" in refused(*good, "parallel.ulysses_degree=5")


def test_a_missing_engine_is_reported(good):
    """P6: the import path of the engine is in the message."""
    assert "tests.support.doubles:NoEngine" in refused(*good, "model.engine=tests.support.doubles:NoEngine")


def test_an_unwritable_output_is_reported(good, tmp_path):
    """P6: the check writes a probe before anything is rendered."""
    (tmp_path / "file").write_text("in the way")
    assert "is a file, or lies below one" in refused(good[0], good[1], tmp_path / "file" / "out")


def test_an_unwritable_output_is_reported_with_the_other_problems(good, tmp_path):
    """P6: the output root is probed with the first checks, not after the weights have been hashed."""
    (tmp_path / "file").write_text("in the way")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": ""}\n')
    text = refused(good[0], bad, tmp_path / "file" / "out", "parallel.ulysses_degree=5")
    for expected in ("is a file, or lies below one", "does not divide 24", "row 1: prompt"):
        assert expected in text


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_output_or_manifest_is_refused(good, blank):
    """P6: an empty variable of a script must not render into the working directory, or below the root of the disk."""
    config, manifest, output = good
    before = set(os.listdir(ROOT))
    for command in (
        ["run", "--config", config, "--manifest", manifest, "--output", blank],
        ["nightly", "--config", config, "--manifest", "{date}.jsonl", "--output", blank],
        ["resume", blank],
        ["status", blank],
        ["gc", blank],
        ["verify", blank],
    ):
        code, _, stderr = hv_batch(*command)
        assert code == 1
        assert "output is blank" in stderr or "output root is blank" in stderr, command
    for command in (
        ["run", "--config", config, "--manifest", blank, "--output", output],
        ["run", "--config", config, "--manifest", manifest, "--manifest", blank, "--output", output],
    ):
        code, _, stderr = hv_batch(*command)
        assert code == 1
        assert "The manifest is blank" in stderr
    assert set(os.listdir(ROOT)) == before


def test_a_manifest_that_would_read_the_output_root_is_refused_at_the_first_run(good, tmp_path):
    """P6: the second run would find its own run.json among the files of the manifest."""
    text = refused(good[0], tmp_path, tmp_path / "out")
    assert f"The manifest {tmp_path} would also read the output root {tmp_path / 'out'} (for example" in text


def test_problems_of_config_weights_and_manifest_are_reported_together(good, tmp_path):
    """P6: problems of the plan and of the rows are reported together."""
    manifest = tmp_path / "bad.jsonl"
    manifest.write_text('{"prompt": ""}\n')
    text = refused(good[0], manifest, good[2], "parallel.ulysses_degree=5")
    assert "does not divide 24" in text
    assert "row 1: prompt" in text


def test_an_unknown_engine_option_is_reported_with_the_known_ones(good):
    """P6: as for every other key of the config."""
    text = refused(*good, "model.options.surprise=1")
    assert "'surprise'" in text
    assert "step_seconds" in text


def test_an_address_where_nothing_answers_is_reported(good):
    """P6: the address and the remedy are in the message."""
    code, _, stderr = hv_batch(
        "run", "--config", good[0], "--manifest", good[1], "--output", good[2], "--address", "127.0.0.1:9"
    )
    assert code == 1
    assert "No Ray cluster answers at 127.0.0.1:9" in stderr


def unreachable(good, *flags):
    """The lines on stderr of a run that is prepared and then finds no Ray cluster."""
    files = ("--config", good[0], "--manifest", good[1], "--output", good[2])
    code, _, stderr = hv_batch("run", *files, "--address", "127.0.0.1:9", *flags)
    assert code == 1
    return stderr.splitlines()


def test_long_videos_give_one_warning(good):
    """D8: more frames than the model was trained with; 129 give none."""
    assert not [line for line in unreachable(good, "defaults.num_frames=129") if "frames" in line]
    warnings = [line for line in unreachable(good, "defaults.num_frames=133") if "frames" in line]
    assert len(warnings) == 1
    assert "1 video(s) have more than 129 frames (up to 133)" in warnings[0]


def test_log_level_and_format_are_options_of_run(good, monkeypatch):
    """The flag has precedence over HV_BATCH_LOG_LEVEL; with json every line but the final error is an object."""
    monkeypatch.delenv("HV_BATCH_LOG_LEVEL", raising=False)
    *lines, error = unreachable(good)
    assert error.startswith("error: No Ray cluster answers")
    assert "INFO reads outside the output root: the manifest" in lines[0]
    assert "INFO manifest: 1 rows, 1 samples in 1 shards, all valid" in lines[1]
    assert len(unreachable(good, "--log-level", "warning")) == 1
    monkeypatch.setenv("HV_BATCH_LOG_LEVEL", "error")
    assert len(unreachable(good)) == 1
    *lines, error = unreachable(good, "--log-level", "info", "--log-format", "json")
    records = [json.loads(line) for line in lines]
    assert [record["level"] for record in records] == ["info"] * len(records)
    assert records[1]["message"].startswith("manifest: 1 rows")


@pytest.mark.parametrize(
    ("flags", "variable", "message"),
    [
        (["--log-level", "loud"], "", "--log-level is 'loud'; allowed: debug, info, warning, error."),
        (["--log-format", "xml"], "", "--log-format is 'xml'; allowed: text, json."),
        ([], "loud", "The environment variable HV_BATCH_LOG_LEVEL is 'loud'; allowed: debug, info, warning, error."),
    ],
)
def test_wrong_log_settings_are_refused_in_one_line(good, monkeypatch, flags, variable, message):
    """P6: what is wrong, and the allowed values, before the output root is touched."""
    monkeypatch.setenv("HV_BATCH_LOG_LEVEL", variable)
    assert unreachable(good, *flags) == [f"error: {message}"]
    assert not good[2].exists()


def test_secrets_do_not_reach_run_json_or_messages(good):
    """Safe: passwords in URLs and options named like secrets are masked."""
    url = "sftp://user:p@ss@host/dir/x.parquet?X-Signature=abc"
    assert public_url(url) == "sftp://host/dir/x.parquet"
    masked = public_values({"options": {"hub_token": "t", "load_key": "module"}, "cache": url, "row": [url, 1]})
    assert masked == {"options": {"hub_token": "***", "load_key": "module"}, "cache": "***", "row": ["***", 1]}


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("GET https://u:p@s:s@host:9/a/b.mp4?sig=x&t=1 failed", "GET https://host:9/a/b.mp4 failed"),
        ("('s3://b/k?versionId=1', 'ftp://u:p@h')", "('s3://b/k', 'ftp://h')"),
        ("mail a@b.org, is it there? s3://bucket/a@b/c", "mail a@b.org, is it there? s3://bucket/a@b/c"),
        ("no URL: a?b=c user:password@host", "no URL: a?b=c user:password@host"),
    ],
)
def test_messages_lose_the_secrets_of_their_urls_and_nothing_else(text, public):
    """Safe: errors of storage libraries are logged and recorded without passwords and signatures."""
    assert public_text(text) == public
    assert Failure(FailureClass.INFRA, text, text).to_dict()["message"] == public
    assert Failure(FailureClass.INFRA, text, text).to_dict()["traceback"] == public


@pytest.mark.parametrize("role", ["config", "manifest"])
def test_a_refused_command_shows_no_secret(good, monkeypatch, role):
    """Safe: the error about a URL does not contain its password."""
    url = "http://user:planted-1@127.0.0.1:9/x.jsonl?X-Amz-Signature=planted-2"
    files = {"config": good[0], "manifest": good[1], "output": good[2], role: url}
    options = [f"--{name}={value}" for name, value in files.items()]
    monkeypatch.setattr(sys, "argv", ["hv-batch", "run", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert "http://127.0.0.1:9/x.jsonl" in str(caught.value)
    assert "planted" not in str(caught.value)


def test_a_missing_manifest_is_reported(good, tmp_path):
    """P6: the path is in the message."""
    assert "nowhere.jsonl" in refused(good[0], tmp_path / "nowhere.jsonl", good[2])


def test_several_manifests_and_a_selection_are_options(good, tmp_path):
    """P6: bad rows of all files are reported together; a wrong selection is reported with the allowed values."""
    for name in ("b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text('{"prompt": ""}\n')
    text = refused(good[0], good[1], good[2], "--manifest", tmp_path / "b.jsonl", "--manifest", f"{tmp_path}/c.*")
    assert f"{tmp_path}/b.jsonl: row 1: prompt" in text
    assert f"{tmp_path}/c.jsonl: row 1: prompt" in text
    assert "the column colour, which the manifest does not have" in refused(*good, "--where", "colour=red")
    assert "allowed are 0 to 0" in refused(*good, "--shards", "1-3")


def test_status_of_a_folder_that_is_no_root_is_reported(tmp_path):
    """`hv-batch status` of a folder that is no output root is an error, not an empty table."""
    code, _, stderr = hv_batch("status", tmp_path)
    assert code == 1
    assert "run.json" in stderr


def test_toy_writes_a_checkpoint_and_prints_its_path(tmp_path):
    """The command that the comments of the configs name."""
    code, stdout, _ = hv_batch("toy", tmp_path)
    assert code == 0
    assert (Path(stdout.strip()) / "hunyuan-video-t2v-720p" / "vae" / "config.json").is_file()
