"""A static HTTP server with ranges that counts what it sends. For measurements only."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json", ".mp4": "video/mp4", ".jpg": "image/jpeg",
         ".png": "image/png"}  # fmt: skip
CHUNK = 1 << 16


class CountingServer(ThreadingHTTPServer):
    """Serves `root`. `sent` counts the bytes of bodies by the first folder of the path; `requests` has the paths."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the browser has closed the connection

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/report/index.html"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CountingServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        file = self.server.root / path
        with self.server.lock:
            self.server.requests.append(path)
        if ".." in path or not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        end = min(size - 1, int(match[2])) if match and match[2] else size - 1
        self.send_response(206 if match else 200)
        self.send_header("Content-Type", TYPES.get(file.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(max(0, end - start + 1)))
        self.send_header("Accept-Ranges", "bytes")
        if match:
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.end_headers()
        self._send(file, start, end + 1, path.partition("/")[0])

    def _send(self, file: Path, start: int, end: int, folder: str) -> None:
        with file.open("rb") as source:
            source.seek(start)
            while start < end and (chunk := source.read(min(CHUNK, end - start))):
                try:
                    self.wfile.write(chunk)
                except OSError:  # the browser has ended the download
                    self.close_connection = True
                    return
                start += len(chunk)
                with self.server.lock:
                    self.server.sent[folder] += len(chunk)

    def log_message(self, *values: object) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[CountingServer]:
    server = CountingServer(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
