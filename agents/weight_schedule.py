"""A weight in the reward that changes with the tokens trained so far, a length penalty's say."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agents import ranks


class WeightScheduleCallback(BaseCallback):
    """Sets a number in the reward function at the start of each rollout, by the tokens before it.

    The weight is that of the line through some points, and stays as it is before the first and
    after the last. A rollout has one weight from start to end, one that goes on from a checkpoint
    too. Logged as `rollout/<name>`.
    """

    def __init__(
        self,
        set_weight: Callable[[float], Any],
        points: Sequence[tuple[float, float]],
        name: str = "weight",
        verbose: int = 0,
    ) -> None:
        """Say what the weight is when.

        Args:
            set_weight: Called with the weight: `partial(reward.set_weight, 1)` for the second term
                of a `WeightedSum`.
            points: (tokens, weight), in the order of the tokens.
            name: What it is called in the log.
            verbose: As in SB3.

        Raises:
            ValueError: If there is no point, or they are not in order.
        """
        super().__init__(verbose)
        self.points = [(float(tokens), float(weight)) for tokens, weight in points]
        places = [tokens for tokens, _ in self.points]
        if not places or places != sorted(set(places)):
            raise ValueError(f"points: expected (tokens, weight) with rising tokens, got {points}")
        self.set_weight, self.name = set_weight, name

    def _on_training_start(self) -> None:
        if ranks.world_size() > 1:
            raise ValueError(
                "expected one process with a weight schedule: callbacks run on the first alone"
            )

    def _on_rollout_start(self) -> None:
        # A rollout that goes on from a checkpoint begins at the tokens that it began at.
        tokens = getattr(self.model, "_tokens_before", None)
        tokens = self.num_timesteps if tokens is None else tokens
        places, weights = zip(*self.points, strict=True)
        weight = float(np.interp(tokens, places, weights))
        self.set_weight(weight)
        self.logger.record(f"rollout/{self.name}", weight)

    def _on_step(self) -> bool:
        return True

    def get_state(self) -> dict[str, Any]:
        """Return the points, for checkpoints: the weight follows from them and the tokens."""
        return {"points": [list(point) for point in self.points]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`.

        Raises:
            ValueError: If the schedule was another one.
        """
        if state != self.get_state():
            raise ValueError(
                f"{self.name}: expected the checkpoint's schedule, {state['points']}, got "
                f"{self.points}"
            )
