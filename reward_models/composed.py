"""Reward functions made of others, given as such or by name. Learned ensembles are not here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reward_models.contract import RewardFunction, checked_scores
from reward_models.references import METRICS
from reward_models.terms import LengthReward, RepetitionPenalty

TERMS: dict[str, Callable[..., Any]] = {
    **METRICS,
    "length": LengthReward,
    "repetition": RepetitionPenalty,
}
"""What can be asked for by name; the further settings of a term are its arguments."""


class WeightedSum:
    """Scores a completion by the weighted sum of its terms' scores.

    Args:
        terms: the weight of each reward function, as a mapping or as pairs.
        names: of the terms, for messages and tables; the functions' own if not given.

    Raises:
        ValueError: if there are no terms.
    """

    def __init__(
        self,
        terms: Mapping[RewardFunction, float] | Iterable[tuple[RewardFunction, float]],
        names: Sequence[str] | None = None,
    ) -> None:
        self.terms = list(terms.items() if isinstance(terms, Mapping) else terms)
        if not self.terms:
            raise ValueError("expected at least one (reward function, weight), got none")
        own = [getattr(term, "__name__", type(term).__name__) for term, _ in self.terms]
        self.names = own if names is None else list(names)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion; see `RewardFunction`.

        Raises:
            ValueError: if a term returns a wrong number of scores or one that is not finite.
        """
        return self.total(self.parts(prompts=prompts, completions=completions, **columns))

    def parts(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[np.ndarray]:
        """Score each completion by each term, before weights; raises as a call does."""
        found = []
        for (term, _), name in zip(self.terms, self.names, strict=True):
            scores = term(prompts=prompts, completions=completions, **columns)
            try:
                found.append(checked_scores(scores, completions))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return found

    def total(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Sum what `parts` returned, weighted."""
        weights = [weight for _, weight in self.terms]
        return np.sum([w * part for w, part in zip(weights, parts, strict=True)], axis=0)


def weighted_sum(
    settings: Mapping[str, Any], other: Callable[[str], RewardFunction]
) -> WeightedSum:
    """Make a weighted sum from plain settings, as they stand in a file.

    Args:
        settings: by the name of each term its weight, or its weight and arguments:
            `{"rougeL": 1.0, "length": {"weight": 0.1, "high": 30}}`. A weight not given is 1.
        other: returns the reward function of a name that is not in `TERMS`.

    Raises:
        ValueError: if a term cannot be made of its settings, or a weight is not a finite number.
    """
    terms = []
    for name, given in settings.items():
        arguments = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = arguments.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"{name}: expected a number as weight, got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"{name}: expected a finite weight, got {weight}")
        try:
            term = TERMS[name](**arguments) if name in TERMS else other(name, **arguments)
        except TypeError as error:
            raise ValueError(f"{name}: expected its settings, got {arguments} ({error})") from error
        terms.append((term, float(weight)))
    return WeightedSum(terms, list(settings))
