"""What a store raises is an outage, refused access or a broken store, and never an error of a sample (P5)."""

from __future__ import annotations

import errno
import http.server
import threading
import time

import boto3
import pytest

from hv_batch.job.inspection.garbage import find_garbage
from hv_batch.job.storage.errors import (
    StorageBrokenError,
    StorageError,
    StorageRefusedError,
    StorageUnavailableError,
    translate,
)
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.small_runs import run_small, some_samples

OPERATIONS = {
    "put": lambda store, folder: store.put("a/b", b"1"),
    "put_new": lambda store, folder: store.put_new("a/b", b"1"),
    "put_file": lambda store, folder: store.put_file("a/b", folder / "file"),
    "get": lambda store, folder: store.get("a/b"),
    "get_file": lambda store, folder: store.get_file("a/b", folder / "copy"),
    "exists": lambda store, folder: store.exists("a/b"),
    "size": lambda store, folder: store.size("a/b"),
    "list": lambda store, folder: list(store.list("a")),
    "list_sizes": lambda store, folder: store.list_sizes("a"),
    "modified": lambda store, folder: store.modified("a/b"),
    "delete": lambda store, folder: store.delete("a/b"),
    "leftovers": lambda store, folder: store.leftovers(),
}
REFUSALS = [
    (400, "ExpiredToken", StorageUnavailableError, "credentials"),
    (403, "RequestTimeTooSkewed", StorageUnavailableError, "clock"),
    (403, "AccessDenied", StorageRefusedError, "AccessDenied"),
    (418, "NobodyKnows", StorageUnavailableError, "NobodyKnows"),
    (404, "NoSuchBucket", StorageBrokenError, "NoSuchBucket"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    return tmp_path


@pytest.mark.parametrize(("status", "code", "expected", "words"), REFUSALS)
def test_each_operation_reports_the_cause_and_the_url(s3, s3_store, folder, monkeypatch, status, code, expected, words):
    """P5: expired credentials, a wrong clock and unknown errors are outages; refused access and a missing bucket are
    not. The reply to a HEAD request does not hold the code.
    """
    s3_store.put("a/b", b"1")
    monkeypatch.setattr("hv_batch.job.storage.store.PAUSES_S", ())
    s3.refusal = (status, code)
    for name, operation in OPERATIONS.items():
        with pytest.raises(StorageError) as caught:
            operation(s3_store, folder)
        assert type(caught.value) is expected, f"{name}: {caught.value}"
        assert s3_store.url in str(caught.value)
        assert words in str(caught.value), f"{name}: {caught.value}"


def test_an_outage_is_found_after_four_requests(s3, s3_store, folder):
    """P5: retries happen in one layer, for each operation and each answer that drivers would repeat themselves."""
    for status, code in ((503, "SlowDown"), (500, "InternalError"), (503, "ServiceUnavailable")):
        for name, operation in OPERATIONS.items():
            s3.reset()
            s3.refusal = (status, code)
            with pytest.raises(StorageUnavailableError):
                operation(s3_store, folder)
            assert s3.failed_requests == 4, f"{name}, {code}"


class Unavailable(http.server.BaseHTTPRequestHandler):
    """Answers 503 to every request."""

    count = 0  # of requests

    def answer(self) -> None:
        type(self).count += 1
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unavailable():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unavailable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_the_drivers_of_other_clouds_repeat_nothing(unavailable, monkeypatch, folder, scheme):
    """P5: four requests as for S3. gcsfs and adlfs would send dozens, with pauses of a minute."""
    pytest.importorskip({"gs": "gcsfs", "az": "adlfs"}[scheme])
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", unavailable)
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"DefaultEndpointsProtocol=http;AccountName=one;AccountKey=MTIz;BlobEndpoint={unavailable}/one;",
    )
    monkeypatch.setattr("hv_batch.job.storage.store.PAUSES_S", (0.0, 0.0, 0.0))
    store = Store(f"{scheme}://bucket/root")
    for name in ("put", "put_new", "put_file", "get", "get_file", "exists", "list"):
        Unavailable.count = 0
        with pytest.raises(StorageUnavailableError, match=store.url):
            OPERATIONS[name](store, folder)
        assert 4 <= Unavailable.count <= 8, name  # some requests of adlfs are preceded by one for the container


def test_a_stop_ends_the_pauses_between_retries(s3, s3_store, monkeypatch):
    """A stop request is not delayed by a store that does not answer."""
    monkeypatch.setattr("hv_batch.job.storage.store.PAUSES_S", (300.0, 300.0))
    s3.refusal = (503, "SlowDown")
    stopped = threading.Event()
    store = Store(s3_store.url, stopped=stopped)
    threading.Timer(0.2, stopped.set).start()
    begun = time.monotonic()
    with pytest.raises(StorageUnavailableError):
        store.put("a", b"1")
    with pytest.raises(StorageUnavailableError):
        store.put("a", b"1")
    assert time.monotonic() - begun < 100


def test_renewed_credentials_are_used_without_a_restart(s3, s3_store, tmp_path, monkeypatch):
    """P5: an operator renews the credentials file while the run waits, and the next request uses it."""
    credentials = tmp_path / "credentials"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    credentials.write_text("[default]\naws_access_key_id = first\naws_secret_access_key = x\n")
    store = Store(s3_store.url)
    type(store._backend.fs).clear_instance_cache()
    del store._backend
    s3.accepted_key = "first"
    store.put("a", b"1")
    s3.accepted_key = "second"
    with pytest.raises(StorageUnavailableError, match="Renew them"):
        store.put("a", b"2")
    credentials.write_text("[default]\naws_access_key_id = second\naws_secret_access_key = x\n")
    store.put("a", b"2")
    assert store.get("a") == b"2"


def test_a_server_that_refuses_checksums_is_named_with_the_setting(s3, s3_store, monkeypatch):
    """P6: the probe says which setting works, and with it the root is used."""
    s3.refuses_checksums = True
    with pytest.raises(UserError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        s3_store.probe()
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    again = Store(s3_store.url)
    type(again._backend.fs).clear_instance_cache()
    del again._backend
    again.probe()


def test_a_server_that_stores_the_framing_of_uploads_is_refused(s3_store, monkeypatch):
    """P6: such a server confirms each upload and damages it."""
    monkeypatch.setattr(type(s3_store._backend), "get", lambda *_: b"5;chunk-signature=ab\r\nfirst\r\n")
    with pytest.raises(UserError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        s3_store.probe()


def test_markers_of_folders_are_not_objects(s3, s3_store):
    """Consoles create an empty object with a slash at its end for a new folder."""
    run_small(s3_store, some_samples(4))
    bucket, _, root = s3_store.url.removeprefix("s3://").partition("/")
    before = {folder: list(s3_store.list(folder)) for folder in ("plan", "data", "commits")}
    for name in ("", "plan/", "data/", "data/shard-00000/", "commits/shard-00000/", "latents/shard-00000/", "new/"):
        boto3.client("s3").put_object(Bucket=bucket, Key=f"{root}/{name}", Body=b"")
    for folder, keys in before.items():
        assert list(s3_store.list(folder)) == keys
    assert list(s3_store.list("new")) == list(s3_store.list("latents")) == []
    assert list(find_garbage(s3_store, older_than=2**33)) == []


@pytest.mark.parametrize(
    ("make", "expected", "words"),
    [
        (lambda: OSError("Forbidden: https://storage/b/x\nno storage.objects.create"), StorageRefusedError, "create"),
        (lambda: OSError("Forbidden: https://storage/b/x\nRate Limit Exceeded"), StorageUnavailableError, "Rate"),
        (lambda: gcs_error(401, "Invalid Credentials"), StorageUnavailableError, "credentials"),
        (lambda: gcs_error(403, "no access"), StorageRefusedError, "no access"),
        (lambda: gcs_error(429, "slow down"), StorageUnavailableError, "slow down"),
        (lambda: gcs_refresh_error("invalid_grant: Token has been expired"), StorageUnavailableError, "credentials"),
        (lambda: gcs_refresh_error("JWT must be in a reasonable timeframe"), StorageUnavailableError, "clock"),
        (lambda: azure_error("AuthenticationFailed", 403), StorageUnavailableError, "credentials"),
        (lambda: azure_error("AuthorizationPermissionMismatch", 403), StorageRefusedError, "Mismatch"),
        (lambda: azure_error("ContainerNotFound", 404), StorageBrokenError, "ContainerNotFound"),
        (lambda: RuntimeError("Event loop is closed"), StorageUnavailableError, "loop"),
        (lambda: OSError(errno.EIO, "Input/output error"), StorageUnavailableError, "Input/output"),
        (lambda: OSError(errno.EROFS, "Read-only file system"), StorageRefusedError, "Read-only"),
        (lambda: OSError(errno.EDQUOT, "Quota exceeded"), StorageBrokenError, "Quota"),
        (lambda: FileNotFoundError(errno.ENOENT, "gone"), StorageBrokenError, "gone"),
    ],
)
def test_errors_of_every_driver_are_translated(make, expected, words):
    """P5: gcsfs raises bare OSErrors, azure and google have classes of their own; a write that finds no folder or
    bucket finds a broken store.
    """
    translated = translate(make(), "gs://user:secret@bucket/root?token=secret", writes=True)
    assert type(translated) is expected
    assert words in str(translated)
    assert "gs://bucket/root" in str(translated)
    assert "secret" not in str(translated)


def test_a_ring_of_causes_ends():
    """s3fs raises a missing object from itself."""
    error = FileNotFoundError(errno.ENOENT, "gone")
    error.__cause__ = error
    assert translate(error, "s3://bucket/root") is error


def gcs_error(status, message):
    return pytest.importorskip("gcsfs.retry").HttpError({"code": status, "message": message})


def gcs_refresh_error(message):
    return pytest.importorskip("google.auth.exceptions").RefreshError(message)


def azure_error(code, status):
    error = pytest.importorskip("azure.core.exceptions").HttpResponseError(f"refused: {code}")
    error.status_code, error.error_code = status, code
    return error
