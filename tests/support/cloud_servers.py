"""Emulators of Google Cloud Storage and Azure Blob Storage on this machine, over HTTP.

Their packages are not part of the test extra: `pip install gcsfs gcp-storage-emulator adlfs`, `npm install -g azurite`.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

# The default account of Azurite; its key is public.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
START_S = 60


class GcsServer:
    """An emulator that checks `ifGenerationMatch=0`, which the package ignores, and handles one request at a time."""

    def __init__(self) -> None:
        server = pytest.importorskip("gcp_storage_emulator.server")
        objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
        self.ignores_conditions = False
        self._insert = objects.insert
        for _, handlers in server.HANDLERS:
            for method, handler in list(handlers.items()):
                if handler is objects.insert:
                    handlers[method] = self._judge
        self._server = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="nights")
        self._server.start()
        host, port = self._server._api._httpd.server_address[:2]
        self.endpoint = f"http://{host}:{port}"

    def stop(self) -> None:
        self._server.stop()

    def _judge(self, request: Any, response: Any, storage: Any) -> None:
        if "ifGenerationMatch" in request.query and not self.ignores_conditions:
            assert request.query["ifGenerationMatch"] == ["0"]
            name = request.query.get("name", [None])[0] or request.data["meta"]["name"]
            if storage.get_file_list(request.params["bucket_name"], name)[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                response.json({"error": {"code": 412, "message": "a condition that you specified did not hold"}})
                return
        self._insert(request, response, storage)


@contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """Starts Microsoft's emulator and returns its connection string."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = ["--location", str(folder), "--blobPort", str(port), "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    alarm = threading.Timer(START_S, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        assert any("successfully listens" in line for line in process.stdout), "azurite did not start"
        alarm.cancel()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield (
            f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{AZURE_ACCOUNT};"
        )
    finally:
        alarm.cancel()
        process.terminate()
        process.wait()
