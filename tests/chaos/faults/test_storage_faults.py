"""The faulty S3 endpoint: each fault reaches a client over HTTP, and the layer counts it."""

from __future__ import annotations

import threading
import time

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError

from tests.chaos.faults.storage_faults import FaultyS3

ONCE = Config(retries={"total_max_attempts": 1, "mode": "standard"}, read_timeout=2, connect_timeout=2)


@pytest.fixture(scope="module")
def server():
    server = FaultyS3(seed=1)
    yield server
    server.stop()


@pytest.fixture
def client(server):
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "y", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=server.endpoint, config=ONCE, **keys)
    client.create_bucket(Bucket="chaos")
    client.put_object(Bucket="chaos", Key="old", Body=b"1234")
    yield client
    server.layer.switch_all_off()


def put(client, key: str = "new") -> None:
    client.put_object(Bucket="chaos", Key=key, Body=b"abcd")


def keys(client) -> list[str]:
    return sorted(found["Key"] for found in client.list_objects_v2(Bucket="chaos").get("Contents", []))


def is_stored(client, key: str) -> bool:
    """By name, because a listing may be stale."""
    try:
        return client.head_object(Bucket="chaos", Key=key)["ContentLength"] == 4
    except ClientError:
        return False


def first_error(client, attempts: int = 20) -> str:
    """The code of the first refused request; a fault may concern a share of them only."""
    for _ in range(attempts):
        try:
            client.get_object(Bucket="chaos", Key="old")
        except ClientError as error:
            return error.response["Error"]["Code"]
    return ""


@pytest.mark.parametrize(
    ("fault", "code"), [("503", "SlowDown"), ("expired", "ExpiredToken"), ("skewed", "RequestTimeTooSkewed")]
)
def test_requests_are_refused_while_a_fault_is_active(server, client, fault, code):
    server.layer.switch_on(fault)
    assert first_error(client) == code
    assert server.layer.counts[fault] > 0
    server.layer.switch_off(fault)
    assert first_error(client) == ""


def repeat(request, attempts: int = 20) -> bool:
    """Whether a connection breaks before all attempts are over; a fault may concern a share of the requests only."""
    try:
        for _ in range(attempts):
            request()
    except HTTPClientError:
        return True
    return False


def breaks_put(client, key: str) -> bool:
    def put_again():
        client.delete_object(Bucket="chaos", Key=key)
        put(client, key)

    return repeat(put_again)


def test_a_torn_upload_stores_nothing(server, client):
    server.layer.switch_on("torn")
    assert breaks_put(client, "torn")
    assert not is_stored(client, "torn")


def test_an_unacknowledged_upload_is_stored(server, client):
    server.layer.switch_on("unacknowledged")
    assert breaks_put(client, "unacknowledged")
    assert is_stored(client, "unacknowledged")


def test_one_upload_is_confirmed_and_forgotten(server, client):
    server.layer.switch_on("forgotten", "/forgotten")
    put(client, "other")
    put(client, "forgotten")
    assert is_stored(client, "other")
    assert not is_stored(client, "forgotten")
    assert server.layer.forgotten == ["/chaos/forgotten"]
    put(client, "forgotten")
    assert is_stored(client, "forgotten")


def test_a_listing_is_that_of_before_the_fault(server, client):
    before = keys(client)
    server.layer.switch_on("stale")
    put(client, "fresh")
    assert keys(client) == before
    assert is_stored(client, "fresh")
    server.layer.switch_off("stale")
    assert keys(client) == sorted([*before, "fresh"])


def test_a_request_hangs_until_the_fault_ends(server, client):
    server.layer.switch_on("hang")
    threading.Timer(0.5, server.layer.switch_off, ["hang"]).start()
    began = time.monotonic()
    assert repeat(lambda: client.get_object(Bucket="chaos", Key="old"))
    assert time.monotonic() - began < 2.0, "the connection is closed before the time-out of the client"


def test_connections_are_closed(server, client):
    server.layer.switch_on("down")
    with pytest.raises(HTTPClientError):
        put(client)


def test_slow_requests_are_answered(server, client):
    server.layer.switch_on("slow")
    put(client, "slow")
    assert is_stored(client, "slow")
    assert server.layer.counts["slow"] >= 2


def test_the_date_of_a_request_must_be_near_that_of_the_server(server, client, monkeypatch):
    monkeypatch.setattr("tests.chaos.faults.storage_faults.MAX_SKEW_S", -1.0)
    assert first_error(client) == "RequestTimeTooSkewed"
