"""Stores for tests: a local folder, fsspec's memory, and an S3 endpoint on this machine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hv_batch.job.storage.store import Store
from tests.support.s3_server import S3Server


@pytest.fixture(scope="module", autouse=True)
def _empty_memory() -> None:
    """fsspec's memory file system is shared by the whole process, and each listing walks over all its files."""
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the credentials of this process set in the environment, as users do."""
    s3_server.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("hv_batch.job.storage.store.PAUSES_S", (0.0, 0.0, 0.0))
    return s3_server


@pytest.fixture
def s3_store(s3: S3Server) -> Store:
    bucket = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return Store(f"s3://{bucket}/some/root")


@pytest.fixture(params=["local", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Any) -> Store:
    """An empty output root on each kind of store."""
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    if request.param == "memory":
        return Store(f"memory://{uuid.uuid4().hex}")
    return request.getfixturevalue("s3_store")
