"""Schedules (learning rate, clip range) as JSON: numbers and SB3's own whole, others by values.

A Python callable cannot be written down without pickling code. What it gives at a few points can:
it has to be handed over again, and must give the same.
"""

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

Schedule = float | Callable[[float], float] | None

POINTS = 64
"""Values of a callable that are kept, over the remaining progress from 1 to 0."""


def describe(schedule: Schedule) -> Any:
    """Return JSON for a schedule."""
    if isinstance(schedule, FloatSchedule):
        schedule = schedule.value_schedule
    if isinstance(schedule, ConstantSchedule):
        return float(schedule.val)
    if isinstance(schedule, LinearSchedule):
        return {"linear": [schedule.start, schedule.end, schedule.end_fraction]}
    if callable(schedule):
        return {"values": [float(schedule(1 - i / POINTS)) for i in range(POINTS + 1)]}
    return None if schedule is None else float(schedule)


def rebuild(name: str, described: Any, given: Schedule, is_given: bool) -> Schedule:
    """Return the schedule that was described.

    Args:
        name: The argument's name, for errors.
        described: What `describe` gave.
        given: What the caller hands over.
        is_given: Whether anything is.

    Raises:
        ValueError: If a callable is needed and not given, or gives other values.
    """
    needed = isinstance(described, dict) and "values" in described
    if not is_given:
        if needed:
            raise ValueError(
                f"{name} was a Python callable, which a checkpoint cannot hold: expected "
                f"load(…, {name}=<the same callable>), got none"
            )
        return LinearSchedule(*described["linear"]) if isinstance(described, dict) else described
    found = describe(given)
    if found != described:
        difference = f"{described!r} in the checkpoint, {found!r} given"
        if needed and isinstance(found, dict) and "values" in found:
            pairs = zip(described["values"], found["values"], strict=True)
            i = next(i for i, (a, b) in enumerate(pairs) if a != b)
            difference = (
                f"{described['values'][i]} in the checkpoint, {found['values'][i]} given, where "
                f"{1 - i / POINTS:.3f} of the progress remains"
            )
        raise ValueError(f"{name}: expected the checkpoint's values, got others: {difference}")
    return given
