"""Connects to Ray: to a running cluster if an address is given, otherwise to a local Ray that ends with the command."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import ray

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.protocol import UserError
from hv_batch.runtime.local_ray import LocalRayError, local_ray
from hv_batch.runtime.nodes.resources import minimum_resources, total
from hv_batch.runtime.ray_contact import REMEDY, contact_cluster, private_token, resolve_address
from hv_batch.runtime.stop_signals import StopSignals

# Only embeddings and latents go through the object store (about 30 MB per sample in flight at 720p), never frames.
# Ray's default would reserve a third of a small machine's memory.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray."""

    is_local: bool  # whether this process has started it
    logs: str  # the folder of the logs of all actors, on each node
    metrics: str  # where Prometheus finds the metrics of this driver; empty if Ray exports none


@contextmanager
def ray_session(run: ResolvedRun, address: str | None, stop: StopSignals | None = None) -> Iterator[Session]:
    """Connect to Ray for the duration of the block.

    If `address` is None, the environment variable RAY_ADDRESS is used, which `ray job submit` sets. Without it the
    address is "local". Raises UserError if no Ray answers or can be started, and KeyboardInterrupt if `stop` is
    requested before the block.
    """
    address = resolve_address(address)
    # The driver handles the error of every task. Ray would also print the tracebacks of the ones already handled.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    with ExitStack() as stack:
        if address == "local":
            with stop.interruptible() if stop else nullcontext():
                started = stack.enter_context(_started_locally(run))
            folder = connect(started)
        else:
            folder = connect(address)
        if stop:
            stack.callback(stop.install)  # because `ray.shutdown` restores the system's default for SIGTERM
        stack.callback(ray.shutdown)
        if stop:
            stop.install()
            stop.check()
        yield Session(is_local=address == "local", logs=f"{folder}/logs", metrics=_metrics_url())


def _metrics_url() -> str:
    """The exporter of the node to which this driver is connected."""
    own = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == own and node["MetricsExportPort"]:
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return ""


def submission_id() -> str | None:
    """The submission id of the Ray job that runs this process; None if it was not started by `ray job submit`."""
    try:
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        name: str | None = job["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return name


def connect(address: str) -> str:
    """Connect this process to the cluster, and return the folder of Ray's session.

    `ray.init` runs in a thread, because in the main thread it replaces the handler of SIGTERM by one that exits in the
    middle of whatever the driver is doing.
    """
    contact_cluster(address)
    try:
        with ThreadPoolExecutor(1, "connect") as thread:
            start = thread.submit(ray.init, address=address, log_to_driver=False, logging_level=logging.ERROR)
            return str(start.result().address_info["session_dir"])
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"The Ray cluster at {address} refuses this driver: {error}. {REMEDY}") from error


@contextmanager
def _started_locally(run: ResolvedRun) -> Iterator[str]:
    # Ray only counts CPUs. A machine with fewer cores than the config asks for runs the same actors more slowly.
    needed = total([bundle for bundles in minimum_resources(run) for bundle in bundles]).get("CPU", 0.0)
    options = {
        "num_cpus": max(os.cpu_count() or 1, math.ceil(needed)),
        "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    private_token()
    try:
        with local_ray(options) as address:
            yield address
    except LocalRayError as error:
        if "AF_UNIX path length" in str(error):
            raise UserError(
                f"The temporary folder {os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()} has too long a path for "
                "a local Ray, which keeps sockets below it: a socket's path has at most 107 bytes. Set RAY_TMPDIR to a "
                "folder with a short path on a local disk, such as /tmp."
            ) from error
        raise UserError(
            f"No local Ray could be started: {error}. Check the free memory and the free space in the temporary "
            "folder, and run the same command again when the machine is less busy; or use a running cluster with "
            "--address."
        ) from error
