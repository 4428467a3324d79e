"""The server of a report: what it gives out over real HTTP, what it refuses, and that it follows a run."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_batch.job import layout
from hv_batch.job.records import commits
from hv_batch.job.records.lease import hold_lease
from hv_batch.job.records.lease_holder import this_process
from hv_batch.job.report.server import serve
from hv_batch.job.report.server.http import ReportServer
from hv_batch.job.report.server.ranges import RangeNotSatisfiableError, find_range
from hv_batch.job.report.update import update_report
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.rendered_roots import make_commit, make_quarantine, make_sample, open_root

VIDEO = bytes(range(256)) * 12_000  # 3 MB: more than one chunk


def fill(store: Store) -> str:
    """A root of three samples with one video; returns its key."""
    open_root(store, 3)
    record = make_commit(make_sample(1))
    store.put(record["file"], VIDEO)
    commits.commit(store, record)
    commits.quarantine(store, make_quarantine(make_sample(2)))
    return record["file"]


def ask(server: ReportServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@pytest.fixture
def root(tmp_path) -> Path:
    fill(Store(str(tmp_path / "root")))
    return tmp_path / "root"


@pytest.fixture
def server(root) -> Iterator[ReportServer]:
    with serve.serve_report(Store(str(root))) as running:
        yield running


def video_of(root: Path) -> str:
    return f"/{next(root.glob('data/*/*.mp4')).relative_to(root).as_posix()}"


def test_the_report_its_parts_media_and_records_are_served(any_store):
    """From a folder, from memory and from S3, with the types that a browser needs."""
    video = fill(any_store)
    with serve.serve_report(any_store) as server:
        for path, content_type, data in (
            ("/report/index.html", "text/html; charset=utf-8", any_store.get(layout.REPORT)),
            ("/report/report.json", "application/json; charset=utf-8", any_store.get(layout.REPORT_DATA)),
            ("/report/parts/shard-00000.json", "application/json; charset=utf-8", None),
            ("/commits/shard-00000/s001.json", "application/json; charset=utf-8", None),
            ("/quarantine/shard-00000/s002.json", "application/json; charset=utf-8", None),
            (f"/{video}", "video/mp4", VIDEO),
        ):
            status, headers, body = ask(server, path)
            assert (status, headers["content-type"]) == (200, content_type)
            assert headers["x-content-type-options"] == "nosniff"
            assert int(headers["content-length"]) == len(body)
            if not path.startswith("/report/"):  # the report in the root has another time
                assert body == any_store.get(path[1:])
            assert data is None or len(body) >= len(data) - 10
            assert ask(server, path, "HEAD")[2] == b""
            assert ask(server, path, If_None_Match=headers["etag"])[0] == 304
        status, headers, body = ask(server, f"/{video}", Range="bytes=1048570-1048579")
        assert (status, headers["content-range"]) == (206, f"bytes 1048570-1048579/{len(VIDEO)}")
        assert body == VIDEO[1048570:1048580]


SECRET_PATHS = (
    "/run.json",
    "/lease.json",
    "/summary.json",
    "/report/shards/shard-00000.json",
    "/report/digests/shard-00000.json",
    "/latents/shard-00000/s001.safetensors",
    "/data/shard-00000/metadata.parquet",
    "/data/shard-00000/link-00000000.mp4",
    "/data/shard-00000/",
    "/data/../run.json",
    "/data/shard-00000/..%2f..%2frun.json",
    "/..%2f..%2fetc%2fpasswd",
    "//etc/passwd",
    "/%2fetc%2fpasswd",
    "/commits/shard-00000/..%5c..%5crun.json",
    "/commits/shard-00000/%00.json",
    "/report/parts/shard-00000.json/..",
    "/report/parts/../report.json",
    "/" + "a" * 5000,
)


def test_nothing_else_of_the_machine_or_the_root_is_served(server, root):
    """P5: no other kind of object, no escape from the root, and no link below it."""
    secret = root.parent / "secret"
    secret.write_bytes(b"secret")
    os.symlink(secret, root / "data/shard-00000/link-00000000.mp4")
    for name in (layout.LEASE, layout.SUMMARY, "data/shard-00000/metadata.parquet"):
        (root / name).write_bytes(b"{}")
    (root / "latents/shard-00000").mkdir(parents=True)
    (root / "latents/shard-00000/s001.safetensors").write_bytes(b"latents")
    for path in SECRET_PATHS:
        status, _, body = ask(server, path)
        assert (status in (404, 502), body) == (True, b""), path


def test_a_rebound_name_gets_nothing(server):
    """P5: a web page whose name points to 127.0.0.1 is not this server's page."""
    for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "localhost.evil:1", "x@localhost"):
        assert ask(server, "/report/report.json", Host=host)[0] == 421, host
    for host in (f"localhost:{server.server_port}", "127.0.0.1:9000"):  # the second through `ssh -L 9000:...`
        assert ask(server, "/report/report.json", Host=host)[0] == 200, host


def test_other_methods_are_refused(server, root):
    before = sorted(root.rglob("*"))
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW"):
        status, headers, _ = ask(server, "/report/index.html", method)
        assert status in (405, 501), method
        assert "default-src 'none'" in headers["content-security-policy"]
    assert sorted(root.rglob("*")) == before


def test_only_the_page_of_this_process_may_run_a_script(server, root):
    """P5: a page that somebody has put into the root is never served, and nothing else may run a script."""
    (root / layout.REPORT).write_text("<script>fetch('/report/report.json')</script>")
    assert b"fetch('/report/report.json')</script>" not in ask(server, "/report/index.html")[2]
    policy = ask(server, video_of(root))[1]["content-security-policy"]
    assert policy == "default-src 'none'; sandbox; frame-ancestors 'none'"
    assert ask(server, "/")[:2][1]["location"] == "/report/index.html"


def test_several_requests_use_one_connection_and_a_client_may_leave(server, root):
    """A video element opens a connection, reads a part and closes it."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)) as connection:
        for _ in range(3):
            connection.request("GET", video_of(root), headers={"Range": "bytes=-10"})
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (206, VIDEO[-10:])
    with closing(socket.create_connection(("127.0.0.1", server.server_port))) as hasty:
        hasty.sendall(f"GET {video_of(root)} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        hasty.recv(100)
    assert ask(server, video_of(root))[2] == VIDEO
    assert ask(server, video_of(root), Range="bytes=0-9", If_Range='"other"')[0] == 200
    status, headers, _ = ask(server, video_of(root), Range=f"bytes={len(VIDEO)}-")
    assert (status, headers["content-range"]) == (416, f"bytes */{len(VIDEO)}")


@given(st.binary(min_size=1, max_size=50), st.integers(0, 60), st.integers(0, 60))
def test_ranges_are_those_of_the_standard(data, first, last):
    """RFC 9110: the bytes of `first-last`, `first-` and `-last`, cut to the object."""
    size = len(data)
    for header, expected in (
        (f"bytes={first}-{last}", data[first : last + 1]),
        (f"bytes={first}-", data[first:]),
        (f"bytes=-{last}", data[max(0, size - last) :] if last else b""),
    ):
        try:
            found = find_range(header, size)
        except RangeNotSatisfiableError:
            assert expected == b""
            continue
        if found is None:
            assert last < first, "a malformed range is ignored"
        else:
            assert data[found[0] : found[1]] == expected


@pytest.mark.parametrize(
    "header", [None, "", "bytes=", "bytes=-", "bytes=a-b", "bytes=0-1,4-5", "lines=0-1", "x" * 999]
)
def test_other_ranges_are_ignored(header):
    assert find_range(header, 10) is None


def test_the_report_follows_a_run(root, monkeypatch):
    """While a driver holds the lease, the root is not written to, and new records appear in the served report."""
    monkeypatch.setattr(serve, "REFRESH_S", 0.05)
    store = Store(str(root))
    with hold_lease(store, this_process("run")), serve.serve_report(store) as server:
        assert not (root / "report").exists()
        seen = json.loads(ask(server, "/report/report.json")[2])
        assert (seen["running"], seen["totals"]["committed"]) == (True, 1)
        commits.commit(store, make_commit(make_sample(3)))
        deadline = time.monotonic() + 30
        while json.loads(ask(server, "/report/report.json")[2])["totals"]["committed"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(json.loads(ask(server, "/report/parts/shard-00000.json")[2])["samples"]) == 3
        update_report(store)  # the driver's own: the parts in the root are newer now
        commits.commit(store, make_commit(make_sample(2)))
        update_report(store)
        while json.loads(ask(server, "/report/report.json")[2])["totals"]["committed"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        states = [sample["state"] for sample in json.loads(ask(server, "/report/parts/shard-00000.json")[2])["samples"]]
        assert states == ["committed"] * 3
    assert not [thread for thread in threading.enumerate() if thread.name == "report-server"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a folder without permission")
def test_a_folder_without_permission_is_served(root):
    """The report of a root that may not be written is made in a temporary folder."""
    root.chmod(0o555)
    try:
        with serve.serve_report(Store(str(root))) as server:
            assert ask(server, "/report/parts/shard-00000.json")[0] == 200
        assert not (root / "report").exists()
    finally:
        root.chmod(0o755)


def test_a_root_that_refuses_writes_is_served(root, monkeypatch):
    """The same for a store whose credentials only allow reading."""
    refused = PermissionError(13, "refused")
    monkeypatch.setattr("hv_batch.job.storage.local_paths.make_folder", lambda path, *_: _refuse(path, root, refused))
    with serve.serve_report(Store(str(root))) as server:
        assert ask(server, "/report/parts/shard-00000.json")[0] == 200
    assert not (root / "report").exists()


def _refuse(path: str, root: Path, refused: PermissionError) -> None:
    if path == str(root):
        raise refused
    Path(path, "report/parts").mkdir(parents=True, exist_ok=True)
    Path(path, "report/digests").mkdir(parents=True, exist_ok=True)


def test_a_port_in_use_is_named(root):
    """P6: the message names the port and the flag."""
    with (
        serve.serve_report(Store(str(root))) as server,
        pytest.raises(UserError, match=f"port {server.server_port}.*--port"),
        serve.serve_report(Store(str(root)), server.server_port),
    ):
        pass
