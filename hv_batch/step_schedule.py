"""Which steps of a denoise run the model: the options of the step cache and of CFG gating, and the steps they compute.

A step is *computed* if the DiT runs, and *predicted* from the velocities of earlier computed steps otherwise. The
engine (`hv_batch.engine.sampling.step_cache`) and the cost model share this module, which imports neither torch nor one
of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hv_batch.protocol import UserError
from hv_batch.sampling_params import MAX_STEPS

KIND = "schedule"
MAX_ORDER = 2
MAX_TAPER = 0.9
TAPER_UNIT = 1000  # tapers are rounded to three digits
CORRECTOR_NODES = 3  # velocities through which the correction interpolates, that of the new computed step included
OLD_FORM = (
    "A number was the threshold of the first-block cache, which hv_batch 0.2.0 was the last version to have: finish an "
    "output root that began with it with hv_batch 0.2.0. The new form is step_cache: {kind: schedule, computed: 16} "
    "(16 of 50 steps run the model)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSchedule:
    """Option `step_cache` with `kind: schedule`: a list of computed steps that depends on the number of steps only.

    `computed` is the number of computed steps out of `of`, or their numbers, counted from 0. A video with another
    number of steps computes the same share, rounded up, or the steps at the same places. The first `warmup` of `of`
    steps are all computed, and the others are spread: evenly with a `taper` of 0; otherwise their gaps shrink linearly
    from 1 + `taper` to 1 - `taper` of the mean gap, because the noise level changes most in the last steps. The first
    and the last step are always computed.

    `order` is the degree of the polynomial that predicts velocities: 0 reuses the last one. `correct` repeats the
    predicted steps once the next velocity is known.
    """

    computed: int | tuple[int, ...]
    of: int = 50
    warmup: int = 0
    taper: float = 0.35
    order: int = 1
    correct: bool = True

    def steps(self, total: int) -> tuple[int, ...]:
        """Return the numbers of the computed steps of a video of `total` steps, ascending."""
        return self._listed(total) if isinstance(self.computed, tuple) else self._spread(self.computed, total)

    def _listed(self, total: int) -> tuple[int, ...]:
        listed = set(self.computed) if isinstance(self.computed, tuple) else set()
        same_place = (_nearest(step * (self.of - 1), max(1, total - 1)) for step in range(total))
        return tuple(step for step, place in enumerate(same_place) if place in listed or step in (0, total - 1))

    def _spread(self, computed: int, total: int) -> tuple[int, ...]:
        count = min(total, max(2, -(-computed * total // self.of)))
        # The last step of the warm-up is the first of the steps that are spread evenly.
        dense = min(count - 1, max(1, -(-self.warmup * total // self.of)))
        others, span = count - dense, total - dense
        spread = [dense - 1 + self._place(number, others, span) for number in range(1, others + 1)]
        # Where the gaps are shorter than one step, a step is moved to the one before, which is free.
        for number in range(others - 2, -1, -1):
            spread[number] = min(spread[number], spread[number + 1] - 1)
        return (*range(dense), *spread)

    def _place(self, number: int, others: int, span: int) -> int:
        """Return the distance of one of the steps that are spread from the end of the warm-up, of `span` at most."""
        taper = round(self.taper * TAPER_UNIT)
        # span * (u + taper * u * (1 - u)) with u = number / others, in whole numbers
        numerator = span * number * (TAPER_UNIT * others + taper * (others - number))
        return _nearest(numerator, TAPER_UNIT * others * others)

    def identity(self) -> dict[str, Any]:
        """Return the option as JSON values, part of the identity of a run (P3)."""
        values = asdict(self)
        if isinstance(self.computed, tuple):
            values["computed"] = list(self.computed)
            del values["warmup"], values["taper"]  # a list does not use them
        return {"kind": KIND, **values}


def _nearest(numerator: int, denominator: int) -> int:
    """Return the whole number that is nearest to the fraction; halves are rounded up."""
    return (2 * numerator + denominator) // (2 * denominator)


def parse_step_cache(value: object) -> StepSchedule | None:
    """Return the schedule of the engine option `step_cache`; None if every step is computed (None or 0).

    Raises UserError if the value is not allowed.
    """
    if value is None or (value == 0 and isinstance(value, int | float) and not isinstance(value, bool)):
        return None
    where = f"engine option step_cache: {value!r} is not allowed"
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise UserError(f"{where}. {OLD_FORM}.")
    names = [field.name for field in fields(StepSchedule)]
    if not isinstance(value, Mapping) or value.get("kind") != KIND or "computed" not in value:
        raise UserError(
            f"{where}; allowed is a mapping such as {{kind: {KIND}, computed: 16}}, which computes 16 of 50 steps."
        )
    if unknown := [name for name in value if name not in ("kind", *names)]:
        raise UserError(f"{where}: unknown {', '.join(map(repr, unknown))}; allowed are kind, {', '.join(names)}.")
    options: dict[str, Any] = {
        name: tuple(v) if isinstance(v := value[name], list) else v for name in names if name in value
    }
    if isinstance(taper := options.get("taper"), int) and not isinstance(taper, bool):
        options["taper"] = float(taper)
    schedule = StepSchedule(**options)
    if problem := _problem(schedule):
        raise UserError(f"{where}: {problem}.")
    return schedule


def _problem(schedule: StepSchedule) -> str | None:
    """Return the first value of a schedule that is not allowed, and the allowed ones."""
    computed, of, warmup = schedule.computed, schedule.of, schedule.warmup
    if not _is_count(of, 2, MAX_STEPS):
        return f"of must be a whole number from 2 to {MAX_STEPS}, not {of!r}"
    if isinstance(computed, tuple):
        if not computed or not all(_is_count(step, 0, of - 1) for step in computed):
            return f"computed must be a number of steps, or a list of step numbers from 0 to {of - 1}"
        if len(set(computed)) < len(computed):
            return "computed lists a step twice"
        if warmup:
            return "warmup is not allowed with a list of steps; list the steps of the warm-up"
    elif not _is_count(computed, 2, of):
        return f"computed must be a whole number from 2 to {of} (of), or a list of steps, not {computed!r}"
    elif not _is_count(warmup, 0, computed):
        return f"warmup must be a whole number from 0 to {computed} (computed), not {warmup!r}"
    taper = schedule.taper
    if isinstance(taper, bool) or not isinstance(taper, int | float) or not 0 <= taper <= MAX_TAPER:
        return f"taper must be a number from 0 to {MAX_TAPER:g}, not {taper!r}"
    if not _is_count(schedule.order, 0, MAX_ORDER):
        return f"order must be a whole number from 0 to {MAX_ORDER}, not {schedule.order!r}"
    if not isinstance(schedule.correct, bool):
        return f"correct must be true or false, not {schedule.correct!r}"
    return None


def _is_count(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def parse_cfg_until(value: object) -> float | None:
    """Return the engine option `cfg_until`; None if every step computes both guidance branches (None or 1).

    Raises UserError if the value is not allowed.
    """
    if value is None or (value == 1 and not isinstance(value, bool)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(
            f"engine option cfg_until: {value!r} is not allowed; allowed is a number above 0 and at most 1, the share "
            "of the steps in which the negative branch of classifier-free guidance runs, such as 0.5."
        )
    return float(value)


def kept_velocities(schedule: StepSchedule) -> int:
    """Return the number of velocities that the step cache keeps between two steps."""
    return max(schedule.order + 1, CORRECTOR_NODES - 1 if schedule.correct else 0)


def guided_steps(cfg_until: float | None, total: int) -> int:
    """Return the number of first steps of a video in which a computed step runs both guidance branches; at least 1."""
    return total if cfg_until is None else max(1, math.ceil(round(cfg_until * total, 6)))


def computed_steps(schedule: StepSchedule | None, total: int) -> tuple[int, ...]:
    """Return the numbers of the computed steps of a video of `total` steps, ascending."""
    return schedule.steps(total) if schedule else tuple(range(total))
