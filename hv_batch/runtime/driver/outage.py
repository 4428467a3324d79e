"""How the driver handles an output root that does not answer: it waits, logs it, and ends the run after a limit.

The scheduler handles the outages that actors meet: it tries their tasks again and charges no sample. This is for what
the driver itself does in the output root: look-ups of shards, quarantine records and seals.
"""

from __future__ import annotations

import logging

from hv_batch.job.formatting import clock
from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S, OUTAGE_PAUSE_S
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.protocol import UserError

logger = logging.getLogger(__name__)


class Outage:
    """The outage of one output root, if there is one. Times are seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._try_at = 0.0

    @property
    def is_away(self) -> bool:
        """Whether the last try has failed."""
        return self._since is not None

    def pauses(self, now: float) -> bool:
        """Whether new tries should wait, because one has failed less than OUTAGE_PAUSE_S ago."""
        return now < self._try_at

    def seconds(self, now: float) -> float:
        """How long the outage lasts; 0 if there is none."""
        return 0.0 if self._since is None else now - self._since

    def note_failure(self, error: StorageUnavailableError, now: float) -> None:
        """A try has failed. Raises UserError if tries have failed for longer than OUTAGE_LIMIT_S."""
        self._try_at = now + OUTAGE_PAUSE_S
        if self._since is None:
            self._since = now
            logger.warning(
                f"the output root does not answer, trying again every {OUTAGE_PAUSE_S:g} s for at most "
                f"{clock(OUTAGE_LIMIT_S)}; what is running goes on: {error}"
            )
        elif now - self._since > OUTAGE_LIMIT_S:
            raise UserError(
                f"The run cannot go on: the output root has not answered for {clock(now - self._since)}: {error}. What "
                "is committed stays; fix this and run the same command again to render the rest."
            )

    def note_success(self, now: float) -> None:
        """A try has succeeded, which ends the outage."""
        if self._since is not None:
            logger.info(f"the output root answers again, after {clock(now - self._since)}")
        self._since, self._try_at = None, 0.0
