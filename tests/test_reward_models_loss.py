"""The loss and its variants, worked by hand, and what fitting makes of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch as th
from test_reward_models_learned import comparisons, labels, make_backbone, ratings, sentences

from reward_models import Comparison, Label, LearnedRewardModel, Rating, SimulatedAnnotator
from reward_models.batches import claim
from reward_models.fitting import record_weights
from reward_models.loss import expected_share, feedback_loss

LN2 = math.log(2)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("models") / "bert", "bert")


def loss_of(m: float, target: float, **arguments: object) -> float:
    """Loss of one comparison with that margin of logits."""
    return feedback_loss(
        th.tensor([m, 0.0], dtype=th.float64),
        first=th.tensor([0]),
        second=th.tensor([1]),
        target=th.tensor([target], dtype=th.float64),
        is_rating=th.tensor([False]),
        **arguments,
    ).item()


@pytest.mark.parametrize(
    ("m", "win", "tie", "loss"), [(0.0, 1 / 3, 1 / 3, 1 / 3), (LN2, 1 / 2, 3 / 10, 1 / 5)]
)
def test_ties_of_rao_and_kupper_by_hand(m: float, win: float, tie: float, loss: float) -> None:
    """θ = 2: P(win) = r / (r + 2), P(tie) = 3r / ((r + 2)(2r + 1)), r = exp(m) being 1 and 2."""
    eta = th.tensor(LN2, dtype=th.float64)
    for target, probability in ((1.0, win), (0.5, tie), (0.0, loss)):
        assert loss_of(m, target, tie_threshold=eta) == pytest.approx(-math.log(probability))
    share = win + tie / 2
    assert expected_share(np.array([m]), LN2)[0] == pytest.approx(math.log(share / (1 - share)))


def test_expected_share_stays_finite_and_without_ties_is_the_margin() -> None:
    m = np.array([-800.0, -3.0, 0.0, 3.0, 800.0])
    shares = expected_share(m, 1.0)
    np.testing.assert_allclose(shares, -shares[::-1])
    assert np.isfinite(shares).all() and (np.diff(shares) > 0).all()
    assert expected_share(m, None) is m
    np.testing.assert_allclose(expected_share(m, 1e-9), m)


def test_margin_by_hand() -> None:
    """ln 3 apart with a margin of ln 2: σ(ln 1.5) = 0.6; a tie has none: σ(ln 3) is 3/4."""
    m = math.log(3)
    assert loss_of(m, 1.0, margin=LN2) == pytest.approx(-math.log(0.6))
    assert loss_of(m, 0.5, margin=LN2) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


def test_margin_is_for_comparisons_only() -> None:
    """A label good at logit ln 3 and a rating of 1 at logit 0."""
    loss = feedback_loss(
        th.tensor([math.log(3), 0.0]),
        first=th.tensor([0, 1]),
        second=th.tensor([2, 2]),
        target=th.tensor([1.0, 1.0]),
        is_rating=th.tensor([False, True]),
        margin=5.0,
        tie_threshold=th.tensor(2.0),
    )
    assert loss.item() == pytest.approx((-math.log(0.75) + 0.5) / 2)


def test_label_smoothing_by_hand() -> None:
    """One choice in ten is the wrong way round; σ(ln 3) = 3/4."""
    choice, tie = Comparison("", "a", "b"), Comparison("", "a", "b", tie=True)
    assert claim(choice, 0.1) == (pytest.approx(0.9), False)
    assert claim(tie, 0.1) == (0.5, False)
    assert claim(Label("", "a", False), 0.1) == (pytest.approx(0.1), False)
    assert claim(Rating("", "a", 4, (-4, 4)), 0.1) == (4.0, True)
    expected = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    assert loss_of(math.log(3), claim(choice, 0.1).target) == pytest.approx(expected)


def test_weights_by_hand() -> None:
    """Two labels at logit 0 and ln 3, losses ln 2 and ln 4/3, weights 0.5 and 1.5."""
    loss = feedback_loss(
        th.tensor([0.0, math.log(3)]),
        first=th.tensor([0, 1]),
        second=th.tensor([2, 2]),
        target=th.tensor([1.0, 1.0]),
        is_rating=th.tensor([False, False]),
        weight=th.tensor([0.5, 1.5]),
    )
    assert loss.item() == pytest.approx((0.5 * LN2 + 1.5 * math.log(4 / 3)) / 2)
    records = [Label("", text, True, annotator=who) for text, who in zip("abc", "xy?", strict=True)]
    assert record_weights(records, {"x": 0.2, "y": 0.3}) == pytest.approx([0.4, 0.6, 2.0])
    assert record_weights(records, None) == [1, 1, 1]
    with pytest.raises(ValueError, match=r"weights of 0 or more, got -1 for 'x'"):
        record_weights(records, {"x": -1})
    with pytest.raises(ValueError, match="a weight above 0, got none"):
        record_weights(records[:1], {"x": 0})


# Learning


def test_the_tie_threshold_is_found(bert: Path) -> None:
    """People tie within η = 1.5; learning begins at 0.7, where the share of ties alone puts it."""
    score = {text: float(balance) for text, balance in sentences(2000)}
    texts = list(score)
    annotator = SimulatedAnnotator(score, tie_band=1.5, seed=1)
    answers = annotator.comparisons([""] * 1000, texts[:1000], texts[1000:])
    share = sum(answer.tie for answer in answers) / 1000
    assert 2 * math.atanh(share) < 1.1
    model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    report = model.fit(answers, epochs=10, learning_rate=3e-3, bf16=False, ties="rao-kupper")
    assert report.tie_threshold == pytest.approx(1.5, abs=0.25)
    one, two = "the film was good", "the film was dull"
    m = np.diff(model.logits(["", ""], [two, one]))
    expected = (1 / (1 + np.exp(-m - report.tie_threshold))) / 2
    expected += (1 / (1 + np.exp(-m + report.tie_threshold))) / 2
    np.testing.assert_allclose(model.preference([""], [one], [two]), expected, atol=1e-6)


def test_a_threshold_is_saved_and_without_ties_there_is_none(bert: Path, tmp_path: Path) -> None:
    model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    model.fit(comparisons(100), max_steps=2, ties="rao-kupper")
    assert model.tie_threshold is not None
    loaded = LearnedRewardModel.load(model.save(tmp_path / "rm"), device="cpu")
    assert loaded.tie_threshold == model.tie_threshold
    decided = [record for record in comparisons(100) if not record.tie]
    assert model.fit(decided, max_steps=2, ties="rao-kupper").tie_threshold is None
    assert model.fit(comparisons(100), max_steps=2).tie_threshold is None


def test_weights_decide_whom_to_believe(bert: Path) -> None:
    """Two thirds of the answers are the wrong way round; with weight 0 they do no harm."""
    decided = [record for record in comparisons(700) if not record.tie]
    answers = [
        Comparison("", r.chosen, r.rejected, annotator="right")
        if i % 3 == 0
        else Comparison("", r.rejected, r.chosen, annotator="wrong")
        for i, r in enumerate(decided)
    ]
    test = ratings(200, seed=9)
    found = []
    for weights in (None, {"wrong": 0.0}):
        model = LearnedRewardModel.from_pretrained(bert, device="cpu")
        report = model.fit(
            answers, test, epochs=5, learning_rate=3e-3, annotator_weights=weights, bf16=False
        )
        assert report.held_out is not None and report.held_out.ratings is not None
        found.append(report.held_out.ratings.pearson)
    assert found[0] < -0.5 and found[1] > 0.8


def test_smoothing_keeps_it_from_being_sure(bert: Path) -> None:
    """Of choices without errors; at 20 % smoothing the margin of the lowest loss is ln 4 = 1.4."""
    answers = [record for record in comparisons(250) if not record.tie]
    found = []
    for smoothing in (0.0, 0.2):
        model = LearnedRewardModel.from_pretrained(bert, device="cpu")
        model.fit(answers, epochs=10, learning_rate=3e-3, bf16=False, label_smoothing=smoothing)
        chosen = model.logits([""] * len(answers), [r.chosen for r in answers])
        rejected = model.logits([""] * len(answers), [r.rejected for r in answers])
        found.append(float(np.mean(chosen - rejected)))
    assert found[0] > 2.2 and 0.7 < found[1] < 1.7


def test_the_margin_reaches_the_loss(bert: Path) -> None:
    """An unfitted model tells texts apart by 0.2 at most: ln(1 + exp(2 ± 0.2)) = 2.13 ± 0.18."""
    answers = [record for record in comparisons(64) if not record.tie]
    model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    first = model.fit(answers, max_steps=1, margin=2.0, bf16=False).train_loss
    assert first == pytest.approx(math.log(1 + math.exp(2)), abs=0.18)


# Reports


def test_agreement_by_annotator_and_origin(bert: Path) -> None:
    model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    good, bad = "the film was good", "a dull story"
    if model.logits([""], [good]) < model.logits([""], [bad]):
        good, bad = bad, good
    report = model.evaluate(
        [
            Comparison("", good, bad, annotator="x", origin="page"),
            Comparison("", bad, good, annotator="y", origin="page"),
            Comparison("", good, bad, tie=True, annotator="y", origin="file"),
            Comparison("", good, bad, annotator="y"),
            Rating("", good, 4, (1, 5), annotator="z"),
            Rating("", bad, 2, (1, 5), annotator="z"),
        ]
    )
    assert list(report.annotators) == ["x", "y", "z"] and list(report.origins) == ["file", "page"]
    x, y, z = report.annotators.values()
    assert (x.choices, x.accuracy and x.accuracy[0]) == (1, 1.0)
    assert (y.choices, y.accuracy and y.accuracy[0]) == (2, 0.5)
    assert (z.choices, z.accuracy, z.ratings, z.pearson) == (0, None, 2, pytest.approx(1.0))
    assert report.origins["file"].choices == 0 and report.origins["page"].choices == 2


# Faults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 0}, "max_steps of 1 or more, or None, got 0"),
        ({"ties": "thirds"}, "ties 'half' or 'rao-kupper', got 'thirds'"),
        ({"label_smoothing": 0.5}, "label_smoothing from 0 to below 0.5, got 0.5"),
        ({"margin": -1.0}, r"margin of 0 or more, .* got -1.0"),
        ({"margin": 1.0, "ties": "rao-kupper"}, r"0 with ties by Rao & Kupper, .* got 1.0"),
    ],
)
def test_arguments_out_of_range(bert: Path, arguments: dict[str, object], message: str) -> None:
    model = LearnedRewardModel.from_pretrained(bert, device="cpu")
    with pytest.raises(ValueError, match=message):
        model.fit(labels(4), **arguments)
