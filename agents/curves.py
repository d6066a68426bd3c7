"""The picture of a training: score, judge and KL against tokens, and score against KL."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

KL = "KL (nats per completion)"
PANELS = (
    ("time/total_timesteps", "rollout/score_mean", "tokens", "score"),
    ("time/total_timesteps", "rollout/judge_mean", "tokens", "judge (human scale)"),
    ("time/total_timesteps", "rollout/ref_kl", "tokens", KL),
    ("rollout/ref_kl", "rollout/score_mean", KL, "score"),
)
"""Logged keys and axis names; a key that was not logged leaves its panel empty."""


def training_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the rows of a run's metrics.jsonl, one per rollout."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (x, y, x_name, y_name) in zip(axes.flat, PANELS, strict=True):
        columns = [[row.get(key, float("nan")) for row in rows] for key in (x, y)]
        axis.plot(*columns, marker=".", linewidth=1, color="#1f5fa8")
        axis.set(xlabel=x_name, ylabel=y_name)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
