"""The part of the Hugging Face Hub's HTTP API that reads the files of one dataset repository, on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = "org/prompts"
COMMIT = "0123456789" * 4
API = f"/api/datasets/{REPOSITORY}"


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[str]:
    """Serve `files` as `hf://datasets/org/prompts/...`; yields the value of HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path in (API, f"{API}/revision/main", f"{API}/revision/{COMMIT}"):
                self._send({"id": REPOSITORY, "sha": COMMIT, "siblings": [], "tags": [], "downloads": 0, "likes": 0})
            elif path.startswith(f"{API}/tree/"):
                folder = "/".join(path.removeprefix(f"{API}/tree/").split("/")[1:])
                self._send(_entries(files, folder, "recursive=true" in self.path.lower()), 200)
            else:
                self._send_file(files.get(path.partition("/resolve/")[2].partition("/")[2]))

        do_HEAD = do_GET  # noqa: N815 (a name of http.server)

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            asked = self.rfile.read(length).decode()
            self._send([_entry(name, data) for name, data in files.items() if name in unquote(asked)])

        def _send(self, value: Any, status: int = 200) -> None:
            self._reply(status, json.dumps(value).encode(), {"content-type": "application/json"})

        def _send_file(self, data: bytes | None) -> None:
            if data is None:
                self._reply(404, b"", {"x-error-code": "EntryNotFound"})
                return
            first, _, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            self._reply(206, part, {"content-range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"})

        def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body)), "x-repo-commit": COMMIT}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """No log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}


def _entries(files: dict[str, bytes], folder: str, is_recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    below = {name: data for name, data in files.items() if name.startswith(prefix)}
    folders = {
        prefix + "/".join(parts[:depth])
        for parts in (name.removeprefix(prefix).split("/") for name in below)
        for depth in range(1, len(parts))
    }
    entries = [_entry(name, data) for name, data in below.items()]
    entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders)]
    return [one for one in entries if is_recursive or "/" not in one["path"].removeprefix(prefix)]
