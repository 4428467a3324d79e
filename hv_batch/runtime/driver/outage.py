"""How the driver bears an output root that does not answer: it waits, says so, and gives up in the end.

The actors' part is the scheduler's: a decode that meets an outage is tried again and nobody is charged. The driver has
errands of its own (looking shards up, quarantining, sealing), and nobody to try them again for it.
"""

from __future__ import annotations

import logging

from hv_batch.job.formatting import clock
from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S, OUTAGE_PAUSE_S
from hv_batch.job.storage.errors import StorageUnavailableError
from hv_batch.protocol import UserError

logger = logging.getLogger(__name__)


class Outage:
    """At most one at a time; times are seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._try_at = 0.0

    def pauses(self, now: float) -> bool:
        """Whether the next try should wait: each takes the driver some 15 s, in which it hears nobody."""
        return now < self._try_at

    def met(self, error: StorageUnavailableError, now: float) -> None:
        """A try has failed. Raises UserError when that has gone on for too long."""
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
                "is committed stays; mend this and run the same command again to render the rest."
            )

    def over(self, now: float) -> None:
        """A try has succeeded."""
        if self._since is not None:
            logger.info(f"the output root answers again, after {clock(now - self._since)}")
        self._since, self._try_at = None, 0.0
