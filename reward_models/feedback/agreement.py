"""How far people agree with each other, and what their answers say; pure functions of answers."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from reward_models.feedback.tasks import Answer, Kind, Task


class Share(NamedTuple):
    """A share and its 95 % interval (Wilson 1927).

    Args:
        share: NaN if `n` is 0.
        low: the interval's lower end.
        high: the interval's upper end.
        n: of how many.
    """

    share: float
    low: float
    high: float
    n: int


class WinRate(NamedTuple):
    """How often one origin's completions were preferred to another's.

    Args:
        origin: the one.
        against: the other.
        rate: share of the tasks that it won, ties counting half; where several people answered,
            the mean of their answers.
    """

    origin: str
    against: str
    rate: Share


class Disagreement(NamedTuple):
    """A task that people answered differently.

    Args:
        task: the question.
        spread: mean difference of two answers, from 0 to 1 (first against second, the scale's one
            end against the other).
        answers: all answers to it.
    """

    task: Task
    spread: float
    answers: tuple[Answer, ...]


def krippendorff_alpha(answers: Iterable[Answer], kind: Kind) -> float:
    """Krippendorff's alpha: 1 is agreement, 0 chance; NaN if it is not defined.

    Ratings by interval distance, on their scale's unit; comparisons and labels as nominal.
    Needs the extra `feedback` (nltk).
    """
    ...


def pairwise_agreement(answers: Iterable[Answer], kind: Kind) -> Share:
    """Share of the pairs of answers to one task that are the same."""
    ...


def gold_accuracy(answers: Iterable[Answer], tolerance: float = 1) -> dict[str, Share]:
    """Share of right answers to questions with a known answer, by annotator.

    A rating is right if it is at most `tolerance` away.
    """
    ...


def win_rates(answers: Iterable[Answer]) -> list[WinRate]:
    """Win rate for each two origins that were compared, by name."""
    ...


def position_bias(answers: Iterable[Answer]) -> Share:
    """Share of the comparisons, ties left out, in which the left one was chosen; 0.5 is fair."""
    ...


def disagreements(answers: Iterable[Answer], most: int = 20) -> list[Disagreement]:
    """Tasks whose answers differ, those that differ most first."""
    ...


def answers_per_day(answers: Iterable[Answer]) -> dict[tuple[str, str], int]:
    """Number of answers by annotator and day (UTC, ISO 8601), in that order."""
    ...


def median_seconds(answers: Iterable[Answer]) -> dict[str, float]:
    """Median time for an answer by annotator, in seconds."""
    ...
