"""P6: one paragraph per error of the user: cause, place and remedy. Each test runs the real command."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package
from s3fs import S3FileSystem
from yaml import safe_load

from hv_batch.job.storage import store as store_module
from tests.support.cli_calls import run_main
from tests.support.repository import ROOT
from tests.support.runs import write_config, write_manifest


@pytest.fixture
def manifest(tmp_path) -> Path:
    return write_manifest(tmp_path, ["a cat"])


@pytest.fixture
def own_connections():
    """s3fs keeps its connections, with their endpoint and credentials, for the tests that follow."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def refused(config, manifest, output, *overrides, **environment) -> str:
    command = ("run", "--config", config, "--manifest", manifest, "--output", output, *overrides)
    code, _, stderr = run_main(*command, **environment)
    assert code == 1
    assert "Traceback" not in stderr
    return stderr[stderr.index("error: ") :]


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [("groups:\n  count: {a: 1\nseed: 1\n", 3, 5), ("seed: 1\n\tgpu: x\n", 2, 1), ("a: 'x\n", 2, 1)],
)
def test_a_yaml_error_shows_its_place_with_a_caret(tmp_path, manifest, text, line, column):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    message = refused(path, manifest, tmp_path / "out")
    assert f"at line {line}, column {column}" in message
    if line <= text.count("\n"):
        _, shown, caret = message.rstrip().rsplit("\n", 2)
        assert shown == f"  {line} | {text.splitlines()[line - 1]}".replace("\t", " ")
        assert caret.index("^") == len(f"  {line} | ") + column - 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.jsonl", '{"prompt": "a"}\n'),
        ("m.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n'),
        ("m.csv", "id,prompt\n1,a\n"),
    ],
)
def test_a_manifest_given_as_config_is_named_as_such(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert f"The config {path} is a manifest of prompts" in refused(path, path, tmp_path / "out")


def test_a_config_given_as_manifest_is_named_as_such(tmp_path):
    config = write_config(tmp_path, tmp_path)
    assert f"The manifest {config} is a config. Give it with --config" in refused(config, config, tmp_path / "out")


@pytest.mark.usefixtures("own_connections")
def test_a_store_without_credentials_is_no_damage_and_has_no_errno(tmp_path, manifest, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    nowhere = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nowhere", "HOME": str(tmp_path)}
    nowhere["AWS_SHARED_CREDENTIALS_FILE"] = "/nowhere"
    code, _, stderr = run_main("status", "s3://bucket-of-nobody/run", **nowhere)
    message = refused(write_config(tmp_path, tmp_path), manifest, "s3://bucket-of-nobody/run", **nowhere)
    assert code == 1
    for text in (stderr, message):
        assert "no complete credentials" in text
        assert "AWS_ACCESS_KEY_ID" in text
        assert "Errno" not in text
        assert "damaged" not in text


def test_a_missing_model_base_is_named_with_the_commands_that_make_one(tmp_path, manifest):
    message = refused("demo_cpu", manifest, tmp_path / "out")
    assert "requires model_base, which the config does not set. Add model.options.model_base=VALUE" in message
    assert "hv-batch toy DIR" in message
    assert "__init__" not in message


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("pathlib:Path", "is a class without the methods check,"),
        ("hv_batch.protocol:Engine", "is an interface"),
        ("hv_batch.job.formatting:plural", "is not a class but a function"),
    ],
)
def test_a_class_that_is_no_engine_is_refused_with_the_reason(tmp_path, manifest, path, reason):
    message = refused("demo_cpu", manifest, tmp_path / "out", f"model.engine={path}")
    assert f"model.engine = {path} is no engine: it {reason}" in message
    assert "omit model.engine for hv_batch.engine.hunyuan:HunyuanVideo" in message


@pytest.mark.parametrize("name", ["poison", "POISON", "Gpu_oom"])
def test_a_failure_class_may_be_in_lower_case(tmp_path, name):
    code, _, stderr = run_main("retry", tmp_path / "none", "--class", name)
    assert code == 1
    assert "is not an output root" in stderr, "the class is accepted"


def test_an_id_clash_names_both_rows_and_the_kind_of_clash(tmp_path):
    rows = [{"id": "a"}, {"id": "A"}, {"id": "x/y"}, {"id": "x/y"}, {"id": "b", "num_videos": 2}, {"id": "b-v1"}]
    path = tmp_path / "clash.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", **row}) + "\n" for i, row in enumerate(rows)))
    message = refused(write_config(tmp_path, tmp_path), path, tmp_path / "out")
    assert "row 2: id = \"A\"; allowed: an id that differs not only by case; row 1 has 'a'" in message
    assert 'row 4: id = "x/y"; allowed: an id that no other row has; row 3 has it too' in message
    assert "row 6: id = \"b-v1\"; allowed: an id whose files have other names; the files of row 5 (id 'b')" in message


@pytest.mark.usefixtures("own_connections")
def test_a_store_that_does_not_answer_is_noted_while_the_command_waits(monkeypatch):
    """Without the note, a command is silent for up to a minute. The server closes each connection at once."""
    monkeypatch.setattr(store_module, "_noted_at", -1e9)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_refuse_all, args=(server,), daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s" * 8, "NO_PROXY": "127.0.0.1"}
        code, _, stderr = run_main("status", "s3://b-silent/run", AWS_ENDPOINT_URL=endpoint, **keys)
    assert code == 1
    first, *_, last = stderr.strip().splitlines()
    assert "WARNING the output root s3://b-silent/run does not answer" in first
    assert "3 more attempts" in first
    assert last.startswith("error: s3://b-silent/run: ")
    assert "Check the URL, the network" in last


def _refuse_all(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        connection.close()


def test_a_missing_manifest_says_where_the_command_looked(tmp_path, monkeypatch):
    """In a Ray job, a relative path is looked up in the uploaded copy, which lacks what .gitignore names."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tmp_path)
    message = refused(config, "prompts/x.jsonl", tmp_path / "out")
    assert f"there is no {tmp_path}/prompts/x.jsonl on {socket.gethostname()}" in message
    assert "gitignore" not in message
    message = refused(config, "prompts/x.jsonl", tmp_path / "out", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert f"there is no {tmp_path}/prompts/x.jsonl" in message
    assert "without the files that a .gitignore or `excludes`" in message


def test_ray_does_not_upload_the_media_of_an_output_root_beside_the_job(tmp_path):
    """Ray packs the folder itself. The weights of the toy and the code are packed, whatever the name of the root."""
    folder, package = tmp_path / "checkout", tmp_path / "package.zip"
    kept = ["hv_batch/toy/weights/dit.safetensors", "hv_batch/job/dataset/shard_totals.py", "prompts/p.jsonl"]
    left = [
        "my run/data/shard-00000/a.mp4",
        "my run/webdataset/shard-00000.tar",
        "my run/latents/shard-00001/b.safetensors",
    ]
    for name in (*kept, *left):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    excludes = safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["excludes"]
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    names = {name.partition("/")[2] if name.startswith("checkout/") else name for name in ZipFile(package).namelist()}
    assert set(kept) <= names
    assert not names & set(left)
