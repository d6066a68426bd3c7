"""The border between texts and scores: what every reward function looks like.

Holds no reward function: those are in `terms`, `composed` and `learned`.
"""

import math
from collections.abc import Sequence
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
            columns: the prompt set's further columns (say, `reference`), each of length B.

        Returns:
            One score per completion, length B.
        """
        ...


def checked_scores(scores: Sequence[float], completions: Sequence[str]) -> np.ndarray:
    """Return the scores as an array after making sure that they keep the contract.

    Args:
        scores: what a reward function returned; anything that NumPy reads as B numbers.
        completions: the texts it was given, length B.

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
        if not math.isfinite(score):
            raise ValueError(f"expected a finite score, got {score} for completion {completion!r}")
    return array
