"""Figures of agreement, against scipy and a slow second way."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from reward_models.evaluation import (
    GroupReport,
    calibration,
    choice_report,
    pairwise_accuracy,
    pearson,
    rating_report,
    share_interval,
    spearman,
)
from reward_models.tables import groups_table


def test_correlations_equal_scipys() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, 50)
    y = x + rng.normal(0, 3, 50).round()
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(pearson([1, 1, 1], [1, 2, 3]))


def test_pairwise_accuracy_by_hand() -> None:
    # pairs (0,1) right, (0,2) wrong, (1,2) tied prediction; (1,3) equal ratings, (0,3), (2,3) right
    accuracy, pairs = pairwise_accuracy([2, 3, 3, 5], [1, 2, 0, 2])
    assert pairs == 5
    assert accuracy == pytest.approx((1 + 0 + 0.5 + 1 + 1) / 5)


def test_pairwise_accuracy_a_slow_second_way() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 5, 30), rng.integers(0, 5, 30)
    pairs = [(i, j) for i, j in itertools.combinations(range(30), 2) if y[i] != y[j]]
    right = [0.5 if x[i] == x[j] else float((x[i] > x[j]) == (y[i] > y[j])) for i, j in pairs]
    assert pairwise_accuracy(x, y) == (pytest.approx(np.mean(right)), len(pairs))


def test_choice_report_by_hand() -> None:
    report = choice_report(np.array([0.0, 2.0, -1.0]), np.array([0.5, 1.0, 1.0]))
    assert report.accuracy == 0.5
    losses = [np.log(2), np.log(1 + np.exp(-2)), np.log(1 + np.exp(1))]
    assert report.log_loss == pytest.approx(np.mean(losses))


def test_calibration_error_by_hand() -> None:
    """Two groups of one: 0.5 where 1 was observed, 0.75 where 0 was; the mean gap is 0.625."""
    report = choice_report(np.array([0.0, math.log(3)]), np.array([1.0, 0.0]))
    assert report.calibration_error == pytest.approx(0.625)
    assert report.calibration[0].interval == tuple(share_interval(1, 1)[1:])
    assert calibration(np.array([1.0]), np.array([2.0]))[0].interval is None


def test_interchangeable_sides_are_turned_to_the_preferred_one() -> None:
    """All first sides were chosen, of which the model prefers two thirds: 0.667 is observed."""
    logits = np.array([1.0, 1.0, -1.0] * 10)
    report = choice_report(logits, np.ones(30), interchangeable=True)
    plain = choice_report(logits, np.ones(30))
    assert (report.accuracy, report.log_loss) == (plain.accuracy, pytest.approx(plain.log_loss))
    predicted = [bin.predicted for bin in report.calibration]
    assert predicted == pytest.approx([1 / (1 + math.exp(-1))] * 10)
    observed = sum(bin.n * bin.observed for bin in report.calibration) / 30
    assert observed == pytest.approx(2 / 3)
    assert all(bin.observed == 1 for bin in plain.calibration)  # whatever was predicted


def test_calibration_error_of_true_and_of_overconfident_probabilities() -> None:
    """4,000 choices; three times too sure, the mean gap is that of an integral."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 4000)
    observed = (rng.random(4000) < 1 / (1 + np.exp(-logits))).astype(float)
    assert choice_report(logits, observed).calibration_error < 0.03
    gap = stats.norm.expect(lambda x: abs(expit(3 * x) - expit(x)), scale=1.5)
    found = choice_report(3 * logits, observed).calibration_error
    assert found == pytest.approx(gap, abs=0.02) and gap > 0.1


def test_calibration_of_a_perfect_model_is_the_diagonal() -> None:
    x = np.arange(25.0)
    table = calibration(x, x)
    assert [bin.n for bin in table] == [3] * 5 + [2] * 5
    assert all(bin.predicted == bin.observed for bin in table)
    report = rating_report(x, x)
    assert (report.pearson, report.spearman, report.pairwise_accuracy) == pytest.approx((1, 1, 1))
    assert report.rmse == 0
    json.dumps(dataclasses.asdict(report))


def test_interval_of_a_share_by_hand() -> None:
    """Wilson's: (p + z²/2n ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n)."""
    share, low, high = share_interval(9, 10)
    z, n, p = 1.959964, 10, 0.9
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert share == 0.9
    assert low == pytest.approx((middle - half) / (1 + z**2 / n), abs=1e-6)
    assert high == pytest.approx((middle + half) / (1 + z**2 / n), abs=1e-6)
    assert share_interval(10, 10)[2] == 1 and share_interval(0, 10)[1] == 0
    for count in range(11):
        wilson = stats.binomtest(count, 10).proportion_ci(method="wilson")
        assert share_interval(count, 10)[1:] == pytest.approx([wilson.low, wilson.high])
    assert share_interval(4.5, 10)[0] == 0.45
    with pytest.raises(ValueError, match="expected a count from 0 to 10, got 11"):
        share_interval(11, 10)


def test_table_of_annotators() -> None:
    ann = GroupReport(choices=4, accuracy=(0.75, 0.3, 0.954), ratings=0, pearson=None)
    ben = GroupReport(choices=0, accuracy=None, ratings=7, pearson=float("nan"))
    groups = {name: dataclasses.asdict(group) for name, group in (("ann", ann), ("b|n", ben))}
    assert groups_table(groups, "annotator").splitlines() == [
        "| annotator | held-out choices | accuracy, 95 % | held-out ratings | r |",
        "|---|---|---|---|---|",
        "| ann | 4 | 0.75 [0.30, 0.95] | 0 |  |",
        "| b\\|n | 0 |  | 7 |  |",
    ]
    assert groups_table({"ann": dataclasses.asdict(ann)}, "annotator") == ""
