"""The border to the reward: one callable, batched, text in, one score per completion out.

Leaves out every reward itself, and when a score is paid (`episodes`).
"""

import importlib
import math
import numbers
from collections.abc import Sequence
from typing import Any, Protocol, cast

from text_env.prompts import shorten


class RewardFunction(Protocol):
    """Scores finished completions. TRL's reward functions have the same signature."""

    def __call__(
        self, *, prompts: list[str], completions: list[str], **columns: list[Any]
    ) -> Sequence[float]:
        """Score B completions at once.

        Args:
            prompts: B prompts.
            completions: B completions, without prompt, end token, and stop text.
            **columns: The prompts' further columns, B values each.

        Returns:
            B finite numbers, higher is better.
        """
        ...


def load_reward(reward_fn: "RewardFunction | str") -> RewardFunction:
    """A reward function from "module:name", which fits into JSON; a callable is returned as is.

    Raises:
        ValueError: There is no such callable.
    """
    if isinstance(reward_fn, str):
        module, _, name = reward_fn.partition(":")
        try:
            reward_fn = cast(RewardFunction, getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f'reward_fn: expected a callable or "module:name", got {reward_fn!r} ({error})'
            ) from error
    if not callable(reward_fn):
        raise ValueError(f"reward_fn: expected a callable, got {type(reward_fn).__name__}")
    return reward_fn


class RewardError(RuntimeError):
    """A reward function raised an error, which is this one's cause."""


def score(
    reward_fn: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list[Any]],
    allow_nonfinite: bool = False,
) -> list[float]:
    """Call the reward function once and check its answer.

    Args:
        reward_fn: What to call.
        prompts: B prompts.
        completions: B completions.
        columns: Further columns, B values each.
        allow_nonfinite: Hand NaN and infinity on, to an agent that leaves such episodes out.

    Raises:
        RewardError: The function raised an error.
        ValueError: Not one finite number per completion. Either message names the prompt.
    """
    first = f"first of {len(prompts)} prompts {shorten(prompts[0])}"
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
                f"completion {shorten(completion)} of the prompt {shorten(prompt)}"
            )
    return [float(value) if _is_float32(value) else _infinite(value) for value in scores]


def _is_float32(value: Any) -> bool:
    """Whether a number is finite as agents and libraries store it, in float32."""
    return -LARGEST <= value <= LARGEST  # false for NaN


def _infinite(value: Any) -> float:
    if value != value:
        return math.nan
    return math.inf if value > 0 else -math.inf


LARGEST = 3.4028234663852886e38
"""The largest number in float32."""
