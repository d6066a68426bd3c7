"""The border to the reward: one callable, batched, text in, one score per completion out.

Or, from a function that asks for the tokens, one score per token. Leaves out every reward itself,
and when a score is paid (`episodes`).
"""

import importlib
import inspect
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
            **columns: The prompts' further columns, B values each. A function whose signature
                names one of `TOKENS` is given that too, where episodes have one turn.

        Returns:
            B finite numbers, higher is better; or, for a completion, a list of one number per
            token, the end token included, whose sum is the score.
        """
        ...


TOKENS = ("completion_ids", "completion_pieces")
"""What a reward function is told about tokens if its signature names it, or its `asks_for`: lists
of ids, as TRL gives them, or of what each token adds to the text; the end token included."""


def asked_for(reward_fn: RewardFunction) -> set[str]:
    """Which of `TOKENS` a reward function asks for, by its `asks_for` or its signature."""
    named = getattr(reward_fn, "asks_for", None)
    if named is None:
        try:
            named = inspect.signature(reward_fn).parameters
        except (TypeError, ValueError):  # some callables of C code have none
            return set()
    return set(TOKENS) & set(named)


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
    n_tokens: list[int] | None = None,
    allow_nonfinite: bool = False,
) -> list[float | list[float]]:
    """Call the reward function once and check its answer.

    Args:
        reward_fn: What to call.
        prompts: B prompts, texts or chat messages.
        completions: B completions, as the prompts.
        columns: Further columns, B values each.
        n_tokens: Tokens of each completion, if the function was told of them: it may give a list
            of as many numbers then.
        allow_nonfinite: Hand NaN and infinity on, to an agent that leaves such episodes out.

    Returns:
        B scores; lists of one per token where the function gave such.

    Raises:
        RewardError: The function raised an error.
        ValueError: Not one finite number per completion, or per token of one. Either message names
            the prompt.
    """
    first = f"first of {len(prompts)} prompts {_shown(prompts[0])}"
    try:
        answer: Any = reward_fn(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        name = getattr(reward_fn, "__name__", type(reward_fn).__name__)
        raise RewardError(
            f"reward_fn: {name} raised {type(error).__name__}: {error} ({first})"
        ) from error
    values = _plain(answer)
    if not _is_list(values):
        raise ValueError(
            f"reward_fn: expected a sequence of {len(prompts)} numbers, "
            f"got {type(answer).__name__} ({first})"
        )
    if len(values) != len(prompts):
        raise ValueError(
            f"reward_fn: expected {len(prompts)} scores, one per completion, got {len(values)} "
            f"({first})"
        )
    scores: list[float | list[float]] = []
    for i, value in enumerate(map(_plain, values)):
        place = f"for the completion {_shown(completions[i])} of the prompt {_shown(prompts[i])}"
        if n_tokens is None or not _is_list(value):
            scores.append(_checked(value, place, allow_nonfinite))
            continue
        if len(value) != n_tokens[i]:
            raise ValueError(
                f"reward_fn: expected a number, or {n_tokens[i]}, one per token, got {len(value)} "
                f"{place}"
            )
        parts = [_checked(_plain(part), place, allow_nonfinite) for part in value]
        _checked(sum(parts), place, allow_nonfinite)
        scores.append(parts)
    return scores


def _plain(value: Any) -> Any:
    """A value without its array or tensor."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _checked(value: Any, place: str, allow_nonfinite: bool) -> float:
    if not isinstance(value, numbers.Real) or not (_is_float32(value) or allow_nonfinite):
        raise ValueError(
            f"reward_fn: expected a finite number, got {shorten(repr(value))[1:-1]} {place}"
        )
    return float(value) if _is_float32(value) else _infinite(value)


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
