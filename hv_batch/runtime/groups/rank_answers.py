"""Collects the answers of all ranks to one call, or their errors, without blocking."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from hv_batch.job.scheduling.messages import Event
from hv_batch.runtime.worker import Watch

# When a rank fails, the errors of its peers arrive within moments. They are collected for so long before the most
# telling one is chosen.
COLLATERAL_S = 0.3

CallLater = Callable[[float, Callable[[], list[Event]]], None]  # after so many seconds, in the driver's loop
Answers = Mapping[ray.ObjectRef, Any]
Errors = Mapping[ray.ObjectRef, RayError]


class RankAnswers:
    """Calls `then` with the answers once all references of `asked` are ready, or `fail` with the errors among them.

    After the first error, the other references have COLLATERAL_S to become ready. Exactly one of the two functions is
    called, once, unless `cancel` comes first.
    """

    def __init__(
        self,
        asked: Iterable[ray.ObjectRef],
        then: Callable[[Answers], list[Event]],
        fail: Callable[[Errors], list[Event]],
        watch: Watch,
        call_later: CallLater,
    ) -> None:
        self._missing = set(asked)
        self._answers: dict[ray.ObjectRef, Any] = {}
        self._errors: dict[ray.ObjectRef, RayError] = {}
        self._then = then
        self._fail = fail
        self._call_later = call_later
        self._is_decided = False
        for ref in tuple(self._missing):
            watch(ref, self._answered)

    @property
    def is_failing(self) -> bool:
        """Whether a rank has failed, and errors of others may follow."""
        return bool(self._errors) and not self._is_decided

    def cancel(self) -> None:
        """Ignore whatever comes."""
        self._is_decided = True

    def _answered(self, ref: ray.ObjectRef) -> list[Event]:
        if self._is_decided:
            return []
        self._missing.discard(ref)
        try:
            self._answers[ref] = ray.get(ref)
        except RayError as error:
            if not self._errors:
                self._call_later(COLLATERAL_S, self._decide)
            self._errors[ref] = error
        return [] if self._missing else self._decide()

    def _decide(self) -> list[Event]:
        if self._is_decided:
            return []
        self._is_decided = True
        return self._fail(self._errors) if self._errors else self._then(self._answers)
