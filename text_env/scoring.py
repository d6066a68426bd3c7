"""The border to the reward: one callable, batched, text in, one score per completion out.

Leaves out every reward itself, and when a score is paid (`episodes`).
"""

import importlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from text_env.prompts import shorten


class RewardFunction(Protocol):
    """Scores finished completions. TRL's reward functions have the same signature."""

    def __call__(
        self, *, prompts: list[Any], completions: list[Any], **columns: list[Any]
    ) -> Sequence[float]:
        """Score B completions at once.

        Args:
            prompts: B prompts, texts. Where episodes have several turns: B lists of chat messages,
                what the first turn saw.
            completions: B completions, texts without prompt, end token, and stop text. Where
                episodes have several turns: B lists of chat messages, the assistant's and the
                user's in turn, from the first answer to the last.
            **columns: The prompts' further columns, B values each.

        Returns:
            B finite numbers, higher is better.
        """
        ...


def load_function(function: Any, name: str) -> Callable[..., Any]:
    """A callable from "module:name", which fits into JSON; a callable is returned as is.

    Args:
        function: Either of the two.
        name: Of the argument, for the error.

    Raises:
        ValueError: There is no such callable.
    """
    if isinstance(function, str):
        place = function
        module, _, attribute = place.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f'{name}: expected a callable or "module:name", got {place!r} ({error})'
            ) from error
    if not callable(function):
        raise ValueError(f"{name}: expected a callable, got {type(function).__name__}")
    return function


def load_reward(reward_fn: "RewardFunction | str") -> RewardFunction:
    """A reward function from "module:name"; see `load_function`."""
    return load_function(reward_fn, "reward_fn")


class RewardError(RuntimeError):
    """A reward function raised an error, which is this one's cause."""


def score(
    reward_fn: RewardFunction,
    prompts: list[Any],
    completions: list[Any],
    columns: dict[str, list[Any]],
    allow_nonfinite: bool = False,
) -> list[float]:
    """Call the reward function once and check its answer.

    Args:
        reward_fn: What to call.
        prompts: B prompts, texts or chat messages.
        completions: B completions, as the prompts.
        columns: Further columns, B values each.
        allow_nonfinite: Hand NaN and infinity on, to an agent that leaves such episodes out.

    Raises:
        RewardError: The function raised an error.
        ValueError: Not one finite number per completion. Either message names the prompt.
    """
    first = f"first of {len(prompts)} prompts {_shown(prompts[0])}"
    try:
        answer: Any = reward_fn(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        name = getattr(reward_fn, "__name__", type(reward_fn).__name__)
        raise RewardError(
            f"reward_fn: {name} raised {type(error).__name__}: {error} ({first})"
        ) from error
    values = answer.tolist() if hasattr(answer, "tolist") else answer  # arrays and tensors
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ValueError(
            f"reward_fn: expected a sequence of {len(prompts)} numbers, "
            f"got {type(answer).__name__} ({first})"
        )
    if len(values) != len(prompts):
        raise ValueError(
            f"reward_fn: expected {len(prompts)} scores, one per completion, got {len(values)} "
            f"({first})"
        )
    scores = [value.item() if hasattr(value, "item") else value for value in values]
    for value, prompt, completion in zip(scores, prompts, completions, strict=True):
        if not isinstance(value, numbers.Real) or not (_is_float32(value) or allow_nonfinite):
            raise ValueError(
                f"reward_fn: expected a finite number, got {shorten(repr(value))[1:-1]} for the "
                f"completion {_shown(completion)} of the prompt {_shown(prompt)}"
            )
    return [float(value) if _is_float32(value) else _infinite(value) for value in scores]


def _shown(text: Any) -> str:
    """A text, or the last message of a conversation, for an error message."""
    return shorten(text if isinstance(text, str) else str(text[-1]["content"]))


def _is_float32(value: Any) -> bool:
    """Whether a number is finite as agents and libraries store it, in float32."""
    return -LARGEST <= value <= LARGEST  # false for NaN


def _infinite(value: Any) -> float:
    if value != value:
        return math.nan
    return math.inf if value > 0 else -math.inf


LARGEST = 3.4028234663852886e38
"""The largest number in float32."""
