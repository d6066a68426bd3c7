"""Scores against a reference text: BLEU, chrF, ROUGE, exact match; BLEU of texts among themselves.

Each is from 0 to 1, so that weights mean the same for all. References come in a column of the
prompt set, a text or a list of texts for each completion. sacrebleu and rouge-score do the
counting, from the extra `metrics`; nothing is downloaded. What needs no reference is in `terms`.
"""

import importlib
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from reward_models.terms import HAN, words


class ReferenceMetric:
    """A reward function that sets each completion beside its references, the best of them counts.

    Args:
        column: the prompt set's column of references, each a text or a list of texts.
    """

    def __init__(self, column: str = "reference") -> None:
        self.column = column

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion, from 0 to 1; see `RewardFunction`.

        Raises:
            ValueError: if there is no such column, or a completion has no reference.
        """
        name = type(self).__name__
        if self.column not in columns:
            raise ValueError(
                f"{name}: expected the prompts to have a column {self.column!r}, got "
                f"{sorted(columns) or 'none'}; name the one with the references as `column`"
            )
        found = np.zeros(len(completions))
        for i, (text, given) in enumerate(zip(completions, columns[self.column], strict=True)):
            references = [given] if isinstance(given, str) else given
            if not _are_texts(references):
                raise ValueError(
                    f"{name}: expected a text or a list of texts as reference of the prompt "
                    f"{prompts[i]!r:.60}, got {given!r:.60}"
                )
            found[i] = min(self.compare(text.strip(), references), 1.0)  # by rounding, 1 + 4e-16
        return found

    def compare(self, completion: str, references: list[str]) -> float:
        """Score one completion, from 0 to 1."""
        raise NotImplementedError


class Bleu(ReferenceMetric):
    """BLEU of single texts: n-grams longer than the text has are left out, empty counts smoothed.

    Args:
        column: as in `ReferenceMetric`.
        tokenize: sacrebleu's tokenizer. None: `zh` where a reference has Chinese characters, else
            `13a`; the completion has no say in it.

    Raises:
        ImportError: if sacrebleu is missing (so do `ChrF`, `Rouge` and `self_bleu`).

    Source: Papineni et al. 2002; Post 2018 (sacreBLEU), as `sacrebleu.sentence_bleu`.
    """

    def __init__(self, column: str = "reference", tokenize: str | None = None) -> None:
        super().__init__(column)
        make = _needs("sacrebleu").BLEU
        names = ["13a", "zh"] if tokenize is None else [tokenize]
        self._by_name = {name: make(tokenize=name, effective_order=True) for name in names}
        self._tokenize = tokenize

    def compare(self, completion: str, references: list[str]) -> float:
        """Score one completion, from 0 to 1."""
        name = self._tokenize or ("zh" if _has_chinese(references) else "13a")
        return self._by_name[name].sentence_score(completion, references).score / 100


class ChrF(ReferenceMetric):
    """chrF: F-score (β = 2) of character n-grams up to 6; with words up to 2, chrF++.

    Args:
        column: as in `ReferenceMetric`.
        word_order: longest word n-gram counted too; 2 is chrF++.

    Source: Popović 2015, 2017; as `sacrebleu.sentence_chrf`.
    """

    def __init__(self, column: str = "reference", word_order: int = 0) -> None:
        super().__init__(column)
        self._chrf = _needs("sacrebleu").CHRF(word_order=word_order)

    def compare(self, completion: str, references: list[str]) -> float:
        """Score one completion, from 0 to 1."""
        return self._chrf.sentence_score(completion, references).score / 100


class Rouge(ReferenceMetric):
    """ROUGE: F-score of shared words (1), word pairs (2), or the longest common subsequence (L).

    rouge-score's own words are runs of a–z and 0–9, which leaves nothing of a Chinese text. So
    where a reference has other letters, words are those of `terms.words`: a Chinese character is
    one.

    Args:
        kind: which of the three.
        column: as in `ReferenceMetric`.
        stem: cut English words to their stems (Porter), as the original ROUGE can.

    Source: Lin 2004; as Google's `rouge_score`.
    """

    def __init__(
        self,
        kind: Literal["rouge1", "rouge2", "rougeL"] = "rougeL",
        column: str = "reference",
        stem: bool = False,
    ) -> None:
        super().__init__(column)
        if kind not in ("rouge1", "rouge2", "rougeL"):
            raise ValueError(f"expected rouge1, rouge2 or rougeL, got {kind!r}")
        make = _needs("rouge_score.rouge_scorer").RougeScorer
        self.kind = kind
        self._latin = make([kind], use_stemmer=stem)
        self._any = make([kind], tokenizer=_Words())

    def compare(self, completion: str, references: list[str]) -> float:
        """Score one completion, from 0 to 1."""
        other = any(c.isalpha() and not c.isascii() for text in references for c in text)
        scorer = self._any if other else self._latin
        return float(scorer.score_multi(references, completion)[self.kind].fmeasure)


class ExactMatch(ReferenceMetric):
    """1 where completion and a reference are the same but for `normal_answer`, else 0."""

    def compare(self, completion: str, references: list[str]) -> float:
        """Score one completion, 0 or 1."""
        return float(normal_answer(completion) in map(normal_answer, references))


def normal_answer(text: str) -> str:
    """An answer without case, punctuation, English articles, and blanks that mean nothing.

    Full-width forms are brought to their plain ones first (１２ is 12), Chinese punctuation goes as
    well, and so do blanks beside a Chinese character.

    Source: for English as the evaluation script of SQuAD (Rajpurkar et al. 2016).
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(c for c in text if not _is_punctuation(c))
    text = " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
    return re.sub(rf"(?<=[{HAN}]) | (?=[{HAN}])", "", text)


def self_bleu(texts: Sequence[str], most: int = 100) -> np.ndarray:
    """How like the others each text is: its BLEU with all of them as references.

    Its mean, Self-BLEU, grows with the number of texts, so compare only sets of about the same
    size. The time grows with the square of it: of more than `most` texts, at most that many at even
    distances are looked at. As it is of a set and no single text, it is not a reward function.

    Returns:
        From 0 to 1, one for each text that is looked at; none for fewer than two texts.

    Source: Zhu et al. 2018, Texygen.
    """
    texts = [text.strip() for text in texts[:: max(1, -(-len(texts) // most))]]
    if len(texts) < 2:
        return np.zeros(0)
    bleu = Bleu()
    others = ([*texts[:i], *texts[i + 1 :]] for i in range(len(texts)))
    return np.array([bleu.compare(t, rest) for t, rest in zip(texts, others, strict=True)])


METRICS: dict[str, Callable[..., ReferenceMetric]] = {
    "bleu": Bleu,
    "chrf": ChrF,
    "rouge1": lambda **given: Rouge("rouge1", **given),
    "rouge2": lambda **given: Rouge("rouge2", **given),
    "rougeL": lambda **given: Rouge("rougeL", **given),
    "exact": ExactMatch,
}
"""The metrics by the name that settings know them by."""


class _Words:
    """The words of `terms`, in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _are_texts(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(x, str) for x in value)
    )


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _has_chinese(texts: Sequence[str]) -> bool:
    return any(re.search(f"[{HAN}]", text) for text in texts)


def _needs(module: str) -> Any:
    package = module.partition(".")[0].replace("_", "-")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"expected the package {package}, which is not installed: "
            "pip install 'rlhf-gym[metrics]'"
        ) from error
