"""on_finish: a real command and a real web server get the document; nothing changes the end of the command."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hv_batch.job.hooks import notify as notify_module
from hv_batch.job.hooks.notify import VARIABLE, describe_target, notify, take_target
from hv_batch.protocol import UserError

SECRET = "T0000/B0000/XXXXXXXX"


class Webhook(ThreadingHTTPServer):
    """Answers every POST with `status` after `delay_s`, and keeps what it got."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: list[tuple[str, dict]] = []
        self.status, self.delay_s = 200, 0.0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/{SECRET}?key=abc"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):  # the name that http.server calls
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, json.loads(body)))
        time.sleep(self.server.delay_s)
        self.send_response(self.server.status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def webhook():
    with Webhook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_url_gets_the_document(webhook, caplog):
    with caplog.at_level(logging.INFO):
        assert notify(webhook.url, {"text": "狐狸"})
    assert webhook.got == [(f"/services/{SECRET}?key=abc", {"text": "狐狸"})]
    assert SECRET not in caplog.text
    assert "http://127.0.0.1/***" in caplog.text


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_refusal_is_a_warning_without_the_secret(webhook, caplog, status):
    webhook.status = status
    assert not notify(webhook.url, {})
    assert f"HTTP status {status}" in caplog.text
    assert SECRET not in caplog.text
    assert len(webhook.got) == 1, "a redirect is not followed"


def test_a_server_that_does_not_answer_costs_a_bounded_time(webhook, caplog, monkeypatch):
    monkeypatch.setattr(notify_module, "LIMIT_S", 0.3)
    webhook.delay_s = 5.0
    begun = time.monotonic()
    assert not notify(webhook.url, {})
    assert time.monotonic() - begun < 4.0
    assert SECRET not in caplog.text


def test_a_server_that_is_not_there_is_a_warning(webhook, caplog):
    webhook.server_close()
    assert not notify(webhook.url, {})
    assert "was not informed: Connection" in caplog.text  # refused, or reset by the closing server
    assert SECRET not in caplog.text


def test_a_command_gets_the_document_on_its_stdin(tmp_path, caplog):
    code = f"import sys; open({str(tmp_path / 'got')!r}, 'w').write(sys.stdin.read())"
    assert notify(f"{sys.executable} -c {shlex.quote(code)}", {"text": "done"})
    assert json.loads((tmp_path / "got").read_text()) == {"text": "done"}
    assert not notify(f"{sys.executable} -c 'raise SystemExit(3)'", {})
    assert "exit code 3" in caplog.text


def test_the_environment_names_a_target_that_no_child_process_inherits(monkeypatch):
    monkeypatch.setenv(VARIABLE, f"https://hooks.example/{SECRET}")
    assert take_target(None) == f"https://hooks.example/{SECRET}"
    assert take_target(None) is None, "it is removed from the environment"
    monkeypatch.setenv(VARIABLE, "https://hooks.example/other")
    assert take_target("true") == "true", "the flag wins"


@pytest.mark.parametrize(
    "target", ["", "no_such_program", "ftp://host/x", "https://", "package.module:function", "a 'b"]
)
def test_a_target_that_cannot_work_is_refused_before_the_run(target):
    """P6"""
    with pytest.raises(UserError, match=r"--on-finish .*allowed: an http or https URL, or a command line"):
        take_target(target)


def test_a_url_that_cannot_be_used_is_not_shown(monkeypatch):
    monkeypatch.setenv(VARIABLE, f"ftp://host/{SECRET}")
    with pytest.raises(UserError) as caught:
        take_target(None)
    assert SECRET not in str(caught.value)
    assert VARIABLE in str(caught.value)


def test_messages_show_the_host_only():
    assert describe_target(f"https://user:pw@hooks.example:8443/{SECRET}?k=v") == "https://hooks.example/***"
