"""How well scores agree with people: correlation, pairwise accuracy, calibration.

Pure functions of arrays and the reports that they fill; which texts are held out is decided by
the caller.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class CalibrationBin:
    """A tenth of the held-out cases, those with neighbouring predictions.

    Args:
        n: number of cases.
        predicted: mean of what the model predicted for them.
        observed: mean of what people said.
        interval: of the observed share, 95 % (Wilson); None for ratings.
    """

    n: int
    predicted: float
    observed: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class RatingReport:
    """Agreement with people's mean ratings, on the human scale.

    Args:
        n: number of different texts.
        pearson: correlation of prediction and mean rating.
        spearman: the same of their ranks.
        pairwise_accuracy: share of the pairs of texts with different mean ratings that the model
            orders as people do; 0.5 is chance.
        pairs: number of such pairs.
        rmse: root mean squared error.
        calibration: predicted and mean rating in ten groups, lowest prediction first.
    """

    n: int
    pearson: float
    spearman: float
    pairwise_accuracy: float
    pairs: int
    rmse: float
    calibration: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class ChoiceReport:
    """Agreement with people's choices: of two completions, or of good and bad.

    Args:
        n: number of choices; ties are among them.
        decided: number of those that are no ties.
        accuracy: share of the decided ones in which the model prefers the same side; 0.5 is chance
            in comparisons.
        log_loss: mean negative log-likelihood of the choices, nats; ln 2 = 0.693 is a coin's.
        calibration: predicted and observed share in ten groups, lowest prediction first; in
            comparisons those of the side that the model prefers, so that they begin at 0.5.
        calibration_error: mean distance of both, weighted by the groups' sizes (the ECE of Guo et
            al. 2017, eq. 3). Chance alone keeps it above 0: some 0.07 for 200 choices.
    """

    n: int
    decided: int
    accuracy: float
    log_loss: float
    calibration: tuple[CalibrationBin, ...]
    calibration_error: float


@dataclass(frozen=True)
class GroupReport:
    """Agreement with the feedback of one annotator or of one origin.

    Args:
        choices: number of comparisons and labels, ties left out.
        accuracy: share of them in which the model prefers the same side, and its 95 % interval
            (Wilson); None if there are none.
        ratings: number of ratings.
        pearson: correlation of prediction and rating; None if there are none.
    """

    choices: int
    accuracy: tuple[float, float, float] | None
    ratings: int
    pearson: float | None


@dataclass(frozen=True)
class EvaluationReport:
    """Agreement with held-out feedback, one part for each kind that was there.

    `dataclasses.asdict` makes it ready for JSON; a correlation that is not defined is NaN.

    Args:
        ratings: all ratings.
        comparisons: all comparisons.
        labels: all labels.
        annotators: by pseudonym, those who are known.
        origins: by data set or tool, where known.
    """

    ratings: RatingReport | None = None
    comparisons: ChoiceReport | None = None
    labels: ChoiceReport | None = None
    annotators: dict[str, GroupReport] = field(default_factory=dict)
    origins: dict[str, GroupReport] = field(default_factory=dict)


def rating_report(predicted: np.ndarray, observed: np.ndarray) -> RatingReport:
    """Compare predictions with mean ratings, both of shape (n,) and on the same scale."""
    accuracy, pairs = pairwise_accuracy(predicted, observed)
    return RatingReport(
        n=len(observed),
        pearson=pearson(predicted, observed),
        spearman=spearman(predicted, observed),
        pairwise_accuracy=accuracy,
        pairs=pairs,
        rmse=float(np.sqrt(np.mean((predicted - observed) ** 2))),
        calibration=calibration(predicted, observed),
    )


def choice_report(
    logits: np.ndarray, observed: np.ndarray, interchangeable: bool = False
) -> ChoiceReport:
    """Compare predicted log-odds with choices.

    Args:
        logits: log-odds of the first side, shape (n,).
        observed: 1 if the first side was chosen, 0 if the other, 0.5 for a tie, shape (n,).
        interchangeable: whether it means nothing which side is the first (it may be the chosen one
            always, and then its observed share would be 1 whatever the model says).
    """
    logits, observed = np.asarray(logits, dtype=float), np.asarray(observed, dtype=float)
    if interchangeable:
        observed = np.where(logits < 0, 1 - observed, observed)
        logits = np.abs(logits)
    losses = np.logaddexp(0, logits) - observed * logits
    right, decided = right_choices(logits, observed)
    bins = calibration(1 / (1 + np.exp(-logits)), observed, shares=True)
    gaps = [bin.n * abs(bin.predicted - bin.observed) for bin in bins]
    return ChoiceReport(
        n=len(observed),
        decided=decided,
        accuracy=right / decided if decided else float("nan"),
        log_loss=float(losses.mean()),
        calibration=bins,
        calibration_error=sum(gaps) / len(observed),
    )


def right_choices(logits: np.ndarray, observed: np.ndarray) -> tuple[float, int]:
    """How many choices the log-odds foresee, a prediction of 0 as half of one, and of how many.

    Ties are left out. Arguments as in `choice_report`.
    """
    decided = observed != 0.5
    return float(_half_ties(logits[decided] * (observed[decided] - 0.5)).sum()), int(decided.sum())


def pearson(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Correlation of two variables; NaN if one of them does not vary."""
    dx, dy = np.asarray(x) - np.mean(x), np.asarray(y) - np.mean(y)
    norm = np.sqrt((dx @ dx) * (dy @ dy))
    return float(dx @ dy / norm) if norm > 0 else float("nan")


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Correlation of two variables' ranks; equal values share their mean rank."""
    return pearson(_ranks(np.asarray(x)), _ranks(np.asarray(y)))


def pairwise_accuracy(
    predicted: Sequence[float] | np.ndarray, observed: Sequence[float] | np.ndarray
) -> tuple[float, int]:
    """Share of the pairs with different observations that the predictions order alike.

    A pair with equal predictions counts one half.

    Returns:
        The share (NaN if there is no such pair), and the number of such pairs.
    """
    predicted, observed = np.asarray(predicted, dtype=float), np.asarray(observed, dtype=float)
    right, pairs = 0.0, 0
    for i in range(len(observed) - 1):
        gap = observed[i + 1 :] - observed[i]
        different = gap != 0
        agreement = (predicted[i + 1 :] - predicted[i])[different] * np.sign(gap[different])
        right += float(_half_ties(agreement).sum())
        pairs += int(different.sum())
    return (right / pairs if pairs else float("nan")), pairs


def calibration(
    predicted: np.ndarray, observed: np.ndarray, bins: int = 10, shares: bool = False
) -> tuple[CalibrationBin, ...]:
    """Mean prediction and mean observation in groups of equal size, lowest prediction first.

    Args:
        predicted: shape (n,).
        observed: shape (n,).
        bins: number of groups, if there are as many cases.
        shares: whether observations are choices from 0 to 1, so that their mean has an interval.
    """
    groups = np.array_split(np.argsort(predicted, kind="stable"), min(bins, len(predicted)))
    return tuple(_bin(predicted[group], observed[group], shares) for group in groups)


def _bin(predicted: np.ndarray, observed: np.ndarray, shares: bool) -> CalibrationBin:
    interval = None
    if shares:
        _, low, high = share_interval(float(observed.sum()), len(observed))
        interval = (low, high)
    return CalibrationBin(len(observed), float(predicted.mean()), float(observed.mean()), interval)


def mean_interval(values: Sequence[float] | np.ndarray) -> list[float]:
    """Mean of (n,) values and its 95 % interval by Student's t: [mean, low, high].

    Raises:
        ValueError: if there are fewer than two values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"expected at least two values for an interval, got {len(values)}")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


def share_interval(count: float, n: int) -> list[float]:
    """The share of `count` among `n` and its 95 % interval (Wilson 1927): [share, low, high].

    Args:
        count: how many; a half is a tie, which makes the interval somewhat too wide.
        n: of how many; the share of none is NaN.

    Raises:
        ValueError: if the count is not from 0 to n.
    """
    if not 0 <= count <= n:
        raise ValueError(f"expected a count from 0 to {n}, got {count}")
    if n == 0:
        return [math.nan, 0.0, 1.0]
    share, z2 = count / n, float(stats.norm.ppf(0.975)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2) / (1 + z2 / n)
    low = 0.0 if count == 0 else middle - half  # exactly, whatever the rounding
    return [share, low, 1.0 if count == n else middle + half]


def jackknife_interval(
    statistic: Callable[[Sequence[str]], float], texts: Sequence[str]
) -> list[float]:
    """A statistic of a whole set of texts and its 95 % interval: [value, low, high].

    Each text is left out in turn (Efron & Stein 1981). A bootstrap would draw texts twice, and so
    find less in them that is distinct.
    """
    texts = list(texts)
    n, value = len(texts), float(statistic(texts))
    without = np.array([statistic(texts[:i] + texts[i + 1 :]) for i in range(n)])
    half = 1.96 * float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))
    return [value, value - half, value + half]


def _half_ties(margins: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, 0.5 at zero."""
    return (np.sign(margins) + 1) / 2


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
