"""Reward functions made of reward functions. Learned ensembles are not here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reward_models.contract import RewardFunction, ask, asked_for


class WeightedSum:
    """Scores a completion by the weighted sum of its terms' scores.

    Terms may score each token; the scores of others are added at the last token then.

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
        for term, weight in self.terms:
            try:
                scores = ask(term, prompts, completions, columns)
                total = [
                    add_at_end(sofar, weight * part)
                    for sofar, part in zip(total, scores, strict=True)
                ]
            except ValueError as error:
                name = getattr(term, "__name__", type(term).__name__)
                raise ValueError(f"{name}: {error}") from error
        return in_contract(total)


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
    """Return scores of completions, (B,), or lists of those of tokens where there are such."""
    if all(len(part) == 1 for part in scores):
        return np.array([part[0] for part in scores], dtype=np.float64)
    return [part.tolist() for part in scores]
