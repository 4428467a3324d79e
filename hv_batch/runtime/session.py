"""Reaching Ray: a running cluster where one is named, else a local Ray that lives as long as the command."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from hv_batch.job.cost_model.resolved_run import ResolvedRun
from hv_batch.protocol import UserError
from hv_batch.runtime.nodes.resources import minimum_resources, total

# Only embeddings and latents pass through the object store (about 30 MB a sample in flight at 720p), never frames.
# Ray's own default would take a third of a small machine's memory for it.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20

CONNECT_TIMEOUT_S = 10.0


@contextmanager
def ray_session(run: ResolvedRun, address: str | None) -> Iterator[bool]:
    """Connect for the length of a `with`; yields whether the Ray is a local one of our own.

    `address` None means RAY_ADDRESS, which `ray job submit` sets, and without that "local": a Ray of our own.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    # Every failed task is looked at by the driver; Ray would print the tracebacks of those it has classified as well.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    if address == "local":
        _start_local(run)
    else:
        _connect(address)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def submission_id() -> str | None:
    """The name of the job that `ray job submit` started this process for; None for any other process."""
    try:
        told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        name: str | None = told["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return name


def _connect(address: str) -> None:
    try:
        if match := re.fullmatch(r"(?:ray://)?(\[.+\]|[^:/]+):(\d+)", address):
            # Asked first, because Ray itself tries an address that does not answer for minutes.
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"No Ray cluster answers at {address}: {error}. Start one (`ray start --head`) and give the address it "
            "prints with --address, or leave out both --address and RAY_ADDRESS for a local Ray."
        ) from error


def _start_local(run: ResolvedRun) -> None:
    # CPUs are bookkeeping to Ray. A laptop with fewer cores than the config counts runs the same actors, only slower.
    needed = total([bundle for bundles in minimum_resources(run) for bundle in bundles]).get("CPU", 0.0)
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(needed)),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises bare ones, as when a busy machine takes too long
        raise UserError(
            f"No local Ray could be started: {error}. Run the same command again when the machine has less to do, and "
            "see that there is memory and space in the temporary folder; or name a running cluster with --address."
        ) from error
