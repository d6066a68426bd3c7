"""The learning curve: known power laws, and tiny models that learn from more and more."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_reward_models_learned import comparisons, make_backbone, ratings

from reward_models import LearnedRewardModel
from reward_models.evaluation import EvaluationReport, choice_report
from reward_models.learning_curve import (
    CurvePoint,
    LearningCurve,
    forecast,
    in_words,
    learning_curve,
    more_worth_it,
)
from reward_models.plots import plot_calibration, plot_learning_curve


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("models") / "bert", "bert")


def points(half: float) -> list[CurvePoint]:
    """Errors of 0.1 + 2 / √n at 100, 400, 1600 and 6400: 0.3, 0.2, 0.15 and 0.125."""
    values = {100: 0.7, 400: 0.8, 1600: 0.85, 6400: 0.875}
    return [CurvePoint(n, v, (v - half, v + half), (v,)) for n, v in values.items()]


def test_a_known_power_law_is_continued() -> None:
    """At 25600 the error is 0.1125, and the ceiling 0.9."""
    here, beyond, ceiling = forecast(points(1e-4), [6400, 25600, None])
    assert here.value == pytest.approx(0.875, abs=1e-3) and here.gain == 0
    assert beyond.value == pytest.approx(0.8875, abs=1e-3)
    assert beyond.gain == pytest.approx(0.0125, abs=1e-3)
    assert ceiling.value == pytest.approx(0.9, abs=2e-3) and ceiling.answers is None


def known_curve(half: float) -> LearningCurve:
    """From 6400 to 12800 the error falls by 0.0073, from there to 25600 by 0.0052."""
    beyond = forecast(points(half), [6400, 12800, 25600, None])
    return LearningCurve("comparisons", 750, tuple(points(half)), beyond)


@pytest.mark.parametrize(("least_gain", "more"), [(0.008, 0), (0.006, 1), (0.004, 3)])
def test_more_answers_are_worth_it_while_doublings_gain_enough(
    least_gain: float, more: int
) -> None:
    assert more_worth_it(known_curve(1e-4), least_gain) == more
    said = in_words(known_curve(1e-4), 8000, least_gain)
    assert "8000 answers: accuracy 0.875 (0.875 to 0.875) on 750 held-out comparisons." in said
    assert "8000 more: 0.882, a gain of 0.007 (0.007 to 0.007)." in said
    assert "24000 more: 0.888, a gain of 0.012" in said
    verdict = {0: "No more are", 1: "About 8000 more are", 3: "At least 24000 more are"}[more]
    assert f"{verdict} worth it" in said and "otherwise" not in said


def test_an_unsure_verdict_is_said_to_be_one() -> None:
    assert "may be otherwise" in in_words(known_curve(0.03), 8000, 0.006)
    with pytest.raises(ValueError, match="a curve with a forecast, got 2 points"):
        more_worth_it(LearningCurve("labels", 9, tuple(points(0.1)[:2]), ()), 0.01)


def test_uncertain_points_make_an_uncertain_forecast() -> None:
    """With ± 3 % on each point nearly any ceiling from 0.86 up may be; the truth is within."""
    for answers, truth in ((25600, 0.8875), (None, 0.9)):
        (found,) = forecast(points(0.03), [answers])
        low, high = found.interval
        assert low < truth < high and high - low > 0.03
        assert found.gain_interval[0] >= 0 < found.gain_interval[1]
    with pytest.raises(ValueError, match="at least three points to extrapolate from, got 2"):
        forecast(points(0.03)[:2], [None])


def test_parts_hold_one_another_and_the_held_out_stays() -> None:
    """Two repeats, three sizes; the value is the number of records seen, as a share of 40."""
    seen: list[set] = []

    class Counting:
        def fit(self, feedback: list, seed: int, epochs: int) -> None:
            seen.append(set(feedback))

        def evaluate(self, held_out: list) -> EvaluationReport:
            assert held_out == test and epochs_given == 2
            right = len(seen[-1]) // 4
            return SimpleNamespace(comparisons=SimpleNamespace(accuracy=right / 10, decided=10))

    test, epochs_given = comparisons(10, seed=9), 2
    curve = learning_curve(
        lambda seed: Counting(), comparisons(40), test, [20, 8, 40], repeats=2, epochs=epochs_given
    )
    assert [point.answers for point in curve.points] == [8, 20, 40]
    assert [point.repeats for point in curve.points] == [(0.2, 0.2), (0.5, 0.5), (1.0, 1.0)]
    assert seen[0] < seen[2] < seen[4] and seen[1] < seen[3] < seen[5] and seen[0] != seen[1]
    assert [f.answers for f in curve.forecasts] == [40, 80, 160, None]
    assert json.loads(json.dumps(dataclasses.asdict(curve), allow_nan=False))


@pytest.mark.parametrize("measure", ["comparisons", "ratings"])
def test_more_answers_are_better(bert: Path, tmp_path: Path, measure: str) -> None:
    """From 30 to 500 records by 0.1 at least; an interval holds its value; the picture is drawn."""
    make = {"comparisons": comparisons, "ratings": ratings}[measure]
    curve = learning_curve(
        lambda seed: LearnedRewardModel.from_pretrained(bert, device="cpu", seed=seed),
        make(600), make(150, seed=9), [30, 500], measure, epochs=4, learning_rate=3e-3,
    )  # fmt: skip
    few, many = curve.points
    assert many.value > few.value + 0.1 and many.interval[0] < many.value < many.interval[1]
    assert curve.held_out > 100 and curve.forecasts == ()
    plot_learning_curve(curve, tmp_path / "curve.png", "a title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_interval_of_a_correlation_by_hand() -> None:
    """Fisher's z of 0.5 is 0.5493; with 28 texts its SE is 0.2: tanh(0.5493 ± 0.392)."""

    class Fixed:
        def fit(self, feedback: list, seed: int) -> None: ...

        def evaluate(self, held_out: list) -> SimpleNamespace:
            return SimpleNamespace(ratings=SimpleNamespace(pearson=0.5, n=28))

    curve = learning_curve(lambda seed: Fixed(), ratings(5), ratings(5, seed=9), [1], "ratings")
    low, high = curve.points[0].interval
    assert low == pytest.approx(math.tanh(0.5493 - 0.392), abs=1e-4)
    assert high == pytest.approx(math.tanh(0.5493 + 0.392), abs=1e-4)


def test_pictures_with_forecast_and_calibration(tmp_path: Path) -> None:
    curve = SimpleNamespace(
        measure="comparisons", points=points(0.03), forecasts=forecast(points(0.03), [6400, 12800])
    )
    plot_learning_curve(curve, tmp_path / "curve.png")
    report = choice_report([-1.0, 0.5, 2.0, 0.1], [0.0, 1.0, 0.5, 1.0])
    plot_calibration(report, tmp_path / "calibration.png")
    plot_calibration({"comparisons": report, "labels": report}, tmp_path / "both.png")
    for name in ("curve.png", "calibration.png", "both.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_faults(bert: Path) -> None:
    def made(seed: int) -> LearnedRewardModel:
        return LearnedRewardModel.from_pretrained(bert, device="cpu", seed=seed)

    with pytest.raises(ValueError, match=r"sizes from 1 to 20 records, got \[10, 21\]"):
        learning_curve(made, comparisons(20), comparisons(5, seed=9), [21, 10])
    with pytest.raises(ValueError, match="held-out labels to measure on, got none"):
        learning_curve(made, ratings(20), ratings(5, seed=9), [10], "labels", max_steps=1)
