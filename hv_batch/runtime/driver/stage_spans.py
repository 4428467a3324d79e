"""Optional traces: one OpenTelemetry span per sample, stage and attempt, sent by OTLP over HTTP.

They are on if a variable of ENDPOINTS is set and the packages of the extra `otel` are installed. The other variables of
OpenTelemetry (headers, sampler, resource attributes, OTEL_SDK_DISABLED) apply as documented there. The stages of a
sample are one trace, which begins with its first stage in this command.

Spans are exported in a thread of the SDK. If the receiver is slow or gone, spans are dropped and the loop never waits.
Attributes are names, numbers and failure classes; no prompt, no message and no part of an environment variable.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from hv_batch import __version__
from hv_batch.job.failure import FailureClass
from hv_batch.job.scheduling.messages import WorkerId
from hv_batch.job.stages import Stage
from hv_batch.runtime.worker import InFlight

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
CLOSE_S = 2.0  # how long the end of a run waits for the last spans

logger = logging.getLogger(__name__)


def start_spans(run: str) -> StageSpans | None:
    """The spans of the run; None if there is no endpoint, or with a warning if a package is missing or unusable.

    `run` names the output root and must not contain a secret.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # its messages contain URLs and values of variables
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return StageSpans(run, OTLPSpanExporter())
    except ImportError as error:
        logger.warning(f"an endpoint for traces is set, but {error.name} is missing: pip install 'hv_batch[otel]'")
    except ValueError:
        logger.warning("no traces: a variable OTEL_BSP_* is not valid; allowed are whole numbers of at least 1")
    return None


class StageSpans:
    """Its methods are for the loop's thread, and return at once, except `close`."""

    def __init__(self, run: str, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        service = os.environ.get("OTEL_SERVICE_NAME", "hv_batch")
        resource = Resource.create({SERVICE_NAME: service, SERVICE_VERSION: __version__, "hv.run": run})
        # Not the global provider, which belongs to Ray. Its shutdown at exit would wait for a receiver that hangs.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hv_batch", __version__)

    def task_ended(
        self,
        worker: WorkerId,
        nodes: Collection[str],
        stage: Stage,
        items: Sequence[InFlight],
        begun: float,
        cause: FailureClass | None = None,
    ) -> None:
        """A task that began at the monotonic time `begun` has ended; `cause` if it failed or was cut off."""
        from opentelemetry.trace import NonRecordingSpan, Status, StatusCode, set_span_in_context

        end_ns = time.time_ns()
        begin_ns = end_ns - round((time.monotonic() - begun) * 1e9)
        for item in items:
            attributes: dict[str, Any] = {
                "hv.sample": item.sample.key,
                "hv.shard": item.sample.shard,
                "hv.attempt": item.attempt,
                "hv.worker": str(worker),
                "hv.nodes": sorted(nodes),
                "hv.samples_of_task": len(items),
            }
            if cause:
                attributes["hv.failure"] = cause.value
            parent = set_span_in_context(NonRecordingSpan(item.trace)) if item.trace else None
            span = self._tracer.start_span(stage.name.lower(), parent, attributes=attributes, start_time=begin_ns)
            if cause:
                span.set_status(Status(StatusCode.ERROR))
            span.end(end_ns)
            item.trace = item.trace or span.get_span_context()

    def close(self) -> None:
        """Send the remaining spans, for at most CLOSE_S."""
        # In a daemon thread, because the SDK's own limits are not kept by an exporter that is in a request.
        thread = threading.Thread(target=self._provider.shutdown, name="driver-spans", daemon=True)
        thread.start()
        thread.join(CLOSE_S)
