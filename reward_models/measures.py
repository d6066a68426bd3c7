"""Writers side by side: what is measured on the texts of each, and the tables of a report.

A writer's texts come as episodes: dicts with `prompt`, `completion`, `n_tokens`, `finish_reason`
(the environment's final info) and `ref_kl`, nats. Who writes, and what scores, is not known here.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from reward_models.evaluation import jackknife_interval, mean_interval, share_interval
from reward_models.references import self_bleu
from reward_models.terms import distinct_n, repetition

Episodes = Sequence[Mapping[str, Any]]
Measured = dict[str, list[float]]
"""By key, a figure with its 95 % interval: [value, low, high]."""

LIKELIHOOD = "log-likelihood"
"""The key of texts' mean log-likelihoods per token, nats, which are told as perplexity."""

MEASURES = {
    "score": "score (the reward)",
    "judge": "judge",
    "lexicon": "lexicon sentiment",
    "perplexity": "perplexity under the {reference} (geometric mean of texts)",
    "ref_kl": "KL to the {reference} (nats per completion)",
    "tokens": "length (tokens)",
    "ended": "ended by itself (share)",
    "distinct-1": "distinct-1",
    "distinct-2": "distinct-2",
    "self-bleu": "self-BLEU",
    "repetition": "repeated 3-grams (share)",
}
"""How a table calls what is measured; other scores are called by their keys."""


def measures(episodes: Episodes, scores: Mapping[str, np.ndarray]) -> Measured:
    """Measure a writer on its episodes; self-BLEU only where sacrebleu is installed.

    Args:
        episodes: B of them.
        scores: by the scorer's key, (B,).
    """
    texts = [episode["completion"] for episode in episodes]
    found = {key: mean_interval(values) for key, values in scores.items()}
    if LIKELIHOOD in found:
        mean, low, high = found.pop(LIKELIHOOD)
        found["perplexity"] = [math.exp(-mean), math.exp(-high), math.exp(-low)]
    found["ref_kl"] = mean_interval(np.array([e["ref_kl"] for e in episodes]))
    found["tokens"] = mean_interval(np.array([e["n_tokens"] for e in episodes]))
    ended = sum(e["finish_reason"] != "length" for e in episodes)
    found["ended"] = share_interval(ended, len(episodes))
    for n in (1, 2):
        found[f"distinct-{n}"] = jackknife_interval(partial(distinct_n, n=n), texts)
    if importlib.util.find_spec("sacrebleu") is not None:
        found["self-bleu"] = mean_interval(self_bleu(texts))
    found["repetition"] = mean_interval(np.array([repetition(text) for text in texts]))
    return found


def measures_table(found: Mapping[str, Measured], reference: str = "warm start") -> str:
    """Format the measures of all writers side by side, as Markdown.

    Args:
        found: by writer.
        reference: what the model is called that KL and perplexity are measured to.
    """
    first, *others = found.values()
    keys = [key for key in first if all(key in measured for measured in others)]
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for key in keys:
        cells = [with_interval(measured[key]) for measured in found.values()]
        name = MEASURES[key].format(reference=reference) if key in MEASURES else key
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_interval(figure: Sequence[float]) -> str:
    """Format a figure and its interval."""
    value, low, high = figure
    return f"{value:z.2f} [{low:z.2f}, {high:z.2f}]"


def samples_table(
    episodes: Mapping[str, Episodes], scores: Mapping[str, np.ndarray], key: str, n_samples: int
) -> str:
    """Show the first prompts with what each writer made of them, as Markdown.

    Args:
        episodes: by writer, each on the same prompts in the same order.
        scores: by writer, (B,).
        key: what the scores are.
        n_samples: prompts shown.
    """
    header = ["prompt"] + [cell for writer in episodes for cell in (writer, key)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for i, row in enumerate(zip(*episodes.values(), strict=True)):
        if i == n_samples:
            break
        cells = [row[0]["prompt"]]
        for writer, episode in zip(episodes, row, strict=True):
            cells += [episode["completion"], f"{scores[writer][i]:+.1f}"]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
