"""Reward functions made of others, given as such or by name. Learned ensembles are not here."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from reward_models.contract import RewardFunction, ask, asked_for
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

    Terms may score each token; the scores of others are added at the last token then.

    Args:
        terms: the weight of each reward function, as a mapping or as pairs.
        names: of the terms, for messages and tables; the functions' own if not given.
        allow_nonfinite: hand NaN and infinity on, to an agent that leaves such episodes out.

    Raises:
        ValueError: if there are no terms.
    """

    def __init__(
        self,
        terms: Mapping[RewardFunction, float] | Iterable[tuple[RewardFunction, float]],
        names: Sequence[str] | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        self.allow_nonfinite = allow_nonfinite
        self.terms = list(terms.items() if isinstance(terms, Mapping) else terms)
        if not self.terms:
            raise ValueError("expected at least one (reward function, weight), got none")
        own = [getattr(term, "__name__", type(term).__name__) for term, _ in self.terms]
        self.names = own if names is None else list(names)

    @property
    def asks_for(self) -> set[str]:
        """What one of the terms asks for."""
        return set().union(*(asked_for(term) for term, _ in self.terms))

    def set_weight(self, number: int, weight: float) -> None:
        """Change the weight of a term, by its number from 0: for a schedule."""
        self.terms[number] = (self.terms[number][0], weight)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Sequence[float]:
        """Score each completion; see `RewardFunction`.

        Raises:
            ValueError: if a term returns a wrong number of scores or one that is not finite.
        """
        total = [np.zeros(1) for _ in completions]
        asked = self._ask(prompts, completions, columns)
        for (_, weight), name, scores in zip(self.terms, self.names, asked, strict=True):
            with _named(name):
                total = [
                    add_at_end(sofar, weight * part)
                    for sofar, part in zip(total, scores, strict=True)
                ]
        return in_contract(total)

    def parts(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Any]
    ) -> list[np.ndarray]:
        """Score each completion by each term, before weights: (B,) each; raises as a call does."""
        asked = self._ask(prompts, completions, columns)
        return [np.array([part.sum() for part in scores]) for scores in asked]

    def _ask(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Any]
    ) -> list[list[np.ndarray]]:
        """By term and completion, its scores: shape (1,), or (tokens,)."""
        found = []
        for (term, _), name in zip(self.terms, self.names, strict=True):
            with _named(name):
                found.append(ask(term, prompts, completions, columns, self.allow_nonfinite))
        return found

    def total(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Sum what `parts` returned, weighted."""
        weights = [weight for _, weight in self.terms]
        return np.sum([w * part for w, part in zip(weights, parts, strict=True)], axis=0)


def weighted_sum(
    settings: Mapping[str, Any],
    other: Callable[[str], RewardFunction],
    allow_nonfinite: bool = False,
) -> WeightedSum:
    """Make a weighted sum from plain settings, as they stand in a file.

    Args:
        settings: by the name of each term its weight, or its weight and arguments:
            `{"rougeL": 1.0, "length": {"weight": 0.1, "high": 30}}`. A weight not given is 1.
        other: returns the reward function of a name that is not in `TERMS`.
        allow_nonfinite: as in `WeightedSum`.

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
    return WeightedSum(terms, list(settings), allow_nonfinite)


@contextmanager
def _named(term: str) -> Iterator[None]:
    """Put a term's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{term}: {error}") from error


def add_at_end(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Add scores of tokens, where a single one is the last token's.

    Raises:
        ValueError: if both are of tokens, and of different numbers of them.
    """
    short, long = sorted((one, other), key=len)
    if len(short) not in (1, len(long)):
        raise ValueError(f"expected scores of {len(long)} tokens, got {len(short)}")
    result = long.copy()
    result[-len(short) :] += short
    return result


def in_contract(scores: Sequence[np.ndarray]) -> Any:
    """Return scores of completions, (B,), or, where there are such, lists of those of tokens."""
    if all(len(part) == 1 for part in scores):
        return np.array([part[0] for part in scores], dtype=np.float64)
    return [part.tolist() if len(part) > 1 else float(part[0]) for part in scores]
