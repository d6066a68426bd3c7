"""A reward function that may hang, held to a time limit."""

import threading
from collections.abc import Sequence
from typing import Any

from reward_models.contract import RewardFunction, asked_for


class TimeLimitedReward:
    """Raises an error when a reward function does not answer in time.

    For functions that wait for something: a subprocess, a database, a library's own network calls
    (`HTTPRewardModel` has limits of its own). The function runs in a thread, since a process would
    need a copy of it and of its model, and Python cannot stop a thread: one that hangs is left
    behind, does not keep the interpreter from ending, and no further call is accepted. A function
    that hangs in C code without releasing Python's lock cannot be timed out in this way.

    Args:
        reward_fn: what to call.
        seconds: longest time for one call.
    """

    def __init__(self, reward_fn: RewardFunction, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"expected seconds > 0, got {seconds}")
        self.reward_fn, self.seconds = reward_fn, seconds
        self.__name__ = getattr(reward_fn, "__name__", type(reward_fn).__name__)
        self._left: threading.Thread | None = None

    @property
    def asks_for(self) -> set[str]:
        """What the function asks for."""
        return asked_for(self.reward_fn)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Sequence[float]:
        """Score each completion; see `RewardFunction`.

        Raises:
            TimeoutError: if there is no answer in time, or an earlier call still hangs.
        """
        if self._left is not None and self._left.is_alive():
            raise TimeoutError(f"{self.__name__}: an earlier call still hangs")
        answers: list[Sequence[float]] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(self.reward_fn(prompts=prompts, completions=completions, **columns))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=f"reward {self.__name__}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if errors:
            raise errors[0]
        if answers:
            return answers[0]
        self._left = thread
        raise TimeoutError(
            f"{self.__name__}: expected {len(completions)} scores within {self.seconds:g} s, got "
            "no answer"
        )
