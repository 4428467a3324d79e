"""A receiver of OpenTelemetry traces over real HTTP."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        server.hold.wait(100)
        server.headers.append(dict(self.headers))
        server.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            server.resources.append({each.key: each.value.string_value for each in resource.resource.attributes})
            server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def otlp_receiver():
    """Runs within the block. `spans`, `resources`, `headers` and `bodies` are what it got; it hangs while `hold` is
    cleared, and `endpoint` is its URL.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.spans, server.resources, server.headers, server.bodies = [], [], [], []
    server.hold = threading.Event()
    server.hold.set()
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()


def attributes_of(span):
    return {each.key: each.value for each in span.attributes}
