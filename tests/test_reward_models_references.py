"""Scores against references: worked by hand, and refused where there is nothing to compare with."""

import sys

import numpy as np
import pytest

from reward_models.references import (
    METRICS,
    Bleu,
    ChrF,
    ExactMatch,
    Rouge,
    normal_answer,
    self_bleu,
)

CAT, MAT = "the cat sat on the mat", "the cat is on the mat"
FILM, FINE = "这部电影很好看", "这部电影非常好看"


def scored(metric, completion: str, reference: str | list[str]) -> float:
    (score,) = metric(prompts=["p"], completions=[completion], reference=[reference])
    return float(score)


def test_bleu_of_a_worked_example() -> None:
    """Shared: 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, 0 of 3 fours: half of 1 / 3."""
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** (1 / 4)
    assert scored(Bleu(), CAT, MAT) == pytest.approx(expected)
    assert scored(Bleu(), "the cat is", MAT) == pytest.approx(np.exp(1 - 6 / 3))  # only brevity
    assert scored(Bleu(), MAT, [CAT, MAT]) == pytest.approx(1)


def test_bleu_of_chinese_counts_characters() -> None:
    """Shared: 6 of 7, 4 of 6 (好看 again), 2 of 5 and 1 of 4; one character too short."""
    expected = np.exp(1 - 8 / 7) * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** (1 / 4)
    assert scored(Bleu(), FILM, FINE) == pytest.approx(expected)
    assert scored(Bleu(tokenize="13a"), FILM, FINE) < 0.01  # one word, and it is another


def test_chrf_of_a_worked_example() -> None:
    """Of abc and abd: 2 of 3 letters, 1 of 2 pairs, 0 of 1 triple, on both sides."""
    assert scored(ChrF(), "abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert scored(ChrF(), "abd", ["xyz", "abd"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "english", "chinese"),
    [
        ("rouge1", 5 / 6, 2 * 6 / 15),  # 6 of 7 and of 8 characters
        ("rouge2", 3 / 5, 2 * 4 / 13),
        ("rougeL", 5 / 6, 2 * 6 / 15),
    ],
)
def test_rouge_of_worked_examples(kind: str, english: float, chinese: float) -> None:
    assert scored(Rouge(kind), CAT, MAT) == pytest.approx(english)
    assert scored(Rouge(kind), FILM, FINE) == pytest.approx(chinese)
    assert scored(Rouge(kind), FINE, [CAT, FINE]) == pytest.approx(1)


def test_rouge_keeps_letters_that_english_lacks() -> None:
    assert scored(Rouge("rouge1"), "un café noir", "le café") == pytest.approx(2 / 5)
    assert scored(Rouge("rouge1", stem=True), "it rains", "it rained") == pytest.approx(1)
    with pytest.raises(ValueError, match="expected rouge1, rouge2 or rougeL, got 'rouge3'"):
        Rouge("rouge3")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("a cat, an owl & the theatre", "cat owl theatre"),
        ("“北京”， １２ 点。", "北京12点"),
        ("Café ", "café"),
        ("...", ""),
    ],
)
def test_normal_answers(text: str, normal: str) -> None:
    assert normal_answer(text) == normal


def test_exact_match_takes_any_of_the_references() -> None:
    assert scored(ExactMatch(), " The answer: 北京。", ["answer 北京", "x"]) == 1
    assert scored(ExactMatch(), "Paris, France", "Paris") == 0


def test_self_bleu_is_each_against_the_others() -> None:
    texts = [CAT, MAT, "dogs run"]
    expected = [scored(Bleu(), CAT, [MAT, "dogs run"]), scored(Bleu(), MAT, [CAT, "dogs run"])]
    np.testing.assert_allclose(self_bleu(texts)[:2], expected)
    assert self_bleu(texts)[2] < 0.1
    np.testing.assert_allclose(self_bleu([CAT] * 5, most=3), [1, 1, 1])
    assert len(self_bleu([CAT])) == len(self_bleu([])) == 0


@pytest.mark.parametrize("name", METRICS)
def test_all_are_from_0_to_1_and_score_each_text_by_itself(name: str) -> None:
    completions, references = (
        [CAT, FILM, "", " ?!"],
        [MAT, [FINE, FILM], ["x", "y z"], "some words"],
    )
    metric = METRICS[name](column="answer")
    given = {"prompts": [""] * 4, "answer": references, "other": [1, 2, 3, 4]}
    scores = metric(completions=completions, **given)
    assert ((scores >= 0) & (scores <= 1)).all() and scores[1] == pytest.approx(1)
    assert scores[2] == scores[3] == 0
    for i, text in enumerate(completions):
        alone = metric(prompts=[""], completions=[text], answer=[references[i]])
        assert alone[0] == scores[i]


def test_what_has_no_reference_is_refused() -> None:
    with pytest.raises(
        ValueError, match="expected the prompts to have a column 'reference', got no"
    ):
        ExactMatch()(prompts=["p"], completions=["c"])
    for reference in (None, [], 3.0, ["a", 1]):
        with pytest.raises(ValueError, match="as reference of the prompt 'p'"):
            scored(ExactMatch(), "c", reference)


@pytest.mark.parametrize(
    ("make", "module"), [(Bleu, "sacrebleu"), (Rouge, "rouge_score.rouge_scorer")]
)
def test_a_missing_package_is_named_with_its_extra(make, module: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=r"which is not installed: pip install 'rlhf-gym\[metrics"
    ):
        make()
