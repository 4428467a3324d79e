"""The HTTP server of a report, for one user on this machine: GET and HEAD on 127.0.0.1, with ranges.

Web pages from elsewhere must not read the root through the user's browser: a request must name this machine as its
host, which a rebound DNS name does not, and other sites may not embed what it sends. No answer except the page may run
a script.
"""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from hv_batch.job import layout
from hv_batch.job.report.server.objects import ServedObject, ServedRoot
from hv_batch.job.report.server.ranges import RangeNotSatisfiableError, find_range

ADDRESS = "127.0.0.1"
CHUNK_BYTES = 2**20  # of an object, read and sent at a time
MAX_PATH_CHARS = 1000
IDLE_S = 60.0  # until a connection without a request is closed

# The policy of the page is in the page; this one cannot be.
PAGE_POLICY = "frame-ancestors 'none'"
DATA_POLICY = "default-src 'none'; sandbox; frame-ancestors 'none'"

# The port may be another one, which ssh forwards.
_LOCAL_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?")

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}

logger = logging.getLogger(__name__)


class ReportServer(ThreadingHTTPServer):
    """Serves a root until `shutdown`. Port 0 is any free port. Raises OSError if the port is in use."""

    daemon_threads = True

    def __init__(self, root: ServedRoot, port: int = 0) -> None:
        super().__init__((ADDRESS, port), _Handler)
        self.root = root

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://{ADDRESS}:{self.server_port}/{layout.REPORT}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request has failed", exc_info=True)  # its client has gone, in general


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hv_batch", ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _refuse_method(self) -> None:
        self.close_connection = True  # its body is not read
        self._send_nothing(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method  # noqa: N815  # names that http.server calls

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _LOCAL_HOST.fullmatch(hosts[0]):
            self._send_nothing(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = unquote(urlsplit(self.path).path) if len(self.path) <= MAX_PATH_CHARS else ""
        if path in ("/", "/report", "/report/"):
            self._send_nothing(HTTPStatus.FOUND, {"Location": f"/{layout.REPORT}"})
            return
        try:
            self._send(self.server.root.find(path.removeprefix("/")))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone
        except (FileNotFoundError, ValueError):
            self._send_nothing(HTTPStatus.NOT_FOUND)
        except OSError as error:
            logger.warning(f"{path} cannot be served: {error}")
            self._send_nothing(HTTPStatus.BAD_GATEWAY)

    def _send(self, found: ServedObject) -> None:
        headers = {
            "Content-Type": found.content_type,
            "ETag": found.etag,
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, max-age=86400, immutable" if found.never_changes else "no-cache",
            "Content-Security-Policy": PAGE_POLICY if found.is_page else DATA_POLICY,
        }
        if found.etag in self.headers.get("If-None-Match", "").replace(" ", "").split(","):
            self._send_head(HTTPStatus.NOT_MODIFIED, headers)
            return
        wanted = self.headers.get("Range") if self.headers.get("If-Range", found.etag) == found.etag else None
        try:
            part = find_range(wanted, found.size)
        except RangeNotSatisfiableError:
            self._send_nothing(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{found.size}"})
            return
        start, end = part or (0, found.size)
        if part:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{found.size}"
        status = HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK
        headers["Content-Length"] = str(end - start)
        if self.command == "HEAD":
            self._send_head(status, headers)
            return
        # Before the head: an object that cannot be read must not begin as if it could.
        chunk = found.read(start, min(end, start + CHUNK_BYTES))
        self._send_head(status, headers)
        self.wfile.write(chunk)
        self._send_bytes(found, start + len(chunk), end)

    def _send_bytes(self, found: ServedObject, start: int, end: int) -> None:
        while start < end:
            try:
                chunk = found.read(start, min(end, start + CHUNK_BYTES))
            except OSError as error:
                logger.warning(f"{self.path} could not be read to its end: {error}")
                chunk = b""
            if not chunk:  # the head has promised more bytes: only a closed connection says that they are missing
                self.close_connection = True
                return
            self.wfile.write(chunk)
            start += len(chunk)

    def _send_nothing(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self._send_head(status, {"Content-Security-Policy": DATA_POLICY, **(headers or {}), "Content-Length": "0"})

    def _send_head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The standard library reports malformed requests and other methods here."""
        self.close_connection = True
        self._send_nothing(HTTPStatus(code))

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug(format, *arguments)
