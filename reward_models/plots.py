"""Pictures: a reward model's calibration, its learning curve, and the rounds of a loop."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reward_models.atomic import atomic_file
from reward_models.evaluation import ChoiceReport
from reward_models.learning_curve import LearningCurve


def plot_calibration(
    reports: ChoiceReport | Mapping[str, ChoiceReport], path: str | os.PathLike[str]
) -> None:
    """Predicted against observed shares with their intervals, and the diagonal of a perfect model.

    Args:
        reports: on held-out comparisons or labels; several by what they are called, side by side.
        path: of the PNG file.
    """
    panels = {"": reports} if isinstance(reports, ChoiceReport) else reports
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, report) in zip(all_axes, panels.items(), strict=True):
        _draw_calibration(axes, report, title)
    _save(figure, path)


def _draw_calibration(axes: Axes, report: ChoiceReport, title: str) -> None:
    predicted = np.array([bin.predicted for bin in report.calibration])
    observed = np.array([bin.observed for bin in report.calibration])
    intervals = np.array(
        [bin.interval or (bin.observed, bin.observed) for bin in report.calibration]
    )
    low = 0.5 if predicted.min() >= 0.5 else 0.0
    axes.plot([low, 1], [low, 1], color="0.6", linestyle="--", label="perfect")
    spread = np.abs(intervals.T - observed)
    axes.errorbar(predicted, observed, yerr=spread, fmt="o-", capsize=3, label="held out, 95 %")
    axes.set_xlabel("predicted share")
    axes.set_ylabel("observed share")
    error = f"{report.n} choices, calibration error {report.calibration_error:.3f}"
    axes.set_title(f"{title}\n{error}" if title else error, fontsize=10)
    axes.legend(loc="upper left")


def plot_learning_curve(
    curve: LearningCurve, path: str | os.PathLike[str], title: str = ""
) -> None:
    """Held-out agreement against the number of answers, and what is forecast beyond.

    Args:
        curve: what `learning_curve` returned.
        path: of the PNG file.
        title: above the picture.
    """
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    answers = [point.answers for point in curve.points]
    values = np.array([point.value for point in curve.points])
    intervals = np.array([point.interval for point in curve.points])
    spread = np.abs(intervals.T - values)
    axes.errorbar(answers, values, yerr=spread, fmt="o-", capsize=3, label="measured, 95 %")
    for point in curve.points:
        if len(point.repeats) > 1:
            axes.plot(
                [point.answers] * len(point.repeats), point.repeats, ".", color="C0", alpha=0.5
            )
    beyond = [(f.answers, f.value, *f.interval) for f in curve.forecasts if f.answers is not None]
    if beyond:
        x, middle, low, high = np.array(beyond).T
        axes.plot(x, middle, "C1--", label="forecast, 95 %")
        axes.fill_between(x, low, high, color="C1", alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    ticks = sorted({*answers, *(number for number, *_ in beyond)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("answers learned from")
    axes.set_ylabel("correlation" if curve.measure == "ratings" else "accuracy")
    if title:
        axes.set_title(title, fontsize=10)
    axes.legend(loc="lower right")
    _save(figure, path)


def plot_rounds(
    answers: Sequence[int], judged: Sequence[Sequence[float]], path: str | os.PathLike[str]
) -> None:
    """The judge's mean after each round against the answers given until then.

    Args:
        answers: by round, the first before any answer.
        judged: by round, the mean and its interval: value, low, high.
        path: of the PNG file.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    middle, low, high = np.array(judged).T
    reach = (middle - low, high - middle)
    axes.errorbar(answers, middle, yerr=reach, marker="o", capsize=3, color="#1f5fa8")
    axes.set(xlabel="answers given", ylabel="judge, test prompts", xticks=answers)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
