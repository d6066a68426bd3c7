"""Statistics of a few runs: the ones that Agarwal et al. 2021 advise, in a few lines each.

Scores are arrays (runs, tasks). Source: "Deep reinforcement learning at the edge of the statistical
precipice", NeurIPS 2021, section 4.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats


def interquartile_mean(scores: np.ndarray) -> float:
    """Return the mean of the middle half of all scores, whatever run or task they are of."""
    return float(stats.trim_mean(scores, 0.25, axis=None))


def bootstrap_interval(
    scores: np.ndarray,
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of a statistic, runs drawn anew within each task.

    Args:
        scores: (runs, tasks).
        statistic: Of such an array.
        confidence: Share of the resamples that the interval holds.
        n_resamples: How often runs are drawn, with replacement.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    n_runs, n_tasks = scores.shape
    drawn = generator.integers(0, n_runs, size=(n_resamples, n_runs, n_tasks))
    found = [statistic(np.take_along_axis(scores, index, axis=0)) for index in drawn]
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def probability_of_improvement(scores: np.ndarray, others: np.ndarray) -> float:
    """Return how likely a run scores above one of another algorithm, mean over the tasks.

    P(X > Y) + P(X = Y) / 2, the Mann–Whitney statistic over the number of pairs.

    Args:
        scores: X, (runs, tasks).
        others: Y, (other runs, tasks).
    """
    above = scores[:, None] > others[None]
    equal = scores[:, None] == others[None]
    return float((above + 0.5 * equal).mean())


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the share of all runs that score above each threshold, (thresholds,)."""
    return (scores.reshape(-1)[:, None] > thresholds).mean(axis=0)
