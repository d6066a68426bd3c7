"""Reward functions made of reward functions. Learned ensembles are not here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reward_models.contract import RewardFunction, checked_scores


class WeightedSum:
    """Scores a completion by the weighted sum of its terms' scores.

    Args:
        terms: the weight of each reward function, as a mapping or as pairs.

    Raises:
        ValueError: if there are no terms.
    """

    def __init__(
        self, terms: Mapping[RewardFunction, float] | Iterable[tuple[RewardFunction, float]]
    ) -> None:
        self.terms = list(terms.items() if isinstance(terms, Mapping) else terms)
        if not self.terms:
            raise ValueError("expected at least one (reward function, weight), got none")

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion; see `RewardFunction`.

        Raises:
            ValueError: if a term returns a wrong number of scores or one that is not finite.
        """
        total = np.zeros(len(completions))
        for term, weight in self.terms:
            scores = term(prompts=prompts, completions=completions, **columns)
            try:
                total += weight * checked_scores(scores, completions)
            except ValueError as error:
                name = getattr(term, "__name__", type(term).__name__)
                raise ValueError(f"{name}: {error}") from error
        return total
