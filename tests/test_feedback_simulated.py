"""Simulated annotators against their formulas; shares of 20,000 answers, SE at most 0.0035."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from reward_models import SimulatedAnnotator, write_feedback
from reward_models.feedback.records import read_feedback

N = 20_000


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def shares(annotator: SimulatedAnnotator, first: str = "a", second: str = "b") -> dict[str, float]:
    answers = annotator.compare_batch(["p"] * N, [first] * N, [second] * N)
    return {answer: number / N for answer, number in Counter(answers).items()}


def test_shares_of_choices_are_those_of_the_formula() -> None:
    """β = 1.5, scores 0.8 apart, bias 0.3, band 0.5: σ(1) = 0.731, σ(−2) = 0.119, ties 0.150."""
    annotator = SimulatedAnnotator(
        {"pa": 0.8, "pb": 0.0}, rationality=1.5, position_bias=0.3, tie_band=0.5
    )
    found = shares(annotator)
    assert found["first"] == pytest.approx(0.7311, abs=0.013)
    assert found["second"] == pytest.approx(0.1192, abs=0.01)
    assert found["tie"] == pytest.approx(0.1497, abs=0.01)


def test_position_bias_is_recovered_from_both_orders() -> None:
    """b is the mean of the log-odds for the first side; without it they cancel."""
    for bias in (0.0, 0.7):
        annotator = SimulatedAnnotator({"pa": 0.5, "pb": -0.5}, position_bias=bias)
        found = [shares(annotator, *sides)["first"] for sides in (("a", "b"), ("b", "a"))]
        log_odds = [math.log(share / (1 - share)) for share in found]
        assert np.mean(log_odds) == pytest.approx(bias, abs=0.06)
        assert (log_odds[0] - log_odds[1]) / 2 == pytest.approx(1.0, abs=0.06)


def test_laziness_by_hand() -> None:
    """Someone who is sure errs in half of the 40 % that are random: 0.8 are right.

    With one button, all of that 40 % are right if the better side is first, none if second.
    """
    score = {"pa": 1.0, "pb": 0.0}
    sure = {"rationality": 1000.0, "laziness": 0.4}
    assert shares(SimulatedAnnotator(score, **sure))["first"] == pytest.approx(0.8, abs=0.012)
    same = SimulatedAnnotator(score, lazy_answer="same", **sure)
    assert shares(same)["first"] == 1
    assert shares(same, "b", "a")["second"] == pytest.approx(0.6, abs=0.014)


def test_ratings_by_hand() -> None:
    score = {"pa": -2.0, "pb": -1.1, "pc": 0.0, "pd": 0.9, "pe": 7.0}
    exact = SimulatedAnnotator(score)
    assert exact.rate_batch(["p"] * 5, list("abcde")) == [1, 2, 3, 4, 5]
    noisy = SimulatedAnnotator(score, noise=0.5).rate_batch(["p"] * N, ["c"] * N)
    middle = stats.norm.cdf(1) - stats.norm.cdf(-1)  # within half a point, which is one SD
    assert noisy.count(3) / N == pytest.approx(middle, abs=0.013)
    wide = SimulatedAnnotator(score, scale=(-4, 4), score_range=(-4.0, 4.0))
    assert wide.rate("p", "a") == -2
    lazy = SimulatedAnnotator(score, laziness=1.0).rate_batch(["p"] * N, ["a"] * N)
    assert Counter(lazy)[5] / N == pytest.approx(0.2, abs=0.012) and set(lazy) == {1, 2, 3, 4, 5}


def test_labels_by_hand() -> None:
    """Good with σ(2 · (0.6 − 0.1)) = 0.731, the middle of the range being 0.1."""
    annotator = SimulatedAnnotator({"pa": 0.6}, rationality=2.0, score_range=(-1.0, 1.2))
    labels = annotator.label_batch(["p"] * N, ["a"] * N)
    assert sum(labels) / N == pytest.approx(sigmoid(1.0), abs=0.013)
    assert SimulatedAnnotator({"pa": -9.0}, laziness=1.0, lazy_answer="same").label("p", "a")


def test_one_by_one_from_a_reward_function_with_its_own_generator() -> None:
    def length(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        return [float(len(text)) for text in completions]

    asked = [("p", "aaa", "b"), ("p", "", "cc"), ("p", "d", "e")] * 10
    runs = []
    for seed in (1, 1, 2):
        np.random.seed(0)
        annotator = SimulatedAnnotator(length, seed=seed)
        runs.append([annotator.compare(*question) for question in asked])
        assert np.random.rand() == np.random.RandomState(0).rand()
    assert runs[0] == runs[1] != runs[2]
    assert type(annotator.rate("p", "a")) is int and type(annotator.label("p", "a")) is bool


def test_records_are_written_and_read(tmp_path) -> None:
    score = {"pa": 2.0, "pb": -2.0}
    annotator = SimulatedAnnotator(score, rationality=50.0, pseudonym="s1")
    records = [
        *annotator.comparisons(["p", "p"], ["a", "b"], ["b", "a"]),
        *annotator.ratings(["p"], ["a"]),
        *annotator.labels(["p"], ["b"]),
    ]
    assert [(r.chosen, r.rejected) for r in records[:2]] == [("a", "b"), ("a", "b")]
    assert records[2].rating == 5 and records[3].label is False
    assert {(r.annotator, r.origin) for r in records} == {("s1", "simulated")}
    assert read_feedback(write_feedback(tmp_path / "f.jsonl", records)) == records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rationality": -1.0}, "rationality of 0 or more, got -1.0"),
        ({"laziness": 1.5}, "laziness from 0 to 1, got 1.5"),
        ({"lazy_answer": "left"}, "lazy_answer 'random' or 'same', got 'left'"),
        ({"scale": (5, 1)}, r"scale \[lowest, highest\], got \[5, 1\]"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedAnnotator({}, **arguments)


def test_uneven_lists_and_wrong_scores() -> None:
    with pytest.raises(ValueError, match="as many prompts as completions, got 1 and 2"):
        SimulatedAnnotator({}).label_batch(["p"], ["a", "b"])
    broken = SimulatedAnnotator(lambda prompts, completions: [float("nan")])
    with pytest.raises(ValueError, match="finite score, got nan"):
        broken.rate("p", "a")
