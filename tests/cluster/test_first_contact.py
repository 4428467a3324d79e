"""The first contact with a cluster: each obstacle is reported as what it is, before the output root is used."""

from __future__ import annotations

import http.server
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2 as gcs

from hv_batch.protocol import UserError
from hv_batch.runtime.ray_contact import contact_cluster, private_token, resolve_address
from tests.support.ray_head import free_port, started_head
from tests.support.runs import command, finish, records, render, start, write_config, write_manifest

TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty home folder, and nothing about tokens in the environment."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ray://10.0.0.1:10001", "the address of Ray's client server"),
        ("http://10.0.0.1:8265", "the address of Ray's dashboard"),
        ("https://ray.example.com", "the address of Ray's dashboard"),
        ("10.0.0.1", "which is not HOST:PORT"),
    ],
)
def test_an_address_of_another_kind_is_named(home, monkeypatch, address, reason):
    """Also in RAY_ADDRESS, which `ray job submit` reads as a URL."""
    with pytest.raises(UserError, match=rf"^--address is .*{reason}.*HOST:6379"):
        resolve_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS is .*{reason}"):
        resolve_address(None)


def test_an_http_server_is_not_a_cluster(home):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(UserError, match="is an HTTP server and not a Ray cluster"):
            contact_cluster(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_another_service_or_none_is_not_a_cluster(home):
    with pytest.raises(UserError, match=r"No Ray cluster answers at 127.0.0.1:9: .*refused"):
        contact_cluster("127.0.0.1:9")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(UserError, match=r"No Ray cluster answers at .*: another service listens there"):
            contact_cluster(f"127.0.0.1:{port}")
    finally:
        server.stop(0)


def test_the_token_file_is_for_its_user_only(home):
    """A5: one that is written for a local Ray, and one that Ray has written."""
    path = home / ".ray" / "auth_token"
    private_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert len(text) == 64
    path.chmod(0o644)
    private_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == text


def test_a_local_ray_needs_no_home_folder(home, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/no-such-home")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is removed again
    private_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_cluster_without_tokens(ray_head, home, monkeypatch):
    """A token that a local Ray has left is not used; RAY_AUTH_MODE=token is reported."""
    (home / ".ray" / "auth_token").write_text(TOKEN)
    contact_cluster(ray_head[0])
    assert "RAY_AUTH_MODE" not in os.environ
    with pytest.raises(UserError, match="is an HTTP server"):
        contact_cluster(ray_head[1].removeprefix("http://"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UserError, match=r"uses no tokens, but RAY_AUTH_MODE is token.*Unset RAY_AUTH_MODE"):
        contact_cluster(ray_head[0])


@pytest.fixture(scope="module")
def token_head(ray_environment, tmp_path_factory):
    log = tmp_path_factory.mktemp("token-head") / "log.txt"
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with started_head(log, free_port(), "--num-cpus=8", "--num-gpus=8", **environment) as addresses:
        yield addresses


@pytest.mark.slow
def test_a_run_on_a_cluster_with_tokens(token_head, home, monkeypatch, tmp_path, marks):
    """Without a token, with a wrong one, with tokens switched off: one paragraph and an untouched root. With the right
    one, from the file or the environment, the run works without RAY_AUTH_MODE."""
    config, output = write_config(tmp_path, marks), tmp_path / "out"
    arguments = (config, write_manifest(tmp_path, ["one"]), output, token_head[0])

    def refused() -> str:
        begun = time.monotonic()
        code, text = render(*arguments)
        assert code == 1, text
        assert "Traceback" not in text
        assert time.monotonic() - begun < 60
        assert not (output / "lease.json").exists()
        assert not (output / "run.json").exists()
        return text.splitlines()[-1]

    assert "wants a token, and there is none in RAY_AUTH_TOKEN" in refused()
    (home / ".ray" / "auth_token").write_text(TOKEN[::-1])
    assert f"refuses the token in {home}/.ray/auth_token, which is that of another cluster" in refused()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "wants a token, but RAY_AUTH_MODE is disabled. Unset it." in refused()
    monkeypatch.delenv("RAY_AUTH_MODE")
    (home / ".ray" / "auth_token").write_text(TOKEN)
    code, text = render(*arguments)
    assert code == 0, text
    assert len(records(output)) == 1
    (home / ".ray" / "auth_token").unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    contact_cluster(token_head[0])
    assert os.environ.pop("RAY_AUTH_MODE") == "token"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b'{"ray_version": "2.53.0", "python_version": "3.11.7"}', r"runs Ray 2.53.0 on Python 3.11.7"),
        (b'{"ray_version": "%s", "python_version": "3.9.1"}', "Python 3.9.1.*equal minor versions of Python"),
    ],
)
def test_another_version_of_ray_or_python_is_named(token_head, home, monkeypatch, metadata, message):
    """The versions are read where Ray itself reads them."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    key = {"namespace": b"cluster", "key": b"CLUSTER_METADATA"}
    with grpc.insecure_channel(token_head[0]) as channel:
        service = "/ray.rpc.InternalKVGcsService/InternalKV"
        header = [("authorization", f"Bearer {TOKEN}")]
        get, put = (
            channel.unary_unary(f"{service}{name}", request.SerializeToString, reply.FromString)
            for name, request, reply in (
                ("Get", gcs.InternalKVGetRequest, gcs.InternalKVGetReply),
                ("Put", gcs.InternalKVPutRequest, gcs.InternalKVPutReply),
            )
        )
        before = get(gcs.InternalKVGetRequest(**key), metadata=header).value
        value = metadata.replace(b"%s", ray.__version__.encode())
        put(gcs.InternalKVPutRequest(**key, value=value, overwrite=True), metadata=header)
        try:
            with pytest.raises(UserError, match=message):
                contact_cluster(token_head[0])
        finally:
            put(gcs.InternalKVPutRequest(**key, value=before, overwrite=True), metadata=header)
    contact_cluster(token_head[0])


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_path_is_named(home, monkeypatch, tmp_path, marks):
    """Slurm's folders are long; a socket's path is not."""
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    config = write_config(tmp_path, marks, groups={"gpus_per_rank": 0, "cpus_per_rank": 0.1})
    driver = start(command(config, write_manifest(tmp_path, ["one"]), tmp_path / "out"))
    code, text = finish(driver)
    assert code == 1, text
    error = text.splitlines()[-1]
    assert "has at most 107 bytes. Set RAY_TMPDIR to a folder with a short path" in error
    assert str(folder) in error
    assert "Traceback" not in text
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    code, text = render(config, tmp_path / "manifest.jsonl", tmp_path / "out")
    assert code == 0, text
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600
