"""Reward functions keep the contract: keywords in, one finite score per completion out."""

import subprocess
import sys

import numpy as np
import pytest

from reward_models import (
    LengthReward,
    LexiconSentiment,
    RepetitionPenalty,
    RewardFunction,
    WeightedSum,
    checked_scores,
)

REWARD_FUNCTIONS = {
    "length": LengthReward(low=2, high=5),
    "repetition": RepetitionPenalty(n=2),
    "lexicon": LexiconSentiment({"good": 2.0}),
    "sum": WeightedSum([(LengthReward(high=3), 1.0), (RepetitionPenalty(), 0.5)]),
}


@pytest.mark.parametrize("reward_fn", REWARD_FUNCTIONS.values(), ids=REWARD_FUNCTIONS.keys())
def test_scores_one_per_completion(reward_fn: RewardFunction) -> None:
    prompts = ["", "The film", "电影", "x"]
    completions = ["", " was good good good", "很好看", " a b c d e f g"]
    scores = reward_fn(prompts=prompts, completions=completions, reference=["r"] * 4)
    assert checked_scores(scores, completions).shape == (4,)
    alone = [reward_fn(prompts=[p], completions=[c])[0] for p, c in zip(prompts, completions)]  # noqa: B905
    np.testing.assert_array_equal(scores, alone)
    assert len(reward_fn(prompts=[], completions=[])) == 0


def test_wrong_number_of_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected 2 scores, one per completion, got shape"):
        checked_scores([1.0], ["a", "b"])


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_score_that_is_not_finite_is_an_error(score: float) -> None:
    with pytest.raises(ValueError, match=r"expected a finite score, got .* 'the bad one'"):
        checked_scores([1.0, score], ["a", "the bad one"])


def test_weighted_sum_by_hand() -> None:
    def ones(*, completions: list[str], **_: object) -> list[float]:
        return [1.0 for _ in completions]

    def lengths(*, completions: list[str], **_: object) -> list[float]:
        return [float(len(text)) for text in completions]

    expected = [2.0 - 0.5 * 1, 2.0 - 0.5 * 3]
    for terms in ({ones: 2.0, lengths: -0.5}, [(ones, 2.0), (lengths, -0.5)]):
        total = WeightedSum(terms)(prompts=["", ""], completions=["a", "abc"])
        np.testing.assert_allclose(total, expected)


def test_weighted_sum_hands_columns_on() -> None:
    def overlap(*, completions: list[str], reference: list[str], **_: object) -> list[float]:
        return [float(a == b) for a, b in zip(completions, reference, strict=True)]

    total = WeightedSum({overlap: 1.0})
    scores = total(prompts=["", ""], completions=["a", "b"], reference=["a", "x"])
    assert scores.tolist() == [1.0, 0.0]


def test_weighted_sum_names_the_term_that_broke_the_contract() -> None:
    def broken(**_: object) -> list[float]:
        return [float("nan")]

    with pytest.raises(ValueError, match="broken: expected a finite score"):
        WeightedSum({broken: 1.0})(prompts=[""], completions=["a"])
    with pytest.raises(ValueError, match="at least one"):
        WeightedSum({})


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, reward_models, reward_models.assets; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
