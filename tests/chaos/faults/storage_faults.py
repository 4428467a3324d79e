"""An S3 endpoint that fails as real ones do: a WSGI layer in front of moto's server.

A fault is switched on by its name and is active until it is switched off. The layer counts the requests that it has
disturbed. Its draws come from a seed, but the order of the requests does not, so a replay disturbs other requests.

    503            a share of the requests gets 503 SlowDown
    expired        every request gets 400 ExpiredToken
    skewed         every request gets 403 RequestTimeTooSkewed
    hang           a share of the requests gets no answer while the fault is active, and then a closed connection
    torn           the connection of an upload is closed after half of its body; nothing is stored
    unacknowledged an upload is stored and its connection closed before the answer
    forgotten      one upload is confirmed and not stored; then the fault is over
    stale          a listing is the one that the same request got when it was last sent before the fault
    slow           every request waits
    down           every connection is closed at once

As in S3, a request whose date is off by more than 15 minutes is always refused.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from moto.s3 import models

from tests.support.s3_server import S3Server

FAULTS = ("503", "expired", "skewed", "hang", "torn", "unacknowledged", "forgotten", "stale", "slow", "down")
SHARE = 0.6  # of the requests that a fault of a share disturbs: retries of one request must be able to fail in a row
MAX_DELAY_S = 0.7
MAX_SKEW_S = 900.0

Answer = Iterable[bytes]


class StorageFaults:
    """The layer. `switch_on` and `switch_off` may be called in any thread."""

    def __init__(self, seed: int) -> None:
        self.counts: Counter[str] = Counter()  # disturbed requests by fault
        self.forgotten: list[str] = []  # paths of the objects that were confirmed and not stored
        self._random = random.Random(seed)
        self._active: dict[str, str] = {}  # fault -> a part of the paths that it concerns
        self._ended = threading.Event()  # set while no request has to hang
        self._listings: dict[str, tuple[str, list[tuple[str, str]], bytes]] = {}
        self._lock = threading.Lock()
        self.requests = 0
        self.script: dict[int, list[Callable[[], object]]] = {}  # what is done before a request, by its number

    def switch_on(self, fault: str, only: str = "") -> None:
        """`only` is a part of the paths of the requests that the fault concerns."""
        with self._lock:
            self._active[fault] = only
            if fault == "hang":
                self._ended.clear()

    def switch_off(self, fault: str) -> None:
        with self._lock:
            self._active.pop(fault, None)
            if fault == "hang":
                self._ended.set()

    def switch_all_off(self) -> None:
        for fault in FAULTS:
            self.switch_off(fault)

    @property
    def active(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._active)

    def answer(self, server: FaultyS3, environ: dict[str, Any], start_response: Any) -> Answer:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.requests += 1
            acts = self.script.pop(self.requests, [])
        for act in acts:
            act()
        uploads = method in ("PUT", "POST")
        if _is_skewed(environ.get("HTTP_X_AMZ_DATE", "")):
            return self._refuse(server, environ, start_response, "skewed", 403, "RequestTimeTooSkewed")
        if self._hits("slow", path):
            time.sleep(self._draw() * MAX_DELAY_S)
        if self._hits("down", path) or (self._hits("hang", path, SHARE) and self._wait()):
            return _close(environ)
        if self._hits("expired", path):
            return self._refuse(server, environ, start_response, "expired", 400, "ExpiredToken")
        if self._hits("skewed", path):
            return self._refuse(server, environ, start_response, "skewed", 403, "RequestTimeTooSkewed")
        if self._hits("503", path, SHARE):
            return server.refuse(environ, start_response, 503, "SlowDown")
        if uploads and self._hits("torn", path, SHARE):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            return _close(environ)
        if uploads and self._hits("unacknowledged", path, SHARE):
            list(server.carry_out(environ, lambda *_: None))
            return _close(environ)
        if method == "PUT" and self._hits("forgotten", path):
            self.switch_off("forgotten")
            self.forgotten.append(path)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("200 OK", [("Content-Length", "0"), ("ETag", '"forgotten"')])
            return []
        if method == "GET" and "list-type=2" in environ.get("QUERY_STRING", ""):
            return self._list(server, environ, start_response)
        return server.carry_out(environ, start_response)

    def _hits(self, fault: str, path: str, share: float = 1.0) -> bool:
        with self._lock:
            hit = fault in self._active and self._active[fault] in path and self._random.random() < share
            self.counts[fault] += hit
        return hit

    def _draw(self) -> float:
        with self._lock:
            return self._random.random()

    def _wait(self) -> bool:
        self._ended.wait(60.0)  # longer than the time-outs of all clients
        return True

    def _refuse(
        self, server: FaultyS3, environ: Any, start_response: Any, fault: str, status: int, code: str
    ) -> Answer:
        self.counts[fault] += fault not in self._active
        return server.refuse(environ, start_response, status, code)

    def _list(self, server: FaultyS3, environ: dict[str, Any], start_response: Any) -> Answer:
        query = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        if (known := self._listings.get(query)) and self._hits("stale", environ["PATH_INFO"]):
            status, headers, body = known
        else:
            answered: list[Any] = []
            body = b"".join(server.carry_out(environ, lambda *head: answered.extend(head[:2])))
            status, headers = answered
            if "stale" not in self.active:
                self._listings[query] = (status, headers, body)
        start_response(status, headers)
        return [body]


class FaultyS3(S3Server):
    """moto's server behind `layer`."""

    def __init__(self, seed: int) -> None:
        models.S3_UPLOAD_PART_MIN_SIZE = 1  # so that tiny files are uploaded in parts
        self.layer = StorageFaults(seed)
        super().__init__()

    def start(self) -> None:
        super().start()
        self._server._server.app = lambda environ, start_response: self.layer.answer(self, environ, start_response)

    def carry_out(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        return self._answer(environ, start_response)

    def refuse(self, environ: dict[str, Any], start_response: Any, status: int, code: str) -> Answer:
        return self._fail(environ, start_response, status, code)


def _is_skewed(date: str) -> bool:
    """Whether the date of a request, as 20261129T021500Z, is too far from now."""
    if not date:
        return False
    sent = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return abs(sent.timestamp() - time.time()) > MAX_SKEW_S


def _close(environ: dict[str, Any]) -> Answer:
    """Close the connection without an answer."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError("closed by a fault")
