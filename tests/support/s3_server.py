"""A real S3 endpoint on this machine that speaks HTTP, and whose answers can be spoilt."""

from __future__ import annotations

import threading
from typing import Any

from moto.server import ThreadedMotoServer


class S3Server:
    """An S3 endpoint whose answers can be spoilt, to see what the client makes of it."""

    def __init__(self) -> None:
        self._port = 0  # any that is free
        self.start()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        # S3 judges a conditional PUT atomically. The stand-in checks and then stores, so it gets one request at a time.
        self._turn = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.faults: list[int] = []  # statuses of the next requests with one of the methods
        self.methods = {"PUT", "GET"}
        self.loses_answers = False  # a spoilt request is carried out all the same
        self.ignores_conditions = False  # as some S3-compatible servers do
        self.spoilt = 0

    def start(self) -> None:
        """Also after a stop: it is the same endpoint, with all that was stored there."""
        self._server = ThreadedMotoServer("127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()
        self._app = self._server._server.app
        self._server._server.app = self._answer

    def stop(self) -> None:
        """Connections are refused from now on."""
        self._server.stop()
        self._server._server.server_close()

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
