"""What the dashboard shows, made ready for its template from the store's answers."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, get_args

from reward_models.feedback.agreement import (
    Disagreement,
    Share,
    WinRate,
    answers_per_day,
    disagreements,
    gold_accuracy,
    krippendorff_alpha,
    median_seconds,
    pairwise_agreement,
    position_bias,
    win_rates,
)
from reward_models.feedback.chats import Chat
from reward_models.feedback.tasks import Answer, AnswerValue, Kind

_DAYS_SHOWN = 7


class Agreement(NamedTuple):
    """How far people agree on tasks of one kind.

    Args:
        kind: of the tasks.
        alpha: Krippendorff's; None if it is not defined.
        same: share of the pairs of answers that are the same.
    """

    kind: str
    alpha: float | None
    same: Share


class Annotator(NamedTuple):
    """One person's row.

    Args:
        pseudonym: who it is.
        answers: how many in all.
        by_day: how many on each of the days shown.
        seconds: median time for one; None if it is not known.
        gold: share of right answers where the right one is known; None if there were none.
    """

    pseudonym: str
    answers: int
    by_day: list[int]
    seconds: float | None
    gold: Share | None


class Dispute(NamedTuple):
    """A task that people answered differently.

    Args:
        kind: of the task.
        prompt: its prompt.
        completions: its completions, in the task's own order.
        chat: the messages that both are made of; None if they are texts.
        votes: what was said and how often, the commonest first.
    """

    kind: str
    prompt: str
    completions: tuple[str, ...]
    chat: Chat | None
    votes: list[tuple[str, int]]


class Dashboard(NamedTuple):
    """All that the dashboard shows.

    Args:
        answers: number of answers.
        viewer: pseudonym of who looks at it.
        days: the last days on which there were answers, ISO 8601.
        annotators: a row each, by name.
        agreements: for each kind of task that was answered.
        win_rates: of origins against each other.
        left: share of the comparisons in which the left one was chosen.
        disputes: those that differ most first.
        sees_all: whether tasks that the viewer has not answered are among them.
    """

    answers: int
    viewer: str
    days: list[str]
    annotators: list[Annotator]
    agreements: list[Agreement]
    win_rates: list[WinRate]
    left: Share
    disputes: list[Dispute]
    sees_all: bool


def dashboard(answers: Sequence[Answer], viewer: str, sees_all: bool, most: int = 10) -> Dashboard:
    """The figures of these answers.

    Args:
        answers: all of them.
        viewer: pseudonym of who looks at it.
        sees_all: whether to show disagreements on tasks that the viewer has not answered; others'
            answers would sway an annotator.
        most: number of disagreements.
    """
    per_day = answers_per_day(answers)
    days = sorted({day for _, day in per_day})[-_DAYS_SHOWN:]
    seconds, gold = median_seconds(answers), gold_accuracy(answers)
    total = Counter(answer.annotator for answer in answers)
    own = {answer.task_id for answer in answers if answer.annotator == viewer}
    seen = answers if sees_all else [answer for answer in answers if answer.task_id in own]
    return Dashboard(
        answers=len(answers),
        viewer=viewer,
        days=days,
        annotators=[
            Annotator(
                pseudonym=name,
                answers=total[name],
                by_day=[per_day.get((name, day), 0) for day in days],
                seconds=seconds.get(name),
                gold=gold.get(name),
            )
            for name in sorted(total)
        ],
        agreements=_agreements(answers),
        win_rates=win_rates(answers),
        left=position_bias(answers),
        disputes=[_dispute(found) for found in disagreements(seen, most)],
        sees_all=sees_all,
    )


def _agreements(answers: Sequence[Answer]) -> list[Agreement]:
    rows = []
    for kind in get_args(Kind):
        if any(answer.task.kind == kind for answer in answers):
            alpha = krippendorff_alpha(answers, kind)
            known = None if math.isnan(alpha) else alpha
            rows.append(Agreement(kind, known, pairwise_agreement(answers, kind)))
    return rows


def _dispute(found: Disagreement) -> Dispute:
    votes = Counter(_in_words(answer.answer) for answer in found.answers)
    task = found.task
    return Dispute(task.kind, task.prompt, task.completions, task.chat, votes.most_common())


def _in_words(answer: AnswerValue) -> str:
    if isinstance(answer, bool):
        return "good" if answer else "bad"
    if isinstance(answer, str):
        return {"first": "A", "second": "B"}.get(answer, answer)
    return f"{answer:g}"
