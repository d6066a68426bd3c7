"""The border between texts and scores: what every reward function looks like.

Holds no reward function: those are in `terms`, `composed` and `learned`.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class RewardFunction(Protocol):
    """Anything that scores a batch of completions; higher is better."""

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Sequence[float]:
        """Score each completion.

        Called with keywords only, so a function may name just what it needs and swallow the
        rest in `**columns`, as TRL's reward functions do.

        Args:
            prompts: texts that the completions continue, length B.
            completions: texts to be scored, length B.
            columns: the prompt set's further columns (say, `reference`), each of length B. A
                function whose signature, or `asks_for`, names one of `TOKENS` is given that too.

        Returns:
            One score per completion, length B; or, for a completion, a list of one per token, the
            end token included, whose sum is the score.
        """
        ...


TOKENS = ("completion_ids", "completion_pieces")
"""What an environment tells of tokens where it is asked: lists of ids, or of what each token adds
to the text. `text_env.scoring` has the same; the two packages do not import one another."""


def asked_for(reward_fn: RewardFunction) -> set[str]:
    """Which of `TOKENS` a reward function asks for, by its `asks_for` or its signature."""
    named = getattr(reward_fn, "asks_for", None)
    if named is None:
        try:
            named = inspect.signature(reward_fn).parameters
        except (TypeError, ValueError):  # some callables of C code have none
            return set()
    return set(TOKENS) & set(named)


def told(reward_fn: RewardFunction, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns that a reward function is given: of tokens, what it asks for."""
    asked = asked_for(reward_fn)
    return {name: x for name, x in columns.items() if name in asked or name not in TOKENS}


def ask(
    reward_fn: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Any],
    allow_nonfinite: bool = False,
) -> list[np.ndarray]:
    """Call a reward function with what it asks for, and check its answer.

    Returns:
        By completion, its scores: shape (1,), or (tokens,) where the function gave one per token.

    Raises:
        ValueError: if their number is wrong or one of them is not a finite number.
    """
    answer = reward_fn(prompts=prompts, completions=completions, **told(reward_fn, columns))
    if not asked_for(reward_fn) or not any(np.ndim(part) for part in answer):
        return list(checked_scores(answer, completions, allow_nonfinite)[:, None])
    if len(answer) != len(completions):
        raise ValueError(
            f"expected {len(completions)} scores, one per completion, got {len(answer)}"
        )
    parts: list[np.ndarray] = []
    for part, completion in zip(answer, completions, strict=True):
        numbers: Any = np.atleast_1d(np.asarray(part))
        parts.append(checked_scores(numbers, [completion] * len(numbers), allow_nonfinite))
    return parts


def checked_scores(
    scores: Sequence[float], completions: Sequence[str], allow_nonfinite: bool = False
) -> np.ndarray:
    """Return the scores as an array after making sure that they keep the contract.

    Args:
        scores: what a reward function returned; anything that NumPy reads as B numbers.
        completions: the texts it was given, length B.
        allow_nonfinite: let NaN and infinity pass.

    Returns:
        The scores, float64, shape (B,).

    Raises:
        ValueError: if their number is wrong or one of them is not a finite number.
    """
    array = np.asarray(scores)
    if array.dtype.kind not in "biuf":  # strings that look like numbers, None, huge integers
        raise ValueError(f"expected numbers, got {str(scores)[:60]}")
    array = array.astype(np.float64)
    if array.shape != (len(completions),):
        raise ValueError(
            f"expected {len(completions)} scores, one per completion, got shape {array.shape}"
        )
    for score, completion in zip(array, completions, strict=True):
        if not (allow_nonfinite or math.isfinite(score)):
            raise ValueError(f"expected a finite score, got {score} for completion {completion!r}")
    return array
