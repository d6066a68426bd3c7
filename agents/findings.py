"""What can be seen to go wrong in a run's log: each finding a pure function of what was logged.

Nothing here knows an algorithm, and nothing is measured: `agents.doctor` gathers the figures.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import rankdata

Severity = Literal["wrong", "look"]
"""`wrong`: correct code cannot give these numbers. `look`: a person should look at the run."""

Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Finding:
    """One thing that was found, said in plain words.

    Attributes:
        name: One of `CHECKS`.
        severity: `wrong` or `look`.
        value: The number that made it, in the unit that `said` gives.
        said: What was seen, with the numbers.
        advice: What to do.
        num_timesteps: Tokens written when it was first seen.
    """

    name: str
    severity: Severity
    value: float
    said: str
    advice: str
    num_timesteps: int


@dataclass(frozen=True)
class Limits:
    """From where on something is a finding.

    Trends compare the mean of the last `window` rows with that of the first, so there are none
    before twice as many. A row is a rollout, or as many rollouts as have `min_episodes`.
    """

    window: int = 3
    """Rows in a mean. One rollout's figure is mostly noise; the main job has only nine."""
    min_episodes: int = 16
    """Episodes in a row at least: a mean of fewer says little."""
    rank_correlation: float = 0.5
    """Of the figure with time, Spearman's, for a trend: a jump at one end is none."""
    score_rise: float = 0.2
    """Rise of the score that counts as one, standard deviations of a single score at the start."""
    exact_kl: float = -1e-4
    """Nats per token. A KL divergence cannot be negative; this is rounding."""
    kl_z: float = -4.0
    """Standard errors below 0 that the mean log-ratio may lie: by chance once in 30,000."""
    kl_over_target: float = 3.0
    """Times `target_ref_kl`. The controller moves slowly, and overshoots by half or so."""
    kl_per_token: float = 3.0
    """Nats: at every token the reference finds the text e^3 = 20 times less likely."""
    kl_not_worth: float = 0.5
    """Fall of score - β·KL, standard deviations of a score: learning is to raise it."""
    clip_high: float = 0.4
    """Share of tokens outside the clip range; 0.1 to 0.3 is usual."""
    still: float = 1e-5
    """Nats per token between policies before and after: ten times less than a small step."""
    entropy: float = 0.1
    """Nats per token: 98 % on one token. Also below `entropy_share`."""
    entropy_share: float = 0.2
    """Of the entropy at the start: a policy that was always sure has not collapsed."""
    repetition_rise: float = 0.1
    """Share of repeated 3-grams. Human sentences have some 0.02, and samples vary as little."""
    duplicates_rise: float = 0.1
    """Share of completions that another row wrote too."""
    short_answer: float = 10.0
    """Tokens. Shorter completions whose score rises may come to be certain and of one length: that
    is how a small task is solved."""
    length_share: float = 0.98
    """Share of completions that ran out of tokens, for "all"."""
    length_factor: float = 1.6
    """Of the mean length, up or down. Scores that like longer text move it by a third early on."""
    explained_variance: float = -0.1
    """Below 0 a constant would predict better; a value head begins at 0 and wavers by 0.05."""
    judge_noise: float = 5.0
    """Standard errors that the judge has to fall below its best, which is high by chance, too; they
    are estimated from its changes between rows."""

    def __post_init__(self) -> None:
        """Raise ValueError if no mean can be taken."""
        if self.window < 1 or self.min_episodes < 1:
            raise ValueError(
                "expected window and min_episodes of at least 1, got "
                f"{self.window} and {self.min_episodes}"
            )


@dataclass
class Seen:
    """What a run has logged so far.

    Attributes:
        rollouts: The last rollout's row: `ratio_error`, `ratio_tolerance`, `exact_kl`, `k1`, `k2`
            (nats per token), `n_tokens`, `value_only` (1 where the value learns alone).
        episodes: A row per `min_episodes` or more: `score`, `score_sd`, `judge`, `ref_kl` (nats
            per completion), `kl_coef`, `target_ref_kl`, `length` (tokens), `ran_out`,
            `repetition`, `duplicates` (shares).
        updates: A row per update: `approx_kl`, `clip_fraction`, `entropy`, `explained_variance`,
            `several_steps` (1 where the policy took more than one).
    """

    rollouts: Rows = field(default_factory=list)
    episodes: Rows = field(default_factory=list)
    updates: Rows = field(default_factory=list)


Found = tuple[float, str] | None
"""A value and what to say of it; None where nothing is wrong or nothing is known."""


# -------------------------------------------------------------------------- series and texts


def columns(rows: Rows, *keys: str) -> np.ndarray:
    """Return the values of some keys, (n_keys, n), in the rows that have all of them."""
    found = [[row[key] for key in keys] for row in rows if all(key in row for key in keys)]
    return np.array(found, dtype=float).reshape(len(found), len(keys)).T


def rank_correlation(values: np.ndarray, at_most: int = 30) -> float:
    """Return Spearman's correlation of a series (n,) with time, of at most so many block means."""
    if len(values) < 2:
        return 0.0
    blocks = np.array([part.mean() for part in np.array_split(values, min(len(values), at_most))])
    ranks = rankdata(blocks)
    if ranks.std() == 0:
        return 0.0
    return float(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1])


def ends(values: np.ndarray, window: int) -> tuple[float, float] | None:
    """Return the means of the first and the last `window` values; None if they overlap."""
    if len(values) < 2 * window:
        return None
    return float(values[:window].mean()), float(values[-window:].mean())


def score_rises(score: np.ndarray, deviation: np.ndarray, limits: Limits) -> bool:
    """Say whether a score (n,) rises by enough of what single scores vary by, (n,)."""
    if (means := ends(score, limits.window)) is None:
        return False
    unit = float(deviation[: limits.window].mean())
    enough = means[1] - means[0] >= max(limits.score_rise * unit, 1e-9)
    return enough and rank_correlation(score) >= limits.rank_correlation


_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|(?:(?![{_HAN}])\w)+")

LEAST_WORDS = 4
"""A completion of fewer words may well be written twice."""


def repetition(texts: Sequence[str]) -> float:
    """Return the mean share of a text's word 3-grams that occurred before in it.

    Chinese and Japanese characters are words.
    """
    shares = []
    for text in texts:
        words = _WORD.findall(text.lower())
        ngrams = list(zip(words, words[1:], words[2:], strict=False))
        shares.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return float(np.mean(shares)) if shares else 0.0


def duplicates(texts: Sequence[str]) -> float | None:
    """Return the share of texts that occur twice or more; None if too few have some words."""
    counts = Counter(text for text in texts if len(_WORD.findall(text)) >= LEAST_WORDS)
    total = sum(counts.values())
    if total < 8:
        return None
    return sum(n for n in counts.values() if n > 1) / total


# -------------------------------------------------------------------------------- the checks


def first_ratio(seen: Seen, limits: Limits) -> Found:
    """Log-probabilities of the rollout are not met again before the update."""
    found = columns(seen.rollouts[-1:], "ratio_error", "ratio_tolerance")
    if not found.size or found[0, 0] <= found[1, 0]:
        return None
    error, tolerance = found[:, 0]
    return error, (
        f"before any update, log-probabilities differ from the sampled ones by {error:.1e} nats "
        f"(tolerance {tolerance:.0e}): the ratio is not 1 at the start"
    )


def negative_kl(seen: Seen, limits: Limits) -> Found:
    """The divergence from the reference is below 0: exactly, or by more than chance."""
    exact = columns(seen.rollouts[-1:], "exact_kl")
    if exact.size and exact[0, 0] < limits.exact_kl:
        return exact[0, 0], f"the exact KL to the reference is {exact[0, 0]:.1e} nats per token"
    found = columns(seen.rollouts[-1:], "k1", "k2", "n_tokens")
    if not found.size:
        return None
    k1, k2, n_tokens = found[:, 0]
    # A rare token that became likely, and was not drawn, would explain a little.
    z = k1 * np.sqrt(n_tokens / max(2 * k2, 1e-12))
    if z > limits.kl_z or k1 > -max(0.01, 100 / n_tokens):
        return None
    return k1, (
        f"the mean log-ratio to the reference is {k1:.3f} nats per token over {n_tokens:.0f} "
        f"tokens, {-z:.0f} standard errors below 0"
    )


def kl_runaway(seen: Seen, limits: Limits) -> Found:
    """The policy leaves the reference faster than the score pays for."""
    found = columns(seen.episodes, "ref_kl", "length")
    if found.shape[1] < limits.window:
        return None
    kl, length = found[:, -limits.window :].mean(axis=1)
    per_token = kl / max(length, 1)
    target = columns(seen.episodes[-1:], "target_ref_kl")
    if target.size:
        if kl > limits.kl_over_target * target[0, 0]:
            return kl, f"the KL is {kl:.1f} nats per completion, the target {target[0, 0]:g}"
    elif (paid := _not_worth(seen, limits)) is not None:
        return kl, paid
    if per_token > limits.kl_per_token:
        return kl, f"the KL is {kl:.1f} nats per completion, {per_token:.1f} per token"
    return None


def _not_worth(seen: Seen, limits: Limits) -> str | None:
    """Say by how much score - β·KL has fallen, if it has, while the KL rose."""
    score, deviation, kl, coef = columns(seen.episodes, "score", "score_sd", "ref_kl", "kl_coef")
    worth = ends(score - coef * kl, limits.window)
    if worth is None or rank_correlation(kl) < limits.rank_correlation:
        return None
    gained, paid = ends(score, limits.window), ends(coef * kl, limits.window)
    assert gained is not None and paid is not None
    unit = max(float(deviation[: limits.window].mean()), 1e-9)
    if worth[0] - worth[1] < limits.kl_not_worth * unit or paid[1] <= paid[0]:
        return None
    return (
        f"the KL costs {paid[1]:.2f} in penalty (at the start {paid[0]:.2f}), and the score went "
        f"from {gained[0]:.2f} to {gained[1]:.2f}: the policy pays more than it gains"
    )


def clip_fraction_high(seen: Seen, limits: Limits) -> Found:
    """Updates are so large that many tokens leave the clip range."""
    (clipped,) = columns(seen.updates, "clip_fraction")
    if (
        len(clipped) < limits.window
        or (mean := clipped[-limits.window :].mean()) <= limits.clip_high
    ):
        return None
    return mean, f"{mean:.0%} of the tokens left the clip range in the last updates"


def clip_fraction_zero(seen: Seen, limits: Limits) -> Found:
    """Updates do next to nothing."""
    clipped, moved, several = columns(seen.updates, "clip_fraction", "approx_kl", "several_steps")[
        :, -2 * limits.window :
    ]
    if len(clipped) < 2 * limits.window or clipped.any() or not several.all():
        return None
    mean = float(np.abs(moved).mean())
    if mean > limits.still:
        return None
    return mean, (
        f"in {len(clipped)} updates no token was clipped, and the policy moved by {mean:.0e} nats "
        "per token: it does not learn"
    )


def solves_a_small_task(seen: Seen, limits: Limits) -> bool:
    """Say whether completions are short answers that score better and better."""
    length, score, deviation = columns(seen.episodes, "length", "score", "score_sd")
    short = len(length) > 0 and length[-1] < limits.short_answer
    return bool(short) and score_rises(score, deviation, limits)


def entropy_collapse(seen: Seen, limits: Limits) -> Found:
    """The policy is all but certain of every token."""
    means = ends(columns(seen.updates, "entropy")[0], limits.window)
    if means is None or means[1] >= min(limits.entropy, limits.entropy_share * means[0]):
        return None
    if solves_a_small_task(seen, limits):
        return None
    return means[1], f"the entropy fell from {means[0]:.2f} to {means[1]:.3f} nats per token"


def repetition_rises(seen: Seen, limits: Limits) -> Found:
    """Completions repeat themselves more, and score higher."""
    return _rises_with_score(
        seen, limits, "repetition", limits.repetition_rise, "3-grams that a completion repeats"
    )


def duplicates_rise(seen: Seen, limits: Limits) -> Found:
    """Rows write the same text more often, and score higher."""
    return _rises_with_score(
        seen, limits, "duplicates", limits.duplicates_rise, "completions that occur twice or more"
    )


def _rises_with_score(seen: Seen, limits: Limits, key: str, rise: float, what: str) -> Found:
    share, score, deviation = columns(seen.episodes, key, "score", "score_sd")
    means = ends(share, limits.window)
    if means is None or means[1] - means[0] < rise:
        return None
    if rank_correlation(share) < limits.rank_correlation:
        return None
    if not score_rises(score, deviation, limits):
        return None
    scores = ends(score, limits.window)
    assert scores is not None
    return means[1], (
        f"the share of {what} rose from {means[0]:.2f} to {means[1]:.2f}, while the score rose "
        f"from {scores[0]:.2f} to {scores[1]:.2f}"
    )


def eos_gone(seen: Seen, limits: Limits) -> Found:
    """Completions no longer end by themselves."""
    (ran_out,) = columns(seen.episodes, "ran_out")
    if len(ran_out) < limits.window:
        return None
    share = ran_out[-limits.window :].mean()
    if share < limits.length_share or solves_a_small_task(seen, limits):
        return None
    before = ran_out[: limits.window].mean()
    return share, (
        f"{share:.0%} of the completions ran out of tokens (at the start {before:.0%}): the policy "
        "does not end its texts"
    )


def length_drift(seen: Seen, limits: Limits) -> Found:
    """Completions get much longer or shorter."""
    (length,) = columns(seen.episodes, "length")
    means = ends(length, limits.window)
    if means is None or abs(rank_correlation(length)) < limits.rank_correlation:
        return None
    factor = max(means[1], 1e-9) / max(means[0], 1e-9)
    if 1 / limits.length_factor < factor < limits.length_factor:
        return None
    return factor, f"the mean length went from {means[0]:.1f} to {means[1]:.1f} tokens"


def explained_variance(seen: Seen, limits: Limits) -> Found:
    """Values predict returns worse than a constant."""
    (explained,) = columns(seen.updates, "explained_variance")
    if len(explained) < 2 * limits.window:
        return None
    spread = ends(columns(seen.episodes, "score_sd")[0], limits.window)
    if spread is not None and spread[1] < 0.25 * spread[0]:
        return None  # where returns hardly differ, there is little to explain
    typical = float(np.median(explained[-limits.window :]))  # one rollout may be far below 0
    if not typical < limits.explained_variance:
        return None
    return typical, (
        f"the explained variance is {typical:.2f} in the last updates: the value predicts worse "
        "than a constant would"
    )


def judge_falls(seen: Seen, limits: Limits) -> Found:
    """The judge has passed its best, and the score goes on rising."""
    judge, score, deviation = columns(seen.episodes, "judge", "score", "score_sd")
    k, n = limits.window, len(judge)
    if n < 2 * k:
        return None
    means = np.convolve(judge, np.ones(k) / k, mode="valid")  # of each k neighbours
    best = int(means[: n - 2 * k + 1].argmax())
    fall = float(means[best] - means[-1])
    # Neighbours differ by chance: of independent noise, median |x - y| = 0.954 of its deviation.
    noise = float(np.median(np.abs(np.diff(judge)))) / 0.954
    if fall <= limits.judge_noise * noise * np.sqrt(2 / k) or fall <= 1e-9:
        return None
    if rank_correlation(judge[best:]) > -limits.rank_correlation:
        return None
    unit = float(deviation[:k].mean())
    rise = float(score[-k:].mean() - score[best : best + k].mean())
    if rise < max(limits.score_rise * unit, 1e-9):
        return None
    return fall, (
        f"the judge fell from {means[best]:.2f} to {means[-1]:.2f}, while the score rose by "
        f"{rise:.2f} to {score[-k:].mean():.2f}: the policy pleases the reward model alone"
    )


def constant_score(seen: Seen, limits: Limits) -> Found:
    """All completions score the same."""
    (deviation,) = columns(seen.episodes, "score_sd")
    if len(deviation) < limits.window or deviation[-limits.window :].any():
        return None
    if solves_a_small_task(seen, limits):
        return None
    return 0.0, "all completions of the last rollouts scored the same: there is nothing to learn"


class Check(NamedTuple):
    """A finding's function, severity and advice."""

    look: Callable[[Seen, Limits], Found]
    severity: Severity
    advice: str


CHECKS: dict[str, Check] = {
    "first_ratio": Check(
        first_ratio,
        "wrong",
        "Rollout and update do not see the same policy. Run `train.py check` on the model; look "
        "for a callback that changes weights or temperature, and for dropout or batch "
        "normalisation in the model.",
    ),
    "negative_kl": Check(
        negative_kl,
        "wrong",
        "Policy and reference are not normalised alike, or tokens are not sampled from the "
        "policy. Use one temperature, one vocabulary and one set of masks for both; run "
        "`train.py check`.",
    ),
    "kl_runaway": Check(
        kl_runaway,
        "look",
        "Raise kl_coef, or set target_ref_kl; lower the learning rate. Go back to a checkpoint "
        "from before: what the reward model says of such text means little.",
    ),
    "clip_fraction_high": Check(
        clip_fraction_high,
        "look",
        "Lower the learning rate or n_epochs, or raise batch_size; target_kl stops an update "
        "that goes too far.",
    ),
    "clip_fraction_zero": Check(
        clip_fraction_zero,
        "look",
        "Raise the learning rate, and see that something learns (trainable_layers, lora) and "
        "that scores differ.",
    ),
    "entropy_collapse": Check(
        entropy_collapse,
        "look",
        "Raise kl_coef or set ent_coef to 0.01 or so; lower the learning rate. A policy that is "
        "certain tries nothing new.",
    ),
    "repetition": Check(
        repetition_rises,
        "look",
        "Read samples.jsonl: the reward model probably likes repetition. Raise kl_coef, or add "
        "RepetitionPenalty to the reward by WeightedSum.",
    ),
    "duplicates": Check(
        duplicates_rise,
        "look",
        "Read samples.jsonl: one text may have become the answer to every prompt. Raise kl_coef, "
        "use more prompts, or set ent_coef.",
    ),
    "eos_gone": Check(
        eos_gone,
        "look",
        "Raise missing_eos_penalty or max_new_tokens, lower min_new_tokens; warm-start on texts "
        "that end with EOS (pad = eos hides it from many trainers' loss). If all completions are "
        "to have one length, pass ignore=('eos_gone',).",
    ),
    "length_drift": Check(
        length_drift,
        "look",
        "See whether the score depends on length alone: LengthReward by WeightedSum, a larger "
        "kl_coef, or missing_eos_penalty hold it.",
    ),
    "explained_variance": Check(
        explained_variance,
        "look",
        "Give the value time (value_warmup), a network of its own (value_lm), or another vf_coef; "
        "with gae_lambda=1 the advantages lean on it least. TokenRLOO needs none.",
    ),
    "judge_falls": Check(
        judge_falls,
        "look",
        "Stop here, or go back to the policy at the judge's best. Raise kl_coef, use an ensemble "
        "(reward --members), or ask people about the policy's new texts (train.py loop).",
    ),
    "constant_score": Check(
        constant_score,
        "look",
        "Run `train.py check --reward`: a reward that is the same for all has no gradient. Look "
        "for empty completions, or a cut-off that all texts reach.",
    ),
}
"""All findings there are, by name."""


def examine(seen: Seen, limits: Limits, num_timesteps: int) -> list[Finding]:
    """Return all that can be found in what was logged so far, at this number of tokens."""
    found = []
    for name, check in CHECKS.items():
        result = check.look(seen, limits)
        if result is not None:
            value, said = result
            found.append(
                Finding(name, check.severity, float(value), said, check.advice, num_timesteps)
            )
    return found


def as_markdown(findings: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Say what was found in a training, an item each.

    Args:
        findings: as the doctor's file has them.
        rows: of the run's metrics, one per rollout.
    """
    lines = []
    for finding in findings:
        held = sum(bool(row.get(f"doctor/{finding['name']}")) for row in rows)
        lines.append(
            f"- **{finding['name']}** ({finding['severity']}), first at {finding['num_timesteps']} "
            f"tokens, in {held} of {len(rows)} rollouts: {finding['said']}. {finding['advice']}"
        )
    return "\n".join(lines) or f"Nothing, in {len(rows)} rollout{'s' * (len(rows) != 1)}."
