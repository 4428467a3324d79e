"""An S3 endpoint on this machine over HTTP, with fault injection."""

from __future__ import annotations

import threading
from typing import Any

from moto.server import ThreadedMotoServer


class S3Server:
    """An S3 endpoint that can be set to fail requests."""

    def __init__(self) -> None:
        self._port = 0  # any free port
        self.start()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        # S3 checks the condition of a PUT atomically. This server checks and then stores, so requests are serialized.
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.faults: list[int] = []  # statuses of the next requests with one of the methods
        self.methods = {"PUT", "GET"}
        self.loses_replies = False  # a failed request is carried out all the same
        self.ignores_conditions = False  # as some S3-compatible servers do
        self.failed_requests = 0
        self.refusal: tuple[int, str] | None = None  # status and code of the answer to every request, if there is one
        self.refuses_checksums = False  # of uploads, as some S3-compatible servers do
        self.accepted_key: str | None = None  # the access key id of all valid credentials; others have expired
        self.forgets: list[str] = []  # parts of keys: one PUT of such an object is confirmed and not stored

    def start(self) -> None:
        """Start the server; after a stop, it is the same endpoint with the same objects."""
        self._server = ThreadedMotoServer("127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()
        self._app = self._server._server.app
        self._server._server.app = self._answer

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.stop()
        self._server._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        with self._lock:
            if self.ignores_conditions:
                environ.pop("HTTP_IF_NONE_MATCH", None)
            method = environ["REQUEST_METHOD"]
            if self.faults and method in self.methods:
                if self.loses_replies:
                    list(self._app(environ, lambda *_: None))
                status = self.faults.pop(0)
                return self._fail(environ, start_response, status, str(status))
            if self.refusal:
                return self._fail(environ, start_response, *self.refusal)
            if self.accepted_key and f"Credential={self.accepted_key}/" not in environ.get("HTTP_AUTHORIZATION", ""):
                return self._fail(environ, start_response, 400, "ExpiredToken")
            if self.refuses_checksums and method == "PUT" and any("CHECKSUM" in name for name in environ):
                return self._fail(environ, start_response, 501, "NotImplemented", "x-amz-sdk-checksum-algorithm")
            forgotten = [part for part in self.forgets if method == "PUT" and part in environ["PATH_INFO"]]
            if forgotten:
                self.forgets.remove(forgotten[0])
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("200 OK", [("Content-Length", "0"), ("ETag", '"forgotten"')])
                return []
            return self._app(environ, start_response)

    def _fail(
        self, environ: dict[str, Any], start_response: Any, status: int, code: str, message: str = "injected fault"
    ) -> list[bytes]:
        self.failed_requests += 1
        if not self.loses_replies:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        if environ["REQUEST_METHOD"] == "HEAD":  # the reply to HEAD has no body, so the code is not known
            body = b""
        start_response(f"{status} Injected Fault", [("Content-Length", str(len(body)))])
        return [body]
