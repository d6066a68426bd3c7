"""Hand-written scores of a text (length, repetition, sentiment words) and their text statistics.

Words here are what a reader would count: runs of letters and digits, and each Chinese character
by itself. Metrics that compare with a reference text (BLEU, ROUGE) are not here.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{HAN}]|(?:(?![{HAN}])[^\W_])+(?:['’](?:(?![{HAN}])[^\W_])+)*")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; a Chinese character is a word."""
    return _WORD.findall(text.lower())


def repetition(text: str, n: int = 3) -> float:
    """Share of a text's word n-grams that occurred before in it.

    Returns:
        From 0 (all differ, or fewer than two n-grams) to almost 1.

    Source: `seq-rep-n` of Welleck et al. 2020, Neural Text Generation with Unlikelihood Training.
    """
    ngrams = _ngrams(text, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Number of different word n-grams in all texts together, divided by the number of n-grams.

    It falls as more text is looked at, so compare only sets of about the same size.

    Returns:
        From almost 0 to 1; 0 if no text is long enough.

    Source: Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation
    Models.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"expected n-grams of at least one word, got n = {n}")
    tokens = words(text)
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


class LengthReward:
    """Scores a completion's length in words: 0 between `low` and `high`, below 0 outside.

    The score falls by 1 for every `width` words that are missing or too many.

    Args:
        low: fewest words that cost nothing.
        high: most words that cost nothing; none if there is no upper end.
        width: words outside the range that cost one point.

    Raises:
        ValueError: if the range is empty or the width is not positive.
    """

    def __init__(self, low: int = 0, high: int | None = None, width: float = 10.0) -> None:
        if low < 0 or (high is not None and high < low) or not width > 0:
            raise ValueError(
                "expected 0 <= low <= high and width > 0, "
                f"got low = {low}, high = {high}, width = {width}"
            )
        self.low = low
        self.high = math.inf if high is None else high
        self.width = width

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion, at most 0; see `RewardFunction`."""
        counts = np.array([len(words(text)) for text in completions], dtype=float)
        outside = np.maximum(self.low - counts, 0) + np.maximum(counts - self.high, 0)
        return -outside / self.width


class RepetitionPenalty:
    """Scores 0 for a completion without repeated word n-grams, down to almost -1.

    Args:
        n: words per n-gram.
    """

    def __init__(self, n: int = 3) -> None:
        self.n = n

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion, from -1 to 0; see `RewardFunction`."""
        return -np.array([repetition(text, self.n) for text in completions], dtype=float)


class LexiconSentiment:
    """Scores a text (prompt and completion) by the valences of its words.

    The sum x of the valences is squashed to x / sqrt(x² + 15), from -1 to 1. Negation ("not
    good"), emphasis and emoticons are not understood: it is a yardstick that owes nothing to a
    learned model, not a good judge.

    Args:
        lexicon: valence by word in lower case, or a file of lines `word<TAB>valence[<TAB>…]`.

    Raises:
        ValueError: if a line of the file has no valence.

    Source: the normalisation is that of Hutto & Gilbert 2014 (VADER), ICWSM.
    """

    def __init__(self, lexicon: Mapping[str, float] | str | os.PathLike[str]) -> None:
        self.valence = dict(lexicon) if isinstance(lexicon, Mapping) else _read_lexicon(lexicon)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each text, from -1 to 1; see `RewardFunction`."""
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        sums = np.array(
            [sum(self.valence.get(word, 0.0) for word in words(text)) for text in texts],
            dtype=float,
        )
        return sums / np.sqrt(sums**2 + 15)


def _read_lexicon(path: str | os.PathLike[str]) -> dict[str, float]:
    valence = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                word, value = line.rstrip("\n").split("\t")[:2]
                valence[word.lower()] = float(value)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: expected 'word<TAB>valence', got {line.strip()!r}"
                ) from error
    return valence
