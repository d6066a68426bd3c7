"""How good a reward model gets with the number of answers, and what more of them would bring.

Models are fitted on growing parts of the feedback and measured on the same held-out rest. The
errors are then taken to fall as a power of the number of answers towards a floor,

    error(n) = c + a·n^(−b),    a, c ≥ 0,

the usual form (Hestness et al. 2017; Hoiem et al. 2021, Learning curves for analysis of deep
networks). A few points on a short range hardly tell c from b, so whatever is extrapolated has an
interval, and one that is wide.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import nnls

from reward_models.evaluation import EvaluationReport, share_interval
from reward_models.feedback.records import Feedback
from reward_models.fitting import split
from reward_models.learned import LearnedRewardModel

logger = logging.getLogger(__name__)

Measure = Literal["comparisons", "labels", "ratings"]

_EXPONENTS = np.linspace(0.2, 1.0, 9)
"""Values of b that are tried; those that were found in practice lie within (Hestness 2017)."""


@dataclass(frozen=True)
class CurvePoint:
    """What came of learning from so many answers.

    Args:
        answers: number of records learned from.
        value: mean over the repeats.
        interval: 95 %, for the held-out sample: Wilson's of an accuracy, Fisher's of a correlation.
        repeats: the value of each repeat; they differ in the answers drawn and in their order.
    """

    answers: int
    value: float
    interval: tuple[float, float]
    repeats: tuple[float, ...]


@dataclass(frozen=True)
class Forecast:
    """What a number of answers would bring, if the power law goes on.

    Args:
        answers: number of records; None for as many as one likes, the ceiling.
        value: median of the fits that the points' errors allow.
        interval: the middle 95 % of them.
        gain: median of what each fit gains over the largest number of answers measured.
        gain_interval: the middle 95 % of these.
    """

    answers: int | None
    value: float
    interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]


@dataclass(frozen=True)
class LearningCurve:
    """Held-out agreement against the number of answers; `dataclasses.asdict` is ready for JSON.

    Args:
        measure: accuracy on comparisons or labels, or Pearson correlation with ratings.
        held_out: number of held-out choices or of rated texts.
        points: fewest answers first.
        forecasts: at the largest number of answers (the fit itself), twice and four times that, and
            the ceiling; empty if there are fewer than three points.
    """

    measure: Measure
    held_out: int
    points: tuple[CurvePoint, ...]
    forecasts: tuple[Forecast, ...]


def learning_curve(
    make_model: Callable[[int], LearnedRewardModel],
    feedback: Sequence[Feedback],
    eval_feedback: Sequence[Feedback] | float,
    sizes: Sequence[int],
    measure: Measure = "comparisons",
    repeats: int = 1,
    seed: int = 0,
    on_point: Callable[[CurvePoint], None] | None = None,
    **arguments: Any,
) -> LearningCurve:
    """Fit on growing parts of the feedback, each holding the ones before it.

    Args:
        make_model: an unfitted model, from a seed.
        feedback: what to learn from, in any order.
        eval_feedback: what to measure on: records, or the fraction of the texts to hold out.
        sizes: numbers of answers.
        measure: what is measured.
        repeats: fits for each size, with other parts; two or more show how much hangs on them.
        seed: of the split and of the first repeat.
        on_point: called with each point as it is done.
        arguments: of `LearnedRewardModel.fit`; the same number of epochs, not of updates, is what
            compares sizes fairly.

    Raises:
        ValueError: if a size is not from 1 to the number of records that may be learned from, or
            nothing held out is of the kind that is measured.
    """
    learned, held_out = split(feedback, eval_feedback, seed)
    sizes = sorted(set(sizes))
    if not sizes or not 1 <= sizes[0] <= sizes[-1] <= len(learned):
        raise ValueError(f"expected sizes from 1 to {len(learned)} records, got {sizes}")
    if repeats < 1:
        raise ValueError(f"expected repeats of 1 or more, got {repeats}")
    orders = [np.random.default_rng(seed + k).permutation(len(learned)) for k in range(repeats)]
    points, n = [], 0
    for size in sizes:
        values = []
        for k, order in enumerate(orders, start=seed):
            model = make_model(k)
            model.fit([learned[i] for i in order[:size]], seed=k, **arguments)
            value, n = _measured(model.evaluate(held_out), measure)
            values.append(value)
        mean = float(np.mean(values))
        interval = _fisher(mean, n) if measure == "ratings" else _wilson(mean, n)
        points.append(CurvePoint(size, mean, interval, tuple(values)))
        logger.info("%d answers: %.3f", size, mean)
        if on_point is not None:
            on_point(points[-1])
    largest = sizes[-1]
    return LearningCurve(
        measure=measure,
        held_out=n,
        points=tuple(points),
        forecasts=forecast(points, [largest, 2 * largest, 4 * largest, None], seed)
        if len(points) >= 3
        else (),
    )


def forecast(
    points: Sequence[CurvePoint], answers: Sequence[int | None], seed: int = 0, draws: int = 500
) -> tuple[Forecast, ...]:
    """Extrapolate by the power law of this module, fitted to points drawn from their intervals.

    The points' errors are drawn independently of each other. Those that come from the held-out
    texts are not, since all points share them: the interval of a gain is too wide rather than
    too narrow.

    Args:
        points: at least three.
        answers: the numbers to forecast for; None is the ceiling, 1 − c.
        seed: of the draws.
        draws: number of fits.

    Raises:
        ValueError: if there are fewer than three points.
    """
    if len(points) < 3:
        raise ValueError(f"expected at least three points to extrapolate from, got {len(points)}")
    n = np.array([point.answers for point in points], dtype=float)
    errors = np.array([1 - point.value for point in points])
    deviations = np.array([(high - low) / (2 * 1.96) for low, high in (p.interval for p in points)])
    rng = np.random.default_rng(seed)
    drawn = errors + deviations * rng.normal(size=(draws, len(points)))
    a, b, c = np.array([_power_law(n, each, deviations) for each in drawn]).T  # (draws,) each

    def value(number: float) -> np.ndarray:
        return 1 - c - a * number**-b

    def middle(values: np.ndarray) -> tuple[float, tuple[float, float]]:
        low, median, high = np.quantile(values, [0.025, 0.5, 0.975]).tolist()
        return median, (low, high)

    found = []
    for number in answers:
        values = value(math.inf if number is None else number)
        found.append(Forecast(number, *middle(values), *middle(values - value(n.max()))))
    return tuple(found)


def more_worth_it(curve: LearningCurve, least_gain: float) -> int:
    """How many times as many answers again are worth it: 0, 1 (twice as many in all) or 3.

    They are, as long as each doubling is forecast to gain at least `least_gain`. No more than four
    times the answers is looked at: so far a curve of few points does not tell.

    Raises:
        ValueError: if there is no forecast.
    """
    if not curve.forecasts:
        raise ValueError(f"expected a curve with a forecast, got {len(curve.points)} points")
    here, twice, four_times, _ = (f.value for f in curve.forecasts)
    if twice - here < least_gain:
        return 0
    return 1 if four_times - twice < least_gain else 3


def in_words(curve: LearningCurve, answers: int, least_gain: float) -> str:
    """Say how good the model is with the answers there are, and how many more are worth it.

    Args:
        curve: what `learning_curve` returned, with a forecast.
        answers: how many there are, held-out ones among them.
        least_gain: what a doubling must bring, in units of the measure.
    """
    more = more_worth_it(curve, least_gain)
    figure = "correlation" if curve.measure == "ratings" else "accuracy"
    held_out = "texts" if curve.measure == "ratings" else curve.measure
    last, (_, twice, four_times, _) = curve.points[-1], curve.forecasts
    parts = [
        f"{answers} answers: {figure} {last.value:.3f} ({_span(last.interval)}) on "
        f"{curve.held_out} held-out {held_out}."
    ]
    for times, beyond in ((1, twice), (3, four_times)):
        parts.append(
            f"{times * answers} more: {beyond.value:.3f}, a gain of {beyond.gain:.3f} "
            f"({_span(beyond.gain_interval)})."
        )
    if more:
        parts.append(f"{'At least' if more == 3 else 'About'} {more * answers} more are worth it")
    else:
        parts.append("No more are worth it")
    parts[-1] += f", at a gain of {least_gain:g} or more for twice the answers"
    low, high = twice.gain_interval
    unsure = low < least_gain <= high
    return " ".join(parts) + ("; but it may be otherwise, by the interval." if unsure else ".")


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _power_law(
    n: np.ndarray, errors: np.ndarray, deviations: np.ndarray
) -> tuple[float, float, float]:
    """a, b and c by weighted least squares, which is linear once b is chosen."""
    best = (math.inf, 0.0, 0.0, 0.0)
    weight = 1 / np.maximum(deviations, 1e-6)
    for b in _EXPONENTS:
        design = np.stack([n**-b, np.ones_like(n)], axis=1)
        (a, c), residual = nnls(design * weight[:, None], errors * weight)
        best = min(best, (residual, a, float(b), c))
    return best[1:]


def _measured(report: EvaluationReport, measure: Measure) -> tuple[float, int]:
    """The figure, and the number of choices or of texts that it stands on."""
    if measure == "ratings":
        if report.ratings is not None:
            return report.ratings.pearson, report.ratings.n
    else:
        part = report.comparisons if measure == "comparisons" else report.labels
        if part is not None and part.decided:
            return part.accuracy, part.decided
    raise ValueError(f"expected held-out {measure} to measure on, got none")


def _wilson(share: float, n: int) -> tuple[float, float]:
    _, low, high = share_interval(share * n, n)
    return low, high


def _fisher(correlation: float, n: int) -> tuple[float, float]:
    """95 % interval of a correlation by Fisher's z (1921); all of it if fewer than four texts."""
    if n < 4:
        return -1.0, 1.0
    z, half = math.atanh(max(min(correlation, 1 - 1e-12), -1 + 1e-12)), 1.96 / math.sqrt(n - 3)
    return math.tanh(z - half), math.tanh(z + half)
