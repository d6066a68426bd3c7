"""Text statistics and hand-written scores, with answers counted by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models import LengthReward, LexiconSentiment, RepetitionPenalty, distinct_n, repetition
from reward_models.terms import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's GOOD, isn't it?", ["it's", "good", "isn't", "it"]),
        ("the café — n°1", ["the", "café", "n", "1"]),
        ("这film很好", ["这", "film", "很", "好"]),
        ("... !!", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b a b", 2, 1 / 3),  # ab ba ab
        ("a a a a", 1, 3 / 4),
        ("a b c d", 2, 0.0),
        ("a", 2, 0.0),
        ("很好很好", 2, 1 / 3),
    ],
)
def test_repetition(text: str, n: int, expected: float) -> None:
    assert repetition(text, n) == pytest.approx(expected)
    assert RepetitionPenalty(n)(prompts=[""], completions=[text]) == pytest.approx(-expected)


def test_distinct_n_counts_over_all_texts() -> None:
    assert distinct_n(["a b c", "a b d"], 2) == pytest.approx(3 / 4)  # ab bc ab bd
    assert distinct_n(["a"], 2) == 0.0


@given(st.lists(st.text("ab ", max_size=12), max_size=4), st.integers(1, 3))
def test_statistics_a_slow_second_way(texts: list[str], n: int) -> None:
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        tokens = text.split()
        counts.update(tuple(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens))
    total = sum(counts.values())
    assert distinct_n(texts, n) == pytest.approx(len(counts) / total if total else 0)


def test_n_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least one word, got n = 0"):
        repetition("a b", 0)


def test_length_reward() -> None:
    reward = LengthReward(low=2, high=4, width=2)
    completions = ["", "a", "a b", "a b c d", "a b c d e f"]
    scores = reward(prompts=[""] * 5, completions=completions)
    np.testing.assert_allclose(scores, [-1, -0.5, 0, 0, -1])
    with pytest.raises(ValueError, match="low = 3, high = 2"):
        LengthReward(low=3, high=2)


def test_lexicon_sentiment(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("good\t1.9\t0.9\t[2, 2]\nbad\t-2.5\t0.7\t[-3]\n", encoding="utf-8")
    reward = LexiconSentiment(path)
    completions = [" good, GOOD", " bad", " car", " goodness"]
    scores = reward(prompts=["It is", "A good", "", ""], completions=completions)
    expected = [3.8 / np.sqrt(3.8**2 + 15), -0.6 / np.sqrt(0.6**2 + 15), 0, 0]
    np.testing.assert_allclose(scores, expected)


def test_malformed_lexicon_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("good\t1.9\nbad\tworse\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lexicon.txt, line 2: expected 'word<TAB>valence', got"):
        LexiconSentiment(path)
