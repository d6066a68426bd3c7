"""What a search for settings found: a table, and a picture of its history and importances."""

from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from agents.callbacks import table
from agents.tuning import AS_THEY_WERE, Objective, trials_of

ENOUGH = 12
"""Trials from which importances are told; of fewer they would be noise."""

BLUE, GREY, RED = "#1f5fa8", "#9a9a9a", "#b5332e"


def best_of(study: optuna.Study) -> FrozenTrial | None:
    """Return the whole trial with the highest objective, None before there is one."""
    whole = [trial for trial in trials_of(study) if trial.state is TrialState.COMPLETE]
    return max(whole, key=value_of) if whole else None


def value_of(trial: FrozenTrial) -> float:
    """Return a trial's objective; of one that was pruned, the last that was reported."""
    values = trial.intermediate_values
    value = values[max(values)] if trial.value is None and values else trial.value
    return float("-inf") if value is None else value


def importances(study: optuna.Study) -> dict[str, float]:
    """Return how much each setting mattered, 0 to 1, summing to 1; empty while it can't be told.

    How far the settings of the better half of the trials differ from those of all. Pruned trials
    count, with what they had: the whole ones alone are all good, and their differences are chance.

    Source: PED-ANOVA, Watanabe et al. 2023.
    """
    known = optuna.create_study(direction="maximize")
    for trial in trials_of(study):
        value = value_of(trial)
        if trial.state.is_finished() and value > float("-inf"):
            known.add_trial(create_trial(
                params=trial.params, distributions=trial.distributions, value=value
            ))  # fmt: skip
    if len({trial.value for trial in known.trials}) < ENOUGH:
        return {}
    return get_param_importances(known, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.5))


def as_markdown(study: optuna.Study, objective: Objective, budget: str) -> str:
    """Return what was tried and what came out, best first; the picture is tune.png beside it.

    Args:
        study: The study.
        objective: What was searched for.
        budget: What a trial is, in words.
    """
    trials = sorted(trials_of(study), key=value_of, reverse=True)
    tried = [trial for trial in trials if trial.state is not TrialState.WAITING]
    weight = importances(study)
    parts = [
        "# Settings that were tried",
        f"{len(tried)} trial{'s' * (len(tried) != 1)}: {budget}. "
        f"The objective is judge − {objective.kl_weight:g} · "
        f"max(0, KL − {objective.kl_budget:g}), on held-out training prompts, the same for all; "
        "the judge's standard error stands beside it, KL is in nats per completion. A pruned trial "
        "was stopped on the way, and shows what it had then.",
        told(study),
        table([row_of(trial) for trial in tried]),
        "## What mattered",
        table([{"setting": name, "importance": share} for name, share in weight.items()])
        if weight
        else f"Told from {ENOUGH} trials on.",
        "![history and importances](tune.png)",
    ]
    return "\n\n".join(parts) + "\n"


def told(study: optuna.Study) -> str:
    """Say what the best trial is, beside the settings that the search began with."""
    best = best_of(study)
    if best is None:
        return "No trial has come to its end."
    said = f"Best: trial {best.number}, {value_of(best):+.3f}"
    for trial in trials_of(study):
        if AS_THEY_WERE in trial.user_attrs and trial.value is not None:
            said += f", where the settings as they were had {trial.value:+.3f}"
    return (
        f"{said}. As the best of several on the same prompts it is flattered by chance: what "
        "counts is `train.py evaluate`, on prompts that no trial has seen, and another seed."
    )


def row_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's line of the table."""
    known = trial.user_attrs
    value = value_of(trial)
    row: dict[str, Any] = {
        "trial": trial.number,
        "state": known.get("failed_by", trial.state.name.lower()),
        "objective": f"{value:+.3f}" if value > float("-inf") else "",
        "judge": "{score:+.2f} ± {error:.2f}".format(**known) if "score" in known else "",
        "KL": f"{known['ref_kl']:.1f}" if "ref_kl" in known else "",
        "trained": f"{known['share']:.0%}" if "share" in known else "",
        "seconds": f"{known['seconds']:.0f}" if "seconds" in known else "",
        **{name: in_short(value) for name, value in trial.params.items()},
    }
    return row


def in_short(value: object) -> str:
    """Format a setting's value."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def picture(study: optuna.Study) -> Figure:
    """Draw each trial's objective, the best so far, and the importances."""
    weight = importances(study)
    figure = Figure(figsize=(10, 4), layout="constrained")
    history, bars = figure.subplots(1, 2)
    best, line = float("-inf"), []
    for trial in trials_of(study):
        value = value_of(trial)
        if value == float("-inf"):
            continue
        whole = trial.state is TrialState.COMPLETE
        history.plot(trial.number, value, "o" if whole else "x", color=BLUE if whole else GREY)
        if whole:
            best = max(best, value)
            line.append((trial.number, best))
    if line:
        history.step(*zip(*line, strict=True), where="post", color=RED, linewidth=1)
    history.set(xlabel="trial", ylabel="objective", title="● whole  × pruned  — best so far")
    names = list(reversed(weight))
    bars.barh(names, [weight[name] for name in names], color=BLUE)
    bars.set(xlabel="importance" if weight else f"importance: from {ENOUGH} trials on")
    for axis in (history, bars):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
