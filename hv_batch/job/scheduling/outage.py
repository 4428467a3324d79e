"""The scheduler's view of an outage of the output root: since when it lasts, and when decodes may start again."""

from __future__ import annotations

from hv_batch.job.scheduling.limits import OUTAGE_LIMIT_S, OUTAGE_PAUSE_S


class OutageTimer:
    """Pauses decodes after each OUTAGE failure of a task, and limits how long an outage may last."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._no_decode_before = 0.0

    def may_decode(self, now: float) -> bool:
        return now >= self._no_decode_before

    def seconds(self, now: float) -> float:
        """How long the outage lasts; 0 if there is none."""
        return 0.0 if self._since is None else now - self._since

    def fail(self, now: float, *, pause_decodes: bool) -> bool:
        """Record an OUTAGE failure. Returns whether the outage has lasted longer than OUTAGE_LIMIT_S."""
        if self._since is None:
            self._since = now
        if pause_decodes:
            self._no_decode_before = now + OUTAGE_PAUSE_S
        return now - self._since > OUTAGE_LIMIT_S

    def end(self) -> None:
        """The output root was reached. A pause of the decodes still lasts to its end."""
        self._since = None

    def resume_decodes(self, now: float) -> None:
        """A spooled video was committed, so the output root accepts writes and decodes may start at once."""
        self._since, self._no_decode_before = None, now
