"""Weights by agreement, worked by hand."""

import numpy as np
import pytest

from reward_models import Comparison, Label, Rating, SimulatedAnnotator, agreement_weights

ANSWERS = {"a": "1100", "b": "1100", "c": "1010"}
LABELS = [
    Label("", f"text {i}", answer == "1", annotator=who)
    for who, given in ANSWERS.items()
    for i, answer in enumerate(given)
]


def test_labels_by_hand() -> None:
    """For a: others 1, ½, ½, 0: D = 1/8, E = 3/8, agreement 2/3, as for b; for c D = E = 1/2: 0.

    The mean is 4/9, and a prior of four answers, as many as were given, takes half of the way.
    """
    weights = agreement_weights(LABELS, prior=4)
    assert weights == pytest.approx({"a": 5 / 9, "b": 5 / 9, "c": 2 / 9})
    assert agreement_weights(LABELS, prior=1e-9)["c"] == pytest.approx(0.05)


def test_gold_takes_the_others_place() -> None:
    """c is right throughout: D = 0; a has two of four: D = E = 1/2."""
    gold = [Label("", f"text {i}", answer == "1") for i, answer in enumerate("1010")]
    weights = agreement_weights(LABELS, gold, prior=1e-9)
    assert weights == pytest.approx({"a": 0.05, "b": 0.05, "c": 1.0})


def test_sides_of_comparisons_may_be_swapped_and_ratings_count_by_distance() -> None:
    """x and y choose the same of two pairs, each listed the other way round, once each side."""
    answers = [
        Comparison("", "good", "bad", annotator="x"), Comparison("", "dull", "fine", annotator="x"),
        Comparison("", "good", "bad", annotator="y"), Comparison("", "dull", "fine", annotator="y"),
    ]  # fmt: skip
    assert agreement_weights(answers) == pytest.approx({"x": 1.0, "y": 1.0})
    ratings = [
        Rating("", text, rating, (1, 5), annotator=who)
        for who, given in {"x": (1, 3, 5), "y": (1, 4, 4)}.items()
        for text, rating in zip("abc", given, strict=True)
    ]
    # D = 2/3 / 16, E = mean of (x − y)² over nine pairs = (9 + 9 + 4 + 1 + 1 + 16 + 1 + 1) / 9 / 16
    expected = 1 - (2 / 3) / (42 / 9)
    assert agreement_weights(ratings) == pytest.approx({"x": expected, "y": expected})


def test_the_lazy_are_found() -> None:
    """Three careful and three lazy ones on 100 pairs; who answers alone gets the mean."""
    rng = np.random.default_rng(0)
    score = {f"{i}": float(s) for i, s in enumerate(rng.normal(0, 3, 200))}
    sides = [str(i) for i in range(100)], [str(i) for i in range(100, 200)]
    answers = [
        record
        for i in range(6)
        for record in SimulatedAnnotator(
            score, laziness=float(i >= 3), seed=i, pseudonym=f"{i}"
        ).comparisons([""] * 100, *sides)
    ]
    weights = agreement_weights([*answers, Comparison("", "x", "y", annotator="alone")])
    careful, lazy = [weights[f"{i}"] for i in range(3)], [weights[f"{i}"] for i in range(3, 6)]
    assert min(careful) > 0.3 > 0.2 > max(lazy)
    assert max(lazy) < weights["alone"] < min(careful)


def test_nothing_in_common() -> None:
    alone = [Label("", "a", True, annotator="x"), Label("", "b", True, annotator="y")]
    with pytest.raises(ValueError, match="several annotators answered, or gold, got none"):
        agreement_weights(alone)
    with pytest.raises(ValueError, match="0 < floor <= 1"):
        agreement_weights(LABELS, floor=0)
