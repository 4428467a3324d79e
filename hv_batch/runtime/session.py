"""Reaching Ray: a running cluster where one is named, else a local Ray that lives as long as the command."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from hv_batch.job.config import RunConfig
from hv_batch.protocol import UserError
from hv_batch.runtime.placement import least_bill, total

# Only embeddings and latents pass through the object store (about 30 MB a sample in flight at 720p), never frames.
# Ray's own default would take a third of a small machine's memory for it.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@contextmanager
def ray_session(config: RunConfig, address: str | None) -> Iterator[bool]:
    """Connect for the length of a `with`; yields whether the Ray is a local one of our own.

    `address` None means RAY_ADDRESS, which `ray job submit` sets, and without that a local Ray.
    """
    local = address is None and not os.environ.get("RAY_ADDRESS")
    try:
        if local:
            _start_local(config)
        else:
            ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise UserError(
            f"No Ray cluster answers at {where}: {error}. Start one (`ray start --head`), give its address with "
            "--address, or leave out both --address and RAY_ADDRESS for a local Ray."
        ) from error
    try:
        yield local
    finally:
        ray.shutdown()


def _start_local(config: RunConfig) -> None:
    # CPUs are bookkeeping to Ray. A laptop with fewer cores than the config counts runs the same actors, only slower.
    needed = total([bundle for bundles in least_bill(config) for bundle in bundles]).get("CPU", 0.0)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(needed)),
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
