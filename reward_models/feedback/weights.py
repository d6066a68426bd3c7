"""How much an annotator's answers should count, by their agreement with the others' or with gold.

Statistics of a whole collection's agreement are not here.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from reward_models.feedback.records import Comparison, Feedback, Label, Rating


class _Answer(NamedTuple):
    """A record as a number from 0 to 1, on an item that others may have answered too."""

    kind: type[Feedback]
    item: Hashable
    value: float


def agreement_weights(
    feedback: Sequence[Feedback],
    gold: Sequence[Feedback] | None = None,
    prior: float = 5.0,
    floor: float = 0.05,
) -> dict[str, float]:
    """Weights for `LearnedRewardModel.fit`: each annotator's agreement, corrected for chance.

    For annotator a, with v a's answers (comparisons 1, 0.5 or 0 for one side, labels 1 or 0,
    ratings from 0 to 1 on their scale) and o the mean of the others' answers to the same item,

        agreement = 1 − D / E,    D = mean of (v − o)²,    E = mean of (v − o′)²,

    o′ running over all items of the same kind that a answered, whichever v belongs to: the form of
    Krippendorff's α (2004, Content analysis, ch. 11), for one annotator. Who answers without
    reading, at random or always the same, has 0 but for chance; 1 is agreement throughout. If half
    of the annotators are lazy, so are half of the others; gold answers are free of that.

    Args:
        feedback: answers of known annotators; items that one person answered tell nothing.
        gold: answers that are known to be right, taken for the others' if given.
        prior: agreement is shrunk to the mean of all annotators as by that many answers, since few
            answers tell little; who shares no item with anybody gets the mean.
        floor: the lowest weight.

    Returns:
        A weight in [floor, 1] for each pseudonym.

    Raises:
        ValueError: if no answer can be compared with another.
    """
    if not 0 < floor <= 1 or not prior > 0:
        raise ValueError(f"expected 0 < floor <= 1 and prior > 0, got {floor} and {prior}")
    answers: dict[str, list[_Answer]] = defaultdict(list)
    by_item: dict[Hashable, list[tuple[str | None, float]]] = defaultdict(list)
    for record in feedback:
        if record.annotator is not None:
            answers[record.annotator].append(_answer(record))
    for record in feedback if gold is None else gold:
        answer = _answer(record)
        by_item[answer.item].append((record.annotator if gold is None else None, answer.value))

    found = {annotator: _agreement(annotator, own, by_item) for annotator, own in answers.items()}
    total = sum(compared for _, compared in found.values())
    if total == 0:
        raise ValueError("expected items that several annotators answered, or gold, got none")
    mean = sum(agreement * compared for agreement, compared in found.values()) / total
    weights = {
        annotator: (agreement * compared + mean * prior) / (compared + prior)
        for annotator, (agreement, compared) in found.items()
    }
    return {name: float(np.clip(weights[name], floor, 1.0)) for name in sorted(weights)}


def _agreement(
    annotator: str, own: Sequence[_Answer], by_item: dict[Hashable, list[tuple[str | None, float]]]
) -> tuple[float, int]:
    """1 − D / E over all kinds, each counted by its number of answers; and that number."""
    pairs: dict[type[Feedback], list[tuple[float, float]]] = defaultdict(list)
    for kind, item, value in own:
        others = [other for who, other in by_item[item] if who != annotator]
        if others:
            pairs[kind].append((value, float(np.mean(others))))
    observed = expected = 0.0
    for values in pairs.values():
        v, o = np.array(values).T
        observed += float(((v - o) ** 2).sum())
        cross = v.var() + o.var() + (v.mean() - o.mean()) ** 2  # mean of (v − o′)² over all pairs
        expected += float(cross) * len(v)
    number = sum(map(len, pairs.values()))
    return (1 - observed / expected if expected > 0 else float(number > 0)), number


def _answer(record: Feedback) -> _Answer:
    if isinstance(record, Rating):
        low, high = record.scale
        return _Answer(Rating, (record.texts, record.scale), (record.rating - low) / (high - low))
    if isinstance(record, Label):
        return _Answer(Label, record.texts, float(record.label))
    sides = tuple(sorted(record.texts))
    value = 0.5 if record.tie else float(record.texts == sides)
    return _Answer(Comparison, sides, value)
