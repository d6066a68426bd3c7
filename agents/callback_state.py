"""The states of callbacks: what they remember from one rollout to the next.

A callback that has `get_state()` (JSON types) and `set_state(state)` is asked; of SB3's own, the
attributes that change are known. All keep the number of times they were called.
"""

import warnings
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EventCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)

from agents.json_state import from_json, to_json

REMEMBERED: dict[type, tuple[str, ...]] = {
    EvalCallback: (
        "best_mean_reward", "last_mean_reward", "evaluations_results", "evaluations_timesteps",
        "evaluations_length", "evaluations_successes",
    ),
    EveryNTimesteps: ("last_time_trigger",),
    StopTrainingOnMaxEpisodes: ("n_episodes",),
    StopTrainingOnNoModelImprovement: ("last_best_mean_reward", "no_improvement_evals"),
}  # fmt: skip


@runtime_checkable
class Remembers(Protocol):
    """A callback whose state is part of a checkpoint."""

    def get_state(self) -> dict[str, Any]:
        """Return what changes, as JSON types."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`."""
        ...


def each_callback(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """Yield a callback and those inside it, depth first."""
    if callback is None:
        return
    yield callback
    inner = callback.callbacks if isinstance(callback, CallbackList) else []
    further = [getattr(callback, "callback_on_new_best", None)]
    if isinstance(callback, EventCallback) or hasattr(callback, "callback"):
        further.append(getattr(callback, "callback", None))
    for child in [*inner, *further]:
        if isinstance(child, BaseCallback):
            yield from each_callback(child)


def named(callback: BaseCallback | None) -> dict[str, BaseCallback]:
    """Name callbacks: `Class`, and `Class.1` and so on for further ones of a class."""
    found: dict[str, BaseCallback] = {}
    for part in each_callback(callback):
        name, number = type(part).__name__, 0
        while (key := f"{name}.{number}" if number else name) in found:
            number += 1
        if all(part is not other for other in found.values()):
            found[key] = part
    return found


def callback_states(callback: BaseCallback | None) -> dict[str, Any]:
    """Return the states of a callback and all inside it, by name."""
    return {name: _state(part, name) for name, part in named(callback).items()}


def set_callback_states(callback: BaseCallback | None, states: dict[str, Any]) -> None:
    """Give callbacks their states back; warn of those that are not there any more."""
    there = named(callback)
    for name, part in there.items():
        if name in states:
            _set_state(part, states[name])
    missing = sorted(n for n in set(states) - set(there) if states[n]["known"] or states[n]["own"])
    if missing:
        warnings.warn(
            f"the checkpoint has the states of callbacks that this run does not: {missing}",
            stacklevel=2,
        )


def _remembered(callback: BaseCallback) -> list[str]:
    kinds = [names for kind, names in REMEMBERED.items() if isinstance(callback, kind)]
    return [name for names in kinds for name in names if hasattr(callback, name)]


def _state(callback: BaseCallback, name: str) -> dict[str, Any]:
    own = callback.get_state() if isinstance(callback, Remembers) else None
    known = {key: getattr(callback, key) for key in _remembered(callback)}
    return {
        "n_calls": callback.n_calls,
        "known": to_json(known, name),
        "own": to_json(own, name),
    }


def _set_state(callback: BaseCallback, state: dict[str, Any]) -> None:
    callback.n_calls = state["n_calls"]
    for key in _remembered(callback):
        if key in state["known"]:
            setattr(callback, key, from_json(state["known"][key]))
    if isinstance(callback, Remembers) and state["own"] is not None:
        callback.set_state(from_json(state["own"]))
