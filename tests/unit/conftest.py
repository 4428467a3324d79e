"""Real places to store things: a folder, fsspec's memory, and an S3 endpoint that speaks HTTP on this machine."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from hv_batch.job import storage
from hv_batch.job.storage import Store


class S3Server:
    """An S3 endpoint whose answers can be spoilt, to see what the client makes of it."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self._app = self._server._server.app
        self._server._server.app = self._answer
        # S3 judges a conditional PUT atomically. The stand-in checks and then stores, so it gets one request at a time.
        self._turn = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.faults: list[int] = []  # statuses of the next requests with one of the methods
        self.methods = {"PUT", "GET"}
        self.loses_answers = False  # a spoilt request is carried out all the same
        self.ignores_conditions = False  # as some S3-compatible servers do
        self.spoilt = 0

    def stop(self) -> None:
        self._server.stop()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        with self._turn:
            if self.ignores_conditions:
                environ.pop("HTTP_IF_NONE_MATCH", None)
            if self.faults and environ["REQUEST_METHOD"] in self.methods:
                self.spoilt += 1
                status = self.faults.pop(0)
                if self.loses_answers:
                    list(self._app(environ, lambda *_: None))
                else:
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                body = f"<Error><Code>{status}</Code><Message>spoilt</Message></Error>".encode()
                start_response(f"{status} Spoilt", [("Content-Length", str(len(body)))])
                return [body]
            return self._app(environ, start_response)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with this process's credentials set for it the way a user sets them."""
    s3_server.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # so that the retries seen are ours
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0, 0.0))
    return s3_server


@pytest.fixture
def s3_store(s3: S3Server) -> Store:
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return Store(f"s3://{bucket}/some/root")


@pytest.fixture(params=["local", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Any) -> Store:
    """An empty output root, on each kind of store in turn."""
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}")
    return request.getfixturevalue("s3_store")
