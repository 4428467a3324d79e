"""The lease of an output root, for a command that changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hv_batch.job.records.lease import hold_lease
from hv_batch.job.records.lease_holder import this_process
from hv_batch.job.records.run_document import read_run
from hv_batch.job.storage.store import Store


@contextmanager
def changing(store: Store, purpose: str, changes: bool, take_over: bool) -> Iterator[Callable[[], None]]:
    """Hold the lease of the root if the command changes it.

    Yields a function that must be called before each change: it raises UserError if another writer has taken the root
    over.
    """
    if not changes:
        yield lambda: None
        return
    read_run(store)  # raises if there is no run: a mistyped path must not become a folder with a lease
    with hold_lease(store, this_process(purpose), steal=take_over) as lease:
        assert lease is not None, "without `wait` the lease is held or refused"
        yield lease.check
