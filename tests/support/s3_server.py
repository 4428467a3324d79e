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
            if self.faults and environ["REQUEST_METHOD"] in self.methods:
                self.failed_requests += 1
                status = self.faults.pop(0)
                if self.loses_replies:
                    list(self._app(environ, lambda *_: None))
                else:
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                body = f"<Error><Code>{status}</Code><Message>injected fault</Message></Error>".encode()
                start_response(f"{status} Injected Fault", [("Content-Length", str(len(body)))])
                return [body]
            return self._app(environ, start_response)
