"""Can a reward be learned from? Finite, one score a text whatever stands beside it, and spread.

A reward is any callable of texts (`reward_fn(prompts=, completions=, **columns)`): whose, and how
it scores, is not known here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agents.checks import Verdict

RewardFn = Callable[..., Any]
Columns = Mapping[str, Sequence[Any]]

ODD_TEXTS = ("", " ", "\n", "a" * 2000, "!!!???...", "很好的电影。", "\N{PARTY POPPER}\N{SNOWMAN}")
"""What a policy writes sooner or later: nothing at all, one letter for ever, other scripts."""

SINGLY = 16
"""Texts that are scored one by one."""


NOT_FINITE = "not checked: it needs finite scores"


def scores_of(
    reward_fn: RewardFn, prompts: Sequence[str], completions: Sequence[str], columns: Columns
) -> np.ndarray:
    """Score some completions; return float64 (B,), finite or not.

    Raises:
        ValueError: If there is not one number for each.
    """
    named = {key: list(values) for key, values in columns.items()}
    answer = reward_fn(prompts=list(prompts), completions=list(completions), **named)
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise ValueError(
            f"expected a sequence of {len(completions)} numbers, got {type(answer).__name__}"
        )
    if len(values) != len(completions):
        raise ValueError(
            f"expected {len(completions)} scores, one per completion, got {len(values)}"
        )
    try:
        if any(isinstance(value, str) for value in values):  # float("1") would take it
            raise TypeError
        return np.array([float(value) for value in values])
    except (TypeError, ValueError):
        raise ValueError(f"expected numbers, got {list(values[:3])!r}") from None


def check_finite(
    reward_fn: RewardFn, prompts: Sequence[str], completions: Sequence[str], columns: Columns
) -> Verdict:
    """Every text gets one finite number: the policy's samples, and odd ones."""
    name, n_odd = "reward finite", len(ODD_TEXTS)
    odd = {key: [values[0]] * n_odd for key, values in columns.items()}
    parts = (
        ("sampled completion", prompts, completions, columns),
        ("odd text", [prompts[0]] * n_odd, ODD_TEXTS, odd),
    )
    for what, before, texts, further in parts:
        scores = scores_of(reward_fn, before, texts, further)
        if not np.isfinite(scores).all():
            i = int(np.flatnonzero(~np.isfinite(scores))[0])
            said = (
                f"the score of the {what} {shorten(texts[i])} is {scores[i]}: a run would stop "
                "there; give such texts a finite score"
            )
            return Verdict(name, "wrong", said, {"score": float(scores[i])})
    said = f"{len(completions)} samples and {n_odd} odd texts (empty, endless, other scripts)"
    return Verdict(name, "ok", f"{said} have one finite score each")


def check_batch(
    reward_fn: RewardFn, prompts: Sequence[str], completions: Sequence[str], columns: Columns
) -> Verdict:
    """A text's score does not depend on when it is asked for, its neighbours, or its place."""
    name = "reward in batches"

    def scored(rows: Sequence[int]) -> np.ndarray:
        further = {key: [values[i] for i in rows] for key, values in columns.items()}
        before, texts = [prompts[i] for i in rows], [completions[i] for i in rows]
        return scores_of(reward_fn, before, texts, further)

    everyone = list(range(len(completions)))
    some = everyone[:: max(1, len(everyone) // SINGLY)][:SINGLY]
    together = scored(everyone)
    if not np.isfinite(together).all():
        return Verdict(name, "look", NOT_FINITE)
    spread = max(float(together.std()), 1e-3 * float(np.abs(together).max()), 1e-9)
    ways = {
        "asked twice": scored(everyone) - together,
        "in reverse order": scored(everyone[::-1])[::-1] - together,
        "alone": np.concatenate([scored([i]) for i in some]) - together[some],
    }
    figures = {way: float(np.abs(errors).max()) for way, errors in ways.items()}
    for way, errors in ways.items():
        error = figures[way]
        if error <= 1e-3 * spread:
            continue
        rows = some if way == "alone" else everyone
        text = shorten(completions[rows[int(np.abs(errors).argmax())]])
        told = (
            f"{way}, a score changes by up to {error:.2g} (all vary by {spread:.2g}), {text} most"
        )
        if error <= 0.05 * spread:
            said = f"{told}: rounding, probably"
            return Verdict(name, "look", said, figures)
        why = {
            "asked twice": "the reward is random; dropout may be on",
            "in reverse order": "it depends on the order of the batch",
            "alone": "it depends on the rest of the batch, by padding or normalisation",
        }[way]
        return Verdict(name, "wrong", f"{told}: {why}", figures)
    said = "scores are the same asked twice, in reverse order, and one by one"
    return Verdict(name, "ok", said, figures)


def check_spread(
    reward_fn: RewardFn, prompts: Sequence[str], completions: Sequence[str], columns: Columns
) -> Verdict:
    """Different completions get different scores, those of one prompt too."""
    name = "reward spread"
    scores = scores_of(reward_fn, prompts, completions, columns)
    if not np.isfinite(scores).all():
        return Verdict(name, "look", NOT_FINITE)
    n, total = len(scores), float(scores.std())
    values, counts = np.unique(scores, return_counts=True)
    figures = {"mean": float(scores.mean()), "sd": total, "distinct": float(len(values))}
    if total <= 1e-6 * max(1.0, abs(figures["mean"])):
        said = (
            f"all {n} samples score {scores[0]:.3g}: there is no difference to learn from. Let the "
            "reward tell these texts apart, or warm-start the model so that some succeed"
        )
        return Verdict(name, "wrong", said, figures)
    by_prompt: dict[str, list[float]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        by_prompt.setdefault(prompt, []).append(float(score))
    groups = [group for group in by_prompt.values() if len(group) > 1]
    told = f"{n} samples score {figures['mean']:.3g} on average, with a deviation of {total:.2g}"
    if groups:
        figures["sd within prompts"] = float(np.sqrt(np.mean([np.var(g, ddof=1) for g in groups])))
        if figures["sd within prompts"] < 0.01 * total:
            said = (
                f"{told}, but completions of one prompt score alike: the score is the prompt's, "
                "and the completion changes nothing"
            )
            return Verdict(name, "look", said, figures)
        told += f" ({figures['sd within prompts']:.2g} within a prompt)"
    if counts.max() > 0.9 * n:
        said = f"{told}, but {counts.max()} of {n} score {values[counts.argmax()]:.3g} exactly"
        return Verdict(name, "look", f"{said}: rewards this rare are hard to learn from", figures)
    return Verdict(name, "ok", told, figures)


def shorten(text: str, longest: int = 40) -> str:
    """Quote a text's beginning."""
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")
