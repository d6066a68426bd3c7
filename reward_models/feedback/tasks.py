"""What people are asked about texts, and what they answer, in memory and as JSON lines.

Which task goes to whom is decided by the store. Sampling completions from a policy is not done
here: whoever has the samples hands them over as text.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

Kind = Literal["comparison", "rating", "label"]

Choice = Literal["first", "second", "tie"]
"""The answer to a comparison, in the task's own order whatever the order on the screen was."""

AnswerValue = str | float | bool
"""A `Choice` for a comparison, a number for a rating, true (good) or false (bad) for a label."""

_SWAPPED: dict[AnswerValue, AnswerValue] = {"first": "second", "second": "first", "tie": "tie"}


@dataclass(frozen=True)
class Task:
    """One question to a person.

    Args:
        kind: which of two completions is better, how good one is on a scale, or whether it is
            good at all.
        prompt: the text's beginning.
        completions: two different ones for a comparison, else one.
        origins: where each completion is from, a policy's folder for instance; empty if unknown.
            It is never shown to the person who answers.
        scale: the lowest and the highest possible rating, whole numbers; other kinds ignore it.
        gold: the right answer where it is known, to measure annotators by.
        uncertainty: how unsure the reward model is; of two tasks the higher one is asked first.
    """

    kind: Kind
    prompt: str
    completions: tuple[str, ...]
    origins: tuple[str, ...] = ()
    scale: tuple[int, int] = (1, 5)
    gold: AnswerValue | None = None
    uncertainty: float | None = None

    def __post_init__(self) -> None: ...

    def swapped(self) -> "Task":
        """The same comparison with its completions in the other order."""
        ...

    def check(self, answer: object) -> AnswerValue:
        """Give the answer back if it is one to this task.

        Raises:
            ValueError: if it is not.
        """
        ...


@dataclass(frozen=True)
class Assignment:
    """A task that was given to a person and is not answered yet.

    Args:
        id: what an answer to it must name.
        task: the question, its completions in the task's own order.
        annotator: pseudonym of the person.
        swapped: whether the second completion is shown first.
    """

    id: int
    task: Task
    annotator: str
    swapped: bool

    @property
    def shown(self) -> tuple[str, ...]:
        """The completions in the order in which this person sees them: left before right."""
        completions = self.task.completions
        return completions[::-1] if self.swapped else completions


@dataclass(frozen=True)
class Answer:
    """What one person said about one task.

    Args:
        task_id: the task's number in its store; answers to one task share it.
        task: the question, its completions in the task's own order.
        annotator: pseudonym of the person.
        answer: in the task's own order.
        swapped: whether the second completion was shown first; None if that is not known because
            the answer was imported.
        seconds: how long it took; None if it is not known.
        time: when, ISO 8601; None if it is not known.
    """

    task_id: int
    task: Task
    annotator: str
    answer: AnswerValue
    swapped: bool | None = None
    seconds: float | None = None
    time: str | None = None


def tasks_from_jsonl(path: str | os.PathLike[str], kind: Kind) -> list[Task]:
    """Read tasks from a JSON lines file.

    A line is `{"prompt", "completions": [...]}`, `{"prompt", "completion"}` or, for comparisons,
    `{"prompt", "chosen", "rejected"}` (asked anew: the choice in the file is not shown and is no
    gold). More completions than a task takes make several tasks, as in `tasks_from_completions`.
    `origins` (one per completion), `gold`, `scale` and `uncertainty` may stand beside them;
    a missing `prompt` is the empty one, and other keys are passed over.

    Raises:
        ValueError: if a line is not a task; the message begins with file and line number.
    """
    ...


def tasks_from_completions(
    completions: Mapping[str, Sequence[str]], kind: Kind = "comparison", origin: str | None = None
) -> list[Task]:
    """Make tasks of several samples for each prompt.

    Equal samples count once. For comparisons the first is paired with the second, the third with
    the fourth and so on; one that is left over is not asked about. Other kinds ask about each.

    Args:
        completions: samples by prompt.
        kind: of the tasks.
        origin: where the samples are from.
    """
    ...


def tasks_side_by_side(
    first: Mapping[str, Sequence[str]],
    second: Mapping[str, Sequence[str]],
    origins: tuple[str, str],
) -> list[Task]:
    """Make comparisons of two policies' samples for the same prompts, in pairs as they come.

    Pairs of equal samples have nothing to choose between and are left out.

    Raises:
        ValueError: if the prompts, or the numbers of samples for one, differ.
    """
    ...
