"""The report on a grid of runs: a table, pictures, and the raw figures."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.baselines import MOVIES, OVER_OPTIMISATION
from benchmarks.statistics import (
    bootstrap_interval,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from benchmarks.throughput import machine

Results = Sequence[dict[str, Any]]
OURS = ("TokenPPO", "TokenA2C", "TokenRLOO", "TokenGRPO")
CURVES = ("DQN", "A2C", "PPO", "PPO, LM", "expert iteration", *OURS)
"""Algorithms that are drawn as they learn; more would hide one another."""
MEASURES = {
    "reward": "reward",
    "value": "reward − β·KL",
    "judge": "judge, −4 to +4",
    "lexicon": "lexicon",
    "ref_kl": "KL, nats",
    "distinct_2": "distinct-2",
}
"""Of movie sentences."""


def write_report(results: Results, out: Path) -> Path:
    """Write baselines.md, .csv, .json and pictures; return the first's path."""
    movies = [r for r in results if r["task"] == MOVIES]
    longer = [r for r in results if r["task"] == OVER_OPTIMISATION]
    small = [r for r in results if r["task"] not in (MOVIES, OVER_OPTIMISATION)]
    tasks = list(dict.fromkeys(r["task"] for r in small))
    scores = {task: finals(small, task) for task in tasks}
    parts = ["# Baselines", f"{len(results)} runs. Machine: {machine(1)} (one thread a run)."]
    if small:
        parts += [table(small, scores), NOTE]
        parts.append("![learning curves](baselines.png)")
        draw_curves(small, tasks, out / "baselines.png")
        if draw_summary(comparable(small, scores), out / "baselines-all.png"):
            parts.append("![all tasks](baselines-all.png)")
    if movies:
        errors = [p["judge_error"] for r in movies for p in r["points"] if "judge_error" in p]
        prompts = movies[0]["settings"]["task"]["n_prompts"]
        note = MOVIES_NOTE.format(prompts=prompts, error=float(np.median(errors)))
        parts += ["## Movie sentences", movies_table(movies), note]
    if longer:
        parts += ["## Over-optimisation", "![scores against KL](over-optimisation.png)"]
        parts.append("One run per β; crosses are the means of the runs above.")
        draw_over_optimisation(movies, longer, out / "over-optimisation.png")
    with (out / "baselines.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [{**key(r), **point} for r in results for point in r["points"]]
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    (out / "baselines.json").write_text(json.dumps(list(results), indent=1), encoding="utf-8")
    (out / "baselines.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return out / "baselines.md"


NOTE = """`gain` is the interquartile mean over the seeds of the share of the optimal gain over the
reference (0: the reference, 1: the optimum), with a stratified bootstrap interval of 95 %. On
*letters* it is exact, of score less β·KL; `score` and `KL` (nats per completion) are exact too.
Only the Token algorithms are told of β: the others maximise the score, and a deterministic policy
can have no more than about half of that gain. So *letters* is left out of the second picture and of
`over`, the probability that a run of TokenPPO is better than one of this algorithm, mean over
tasks. `s` is the median seconds of learning, * where they ended the run."""


MOVIES_NOTE = """Means over the seeds of what is written on {prompts} test prompts after the budget,
and the lowest and highest seed in brackets. The prompts alone leave the judge a standard error of
about {error:.2f}. The reward is what all learn from: the reward model's score, less 1 where a
completion has no end; the judge and the lexicon are learned from by none. The KL to the reference,
of which only the Token algorithms are told, is exact at each state, summed over a completion; of
best-of-n it is the upper bound log n − (n − 1)/n. `over`: how often a run of TokenPPO is better
than one of this algorithm, by the judge. `tokens` is what was generated for learning, * where the
seconds ran out first."""


def key(result: dict[str, Any]) -> dict[str, Any]:
    """Return what names a run."""
    return {name: result[name] for name in ("task", "algorithm", "seed", "candidate")}


def finals(results: Results, task: str) -> dict[str, np.ndarray]:
    """Return each algorithm's gains at the end of its runs on a task, (runs,)."""
    found: dict[str, list[float]] = {}
    for result in results:
        if result["task"] == task:
            found.setdefault(result["algorithm"], []).append(result["points"][-1]["gain"])
    return {name: np.array(gains) for name, gains in found.items()}


def comparable(
    results: Results, scores: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """Leave out tasks whose objective not all algorithms are told of."""
    exact = {r["task"] for r in results if "ref_kl" in r["points"][-1]}
    return {task: found for task, found in scores.items() if task not in exact}


def table(results: Results, scores: dict[str, dict[str, np.ndarray]]) -> str:
    """Format the figures at the end of the runs as Markdown."""
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    exact = {r["task"] for r in results if "ref_kl" in r["points"][-1]}
    heads = []
    for task in scores:
        heads += [f"{task}: gain", *(["score", "KL"] if task in exact else []), "s"]
    lines = ["| | " + " | ".join([*heads, "over"]) + " |", "|---|" + "---|" * (len(heads) + 1)]
    for name in names:
        cells = []
        for task, found in scores.items():
            runs = [r for r in results if r["task"] == task and r["algorithm"] == name]
            last = [run["points"][-1] for run in runs]
            if not last:
                cells += [""] * (4 if task in exact else 2)
                continue
            cells.append(interval(found[name]))
            if task in exact:
                cells += [f"{np.median([p[key] for p in last]):.2f}" for key in ("score", "ref_kl")]
            stopped = any(0 < r["points"][-1]["tokens"] < r["tokens"] for r in runs)
            seconds = f"{np.median([p['seconds'] for p in last]):.0f}"
            cells.append(seconds + "*" * stopped)
        cells.append(improvement(comparable(results, scores), name))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def movies_table(results: Results) -> str:
    """Format what is written on movie sentences at the end of the runs as Markdown."""
    lines = ["| | " + " | ".join([*MEASURES.values(), "over", "tokens", "s"]) + " |"]
    lines.append("|---|" + "---|" * (len(MEASURES) + 3))
    rows: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        name, points = result["algorithm"], result["points"]
        if name.startswith("best of "):
            rows |= {f"best of {p['n']}": [p] for p in points if p["n"] in (4, 16, 64)}
        else:
            rows.setdefault(name, []).append(points[-1])
    judged = {name: np.array([[p["judge"]] for p in last]) for name, last in rows.items()}
    for name, last in rows.items():
        cells = [
            spread([p[measure] for p in last]) if measure in last[0] else "" for measure in MEASURES
        ]
        over = ""
        if name != "TokenPPO" and "TokenPPO" in judged:
            over = f"{probability_of_improvement(judged['TokenPPO'], judged[name]):.2f}"
        budget = next(r["tokens"] for r in results)
        stopped = any(0 < p["tokens"] < budget for p in last)
        cells += [over, f"{np.median([p['tokens'] for p in last]):.0f}" + "*" * stopped]
        cells.append(f"{np.median([p['seconds'] for p in last]):.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Format the mean of a few runs, and the lowest and the highest."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def interval(gains: np.ndarray) -> str:
    """Format an interquartile mean with its interval, where there are several runs."""
    if len(gains) == 1:
        return f"{gains[0]:.2f}"
    low, high = bootstrap_interval(gains[:, None])
    return f"{interquartile_mean(gains):.2f} [{low:.2f}, {high:.2f}]"


def improvement(scores: dict[str, dict[str, np.ndarray]], name: str) -> str:
    """Format the probability that TokenPPO is better than an algorithm, over common tasks."""
    common = [found for found in scores.values() if name in found and "TokenPPO" in found]
    if name == "TokenPPO" or not common:
        return ""
    each = [
        probability_of_improvement(found["TokenPPO"][:, None], found[name][:, None])
        for found in common
    ]
    return f"{np.mean(each):.2f}"


def draw_curves(results: Results, tasks: Sequence[str], path: Path) -> None:
    """Draw the gain against tokens and against seconds, with bands from worst to best seed."""
    colours = dict(zip(CURVES, plt.colormaps["tab10"].colors, strict=False))
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(4.2 * len(tasks), 6.4), layout="constrained", squeeze=False
    )
    for column, task in enumerate(tasks):
        for row, unit in enumerate(("tokens", "seconds")):
            axis = axes[row][column]
            for name, colour in colours.items():
                runs = [
                    r["points"] for r in results if r["task"] == task and r["algorithm"] == name
                ]
                if not runs:
                    continue
                n = min(len(points) for points in runs)
                x = np.median([[p[unit] for p in points[:n]] for points in runs], axis=0)
                y = np.array([[p["gain"] for p in points[:n]] for points in runs])
                style = {"color": colour, "linewidth": 2 if name in OURS else 1.2}
                style["linestyle"] = "-" if name in OURS else "--"
                axis.plot(x, [interquartile_mean(gains) for gains in y.T], label=name, **style)
                axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.1)
            level = finals(results, task).get("best of 16")
            if level is not None:
                axis.axhline(level[0], color="black", linestyle=":", label="best of 16")
            axis.set(title=task if row == 0 else "", xlabel=unit, ylim=(-1, 1.05))
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel("share of the optimal gain")
        axes[1][0].set_ylabel("share of the optimal gain")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_summary(scores: dict[str, dict[str, np.ndarray]], path: Path) -> bool:
    """Draw the interquartile means over all tasks, and the performance profiles, if there are any.

    Returns:
        Whether there were: one run each tells nothing of chance.
    """
    names = [
        name
        for name in dict.fromkeys(name for found in scores.values() for name in found)
        if all(name in found and len(found[name]) > 1 for found in scores.values())
    ]
    if not names:
        return False
    runs = min(len(found[name]) for found in scores.values() for name in names)
    stacked = {
        name: np.stack([found[name][:runs] for found in scores.values()], axis=1) for name in names
    }
    order = sorted(names, key=lambda name: interquartile_mean(stacked[name]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for height, name in enumerate(order):
        low, high = bootstrap_interval(stacked[name])
        colour = "#1f5fa8" if name in OURS else "#8a93a0"
        left.barh(height, high - low, left=low, color=colour, alpha=0.45)
        left.plot(
            [interquartile_mean(stacked[name])] * 2, [height - 0.4, height + 0.4], color=colour
        )
    left.set_yticks(range(len(order)), order)
    left.set(xlabel="share of the optimal gain, interquartile mean and 95 % interval")
    thresholds = np.linspace(-0.1, 1, 111)
    colours = dict(zip(CURVES, plt.colormaps["tab10"].colors, strict=False))
    for name in (name for name in CURVES if name in stacked):
        share = performance_profile(stacked[name], thresholds)
        line = "-" if name in OURS else "--"
        right.plot(thresholds, share, label=name, color=colours[name], linestyle=line)
    right.set(xlabel="share of the optimal gain, τ", ylabel="share of runs above τ")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def draw_over_optimisation(movies: Results, longer: Results, path: Path) -> None:
    """Draw score, judge, lexicon and variety against the KL: as runs go on, and for best of n.

    Of the shorter runs, those with a better reward than the reference's are shown.
    """
    figure, grid = plt.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    axes = grid.flat
    best_of = [r["points"] for r in movies if r["algorithm"].startswith("best of ")]
    ended: dict[str, list[dict[str, float]]] = {}
    for result in movies:
        if result["points"][-1]["tokens"] > 0:
            ended.setdefault(result["algorithm"], []).append(result["points"][-1])
    at_start = max(result["points"][0]["reward"] for result in longer)
    better = {
        name: last
        for name, last in ended.items()
        if np.mean([point["reward"] for point in last]) > at_start
    }
    colours = plt.colormaps["viridis"](np.linspace(0, 0.85, len(longer)))
    for axis, measure in zip(axes, TITLES, strict=True):
        for result, colour in zip(longer, colours, strict=True):
            points = result["points"]
            x, y = (
                [max(p[m], 0.0) if m == "ref_kl" else p[m] for p in points]
                for m in ("ref_kl", measure)
            )
            axis.plot(x, y, "o-", color=colour, markersize=4, label=result["algorithm"])
        for points in best_of:
            if measure not in points[-1]:
                continue
            x, y = ([p[m] for p in points] for m in ("ref_kl", measure))
            axis.plot(x, y, "k.:", label=f"best of 1 to {points[-1]['n']}")
        for name, last in better.items():
            place = tuple(float(np.mean([p[m] for p in last])) for m in ("ref_kl", measure))
            axis.plot(*place, "x", color="#8a93a0")
            far = place[0] > 20  # the name is to stay within the picture
            near = {"xytext": (-5 if far else 5, 3), "textcoords": "offset points"}
            near["ha"] = "right" if far else "left"
            axis.annotate(name, place, fontsize=7, color="#5a6370", **near)
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        axis.set(xlabel="KL to the reference, nats per completion (√ scale)", title=TITLES[measure])
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


TITLES = {
    "reward": "the reward that is learned from",
    "judge": "the judge, never learned from",
    "lexicon": "sentiment words",
    "distinct_2": "distinct-2: how varied the texts are",
}
