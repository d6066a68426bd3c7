"""Agreement statistics, against published examples and numbers worked by hand."""

import math
from collections.abc import Iterable

import pytest

from reward_models.evaluation import share_interval
from reward_models.feedback import Answer, Task
from reward_models.feedback.agreement import (
    answers_per_day,
    disagreements,
    gold_accuracy,
    krippendorff_alpha,
    median_seconds,
    pairwise_agreement,
    position_bias,
    win_rates,
)

RATING = Task("rating", "p", ("a",))
LABEL = Task("label", "p", ("a",))
PAIR = Task("comparison", "p", ("a", "b"), ("A", "B"))


def table(task: Task, **rows: Iterable) -> list[Answer]:
    """One row per annotator, one column per task; None where there is no answer."""
    return [
        Answer(number, task, annotator, answer)
        for annotator, row in rows.items()
        for number, answer in enumerate(row)
        if answer is not None
    ]


def test_alpha_of_krippendorffs_ratings() -> None:
    """Krippendorff 2011, section D: 4 observers, 12 units, missing data; interval alpha .849."""
    answers = table(
        RATING,
        a=[1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        b=[1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        c=[None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        d=[1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    )
    assert krippendorff_alpha(answers, "rating") == pytest.approx(0.849, abs=5e-4)


def test_alpha_of_krippendorffs_binary_data() -> None:
    """Krippendorff 2011, section A: two observers, ten units; alpha .095."""
    meg = [bool(value) for value in (0, 1, 0, 0, 0, 0, 0, 0, 1, 0)]
    owen = [bool(value) for value in (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)]
    answers = table(LABEL, meg=meg, owen=owen)
    assert krippendorff_alpha(answers, "label") == pytest.approx(0.095, abs=5e-4)


def test_alpha_of_choices_is_nominal() -> None:
    """Coincidences of 4 pairs: 3 agree, so Do = 1/4; De = 1 - (4·3 + 3·2 + 1·0)/(8·7) = 38/56.

    Alpha is 1 - (1/4)/(38/56) = 0.6316 (4 times first, 3 times second, one tie).
    """
    answers = table(
        PAIR, a=["first", "first", "second", "second"], b=["first", "first", "second", "tie"]
    )
    assert krippendorff_alpha(answers, "comparison") == pytest.approx(1 - (1 / 4) / (38 / 56))


def test_alpha_does_not_depend_on_the_scale() -> None:
    wide = Task("rating", "p", ("a",), scale=(-10, 10))
    rows = {"a": [1, 2, 3, 5], "b": [1, 3, 3, 4]}
    assert krippendorff_alpha(table(wide, **rows), "rating") == pytest.approx(
        krippendorff_alpha(table(RATING, **rows), "rating")
    )


@pytest.mark.parametrize("rows", [{}, {"a": [1, 2]}, {"a": [3, 3], "b": [3, 3]}])
def test_alpha_that_is_not_defined(rows: dict[str, list[int]]) -> None:
    assert math.isnan(krippendorff_alpha(table(RATING, **rows), "rating"))


def test_wilson_interval_by_hand() -> None:
    """Newcombe 1998, table I: 81 of 263 is .3080, .2553 to .3662; 0 of 20 goes to .1611."""
    assert share_interval(81, 263) == pytest.approx([0.3080, 0.2553, 0.3662], abs=5e-5)
    assert share_interval(0, 20) == pytest.approx([0, 0, 0.1611], abs=5e-5)
    assert share_interval(20, 20)[2] == 1
    share, low, high = share_interval(0, 0)
    assert math.isnan(share) and (low, high) == (0, 1)


def test_pairwise_agreement_counts_pairs_of_people() -> None:
    """Task 0: three people, one of three pairs agrees; task 1: one pair, agrees; task 2: single."""
    answers = table(RATING, a=[1, 2, 3], b=[1, 2, None], c=[5, None, None])
    agreement = pairwise_agreement(answers, "rating")
    assert (agreement.share, agreement.n) == (2 / 4, 4)
    assert pairwise_agreement(answers, "label").n == 0


def test_accuracy_against_gold() -> None:
    gold = Task("comparison", "p", ("a", "b"), gold="first")
    rated = Task("rating", "p", ("a",), gold=1)
    answers = [
        Answer(0, gold, "ann", "first"),
        Answer(0, gold, "bob", "tie"),
        Answer(1, rated, "ann", 2),
        Answer(1, rated, "bob", 3),
        Answer(2, PAIR, "ann", "second"),
    ]
    accuracy = gold_accuracy(answers)
    assert {name: (share.share, share.n) for name, share in accuracy.items()} == {
        "ann": (1, 2),
        "bob": (0, 2),
    }
    assert gold_accuracy(answers, tolerance=0)["ann"].share == 0.5


def test_win_rates_by_hand() -> None:
    """A against B: one win, one tie, and a task where of two people one prefers each: 2 of 3."""
    other_way = Task("comparison", "p", ("b", "a"), ("B", "A"))
    same = Task("comparison", "p", ("a", "b"), ("A", "A"))
    answers = [
        Answer(0, other_way, "ann", "second"),
        Answer(1, PAIR, "ann", "tie"),
        Answer(2, PAIR, "ann", "first"),
        Answer(2, PAIR, "bob", "second"),
        Answer(3, same, "ann", "first"),
        Answer(4, Task("comparison", "p", ("a", "b")), "ann", "first"),
    ]
    (rate,) = win_rates(answers)
    assert (rate.origin, rate.against) == ("A", "B")
    assert rate.rate == (2 / 3, *share_interval(2, 3)[1:], 3)


def test_position_bias_by_hand() -> None:
    """Left was chosen in 3 of 4: ties and answers from files do not count."""
    answers = [
        Answer(0, PAIR, "ann", "first", swapped=False),
        Answer(1, PAIR, "ann", "second", swapped=True),
        Answer(2, PAIR, "ann", "second", swapped=True),
        Answer(3, PAIR, "ann", "first", swapped=True),
        Answer(4, PAIR, "ann", "tie", swapped=True),
        Answer(5, PAIR, "ann", "first", swapped=None),
        Answer(6, LABEL, "ann", True, swapped=False),
    ]
    bias = position_bias(answers)
    assert (bias.share, bias.n) == (0.75, 4)


def test_disagreements_worst_first() -> None:
    """Spreads: first/second 1; ratings 1, 5, 5: (1 + 1 + 0)/3; first/tie 0.5; agreement none."""
    answers = [
        *(Answer(0, PAIR, name, choice) for name, choice in (("a", "first"), ("b", "tie"))),
        *(Answer(1, RATING, name, rating) for name, rating in (("a", 1), ("b", 5), ("c", 5))),
        *(Answer(2, PAIR, name, choice) for name, choice in (("a", "first"), ("b", "second"))),
        *(Answer(3, LABEL, name, True) for name in "ab"),
    ]
    assert [item.spread for item in disagreements(answers)] == pytest.approx([1, 2 / 3, 0.5])
    assert [len(item.answers) for item in disagreements(answers, most=2)] == [2, 3]


def test_counts_and_times() -> None:
    answers = [
        Answer(0, LABEL, "bob", True, seconds=9, time="2024-05-02T00:00:01+00:00"),
        Answer(0, LABEL, "ann", True, seconds=2, time="2024-05-01T23:59:59+00:00"),
        Answer(1, LABEL, "ann", True, seconds=4, time="2024-05-01T10:00:00+00:00"),
        Answer(2, LABEL, "ann", True),
    ]
    assert answers_per_day(answers) == {
        ("ann", ""): 1,
        ("ann", "2024-05-01"): 2,
        ("bob", "2024-05-02"): 1,
    }
    assert median_seconds(answers) == {"ann": 3, "bob": 9}
