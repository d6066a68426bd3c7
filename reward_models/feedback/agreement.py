"""How far people agree with each other, and what their answers say; pure functions of answers."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations
from statistics import fmean, median
from typing import NamedTuple

from reward_models.evaluation import share_interval
from reward_models.feedback.tasks import Answer, AnswerValue, Kind, Task


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
    """Krippendorff's alpha: 1 is agreement, 0 chance; NaN if all answers are the same or single.

    Ratings by interval distance, in units of their scale's length; comparisons and labels as
    nominal. Needs the extra `feedback` (nltk).

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability.
    """
    from nltk.metrics import binary_distance, interval_distance
    from nltk.metrics.agreement import AnnotationTask

    labelled = [
        (answer.annotator, number, answer.task.unit(answer.answer))
        for number, group in _several(answers, kind).items()
        for answer in group
    ]
    if len({label for _, _, label in labelled}) < 2:
        return float("nan")
    distance = interval_distance if kind == "rating" else binary_distance
    return float(AnnotationTask(labelled, distance).alpha())


def pairwise_agreement(answers: Iterable[Answer], kind: Kind) -> Share:
    """Share of the pairs of answers to one task that are the same.

    Several pairs from one task are not independent: the interval is too narrow there.
    """
    pairs = [
        one.answer == other.answer
        for group in _several(answers, kind).values()
        for one, other in combinations(group, 2)
    ]
    return _share(sum(pairs), len(pairs))


def gold_accuracy(answers: Iterable[Answer], tolerance: float = 1) -> dict[str, Share]:
    """Share of right answers to questions with a known answer, by annotator.

    A rating is right if it is at most `tolerance` away.
    """
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        if answer.task.gold is not None:
            right[answer.annotator].append(_is_right(answer, answer.task.gold, tolerance))
    return {name: _share(sum(right[name]), len(right[name])) for name in sorted(right)}


def win_rates(answers: Iterable[Answer]) -> list[WinRate]:
    """Win rate for each two origins that were compared, by name."""
    scores: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for group in _by_task(answers, "comparison").values():
        origins = group[0].task.origins
        if len(set(origins)) == 2:
            score = fmean(answer.task.unit(answer.answer) for answer in group)
            if origins[0] > origins[1]:
                origins, score = origins[::-1], 1 - score
            scores[origins[0], origins[1]].append(score)
    return [
        WinRate(origin, against, _share(sum(won), len(won)))
        for (origin, against), won in sorted(scores.items())
    ]


def with_equal_pairs(rate: Share, equal: int, pairs: int) -> Share:
    """A win rate among pairs of which some are equal, which people are not asked: half a win each.

    Args:
        rate: of the tasks that people answered, a sample of the pairs that differ.
        equal: number of equal pairs.
        pairs: number of all pairs.

    Returns:
        The rate among all of them; its `n` is still the number of tasks answered.
    """
    if equal == pairs:
        return Share(0.5, 0.5, 0.5, rate.n)
    differ = 1 - equal / pairs
    share, low, high = (differ * value + (1 - differ) / 2 for value in rate[:3])
    return Share(share, low, high, rate.n)


def position_bias(answers: Iterable[Answer]) -> Share:
    """Share of the comparisons, ties left out, in which the left one was chosen; 0.5 is fair.

    Answers whose order on the screen is not known are passed over.
    """
    left = [
        (answer.answer == "first") != answer.swapped
        for answer in answers
        if answer.task.kind == "comparison"
        and answer.answer != "tie"
        and answer.swapped is not None
    ]
    return _share(sum(left), len(left))


def disagreements(answers: Iterable[Answer], most: int = 20) -> list[Disagreement]:
    """Tasks whose answers differ, those that differ most first."""
    found = []
    for group in _several(answers).values():
        task = group[0].task
        units = [task.unit(answer.answer) for answer in group]
        spread = fmean(abs(one - other) for one, other in combinations(units, 2))
        if spread > 0:
            found.append(Disagreement(task, spread, tuple(group)))
    return sorted(found, key=lambda item: (-item.spread, -len(item.answers)))[:most]


def answers_per_day(answers: Iterable[Answer]) -> dict[tuple[str, str], int]:
    """Number of answers by annotator and day (ISO 8601, UTC for our own), in that order.

    Answers whose time is not known count under the day "".
    """
    counts = Counter((answer.annotator, (answer.time or "")[:10]) for answer in answers)
    return dict(sorted(counts.items()))


def median_seconds(answers: Iterable[Answer]) -> dict[str, float]:
    """Median time for an answer by annotator, in seconds."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for answer in answers:
        if answer.seconds is not None:
            seconds[answer.annotator].append(answer.seconds)
    return {name: median(seconds[name]) for name in sorted(seconds)}


def _by_task(answers: Iterable[Answer], kind: Kind | None = None) -> dict[int, list[Answer]]:
    groups: defaultdict[int, list[Answer]] = defaultdict(list)
    for answer in answers:
        if kind in (None, answer.task.kind):
            groups[answer.task_id].append(answer)
    return groups


def _several(answers: Iterable[Answer], kind: Kind | None = None) -> dict[int, list[Answer]]:
    """Answers by task where there are two or more."""
    return {number: group for number, group in _by_task(answers, kind).items() if len(group) > 1}


def _is_right(answer: Answer, gold: AnswerValue, tolerance: float) -> bool:
    if answer.task.kind != "rating":
        return answer.answer == gold
    return abs(float(answer.answer) - float(gold)) <= tolerance


def _share(count: float, n: int) -> Share:
    share, low, high = share_interval(count, n)
    return Share(share, low, high, n)
