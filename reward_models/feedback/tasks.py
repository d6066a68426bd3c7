"""What people are asked about texts, and what they answer, in memory and as JSON lines.

Which task goes to whom is decided by the store. Sampling completions from a policy is not done
here: whoever has the samples hands them over as text.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, TypeGuard, get_args

from reward_models.feedback.chats import Chat, as_chat, side_by_side
from reward_models.feedback.json_lines import read_json_lines

Kind = Literal["comparison", "rating", "label"]

Choice = Literal["first", "second", "tie"]
"""The answer to a comparison, in the task's own order whatever the order on the screen was."""

AnswerValue = str | float | bool
"""A `Choice` for a comparison, a number for a rating, true (good) or false (bad) for a label."""


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
        chat: the messages that prompt and completions are made of, if they are of a chat: people
            are shown these, not the texts.
    """

    kind: Kind
    prompt: str
    completions: tuple[str, ...]
    origins: tuple[str, ...] = ()
    scale: tuple[int, int] = (1, 5)
    gold: AnswerValue | None = None
    uncertainty: float | None = None
    chat: Chat | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"expected the kind comparison, rating or label, got {self.kind!r}")
        _check_texts("prompt", [self.prompt])
        for name in ("completions", "origins"):
            object.__setattr__(self, name, _check_texts(name, getattr(self, name)))
        wanted = 2 if self.kind == "comparison" else 1
        if len(self.completions) != wanted:
            raise ValueError(
                f"expected {wanted} completion{'s' * (wanted > 1)} for a {self.kind}, "
                f"got {len(self.completions)}"
            )
        if len(set(self.completions)) < wanted:
            raise ValueError(f"expected different completions, got {self.completions[0]!r} twice")
        if self.origins and len(self.origins) != wanted:
            raise ValueError(f"expected one origin per completion, got {list(self.origins)}")
        scale = _check_scale(self.scale) if self.kind == "rating" else (1, 5)
        object.__setattr__(self, "scale", scale)
        if self.gold is not None:
            object.__setattr__(self, "gold", self.check(self.gold))
        if self.uncertainty is not None:
            if not _is_number(self.uncertainty):
                raise ValueError(f"expected a finite uncertainty, got {self.uncertainty!r}")
            object.__setattr__(self, "uncertainty", float(self.uncertainty))
        object.__setattr__(self, "chat", as_chat(self.chat, wanted))

    def swapped(self) -> "Task":
        """The same comparison with its completions in the other order."""
        return replace(
            self,
            completions=self.completions[::-1],
            origins=self.origins[::-1],
            gold=None if self.gold is None else swap_choice(self.gold),
            chat=None if self.chat is None else self.chat.swapped(),
        )

    def check(self, answer: object) -> AnswerValue:
        """Give the answer back if it is one to this task; a rating may be a mean over people.

        Raises:
            ValueError: if it is not.
        """
        if self.kind == "comparison":
            if not isinstance(answer, str) or answer not in get_args(Choice):
                raise ValueError(f"expected first, second or tie, got {answer!r}")
            return answer
        if self.kind == "label":
            if not isinstance(answer, bool):
                raise ValueError(f"expected true or false, got {answer!r}")
            return answer
        low, high = self.scale
        if not _is_number(answer) or not low <= answer <= high:
            raise ValueError(f"expected a rating from {low} to {high}, got {answer!r}")
        return int(answer) if answer == int(answer) else float(answer)

    def unit(self, answer: AnswerValue) -> float:
        """An answer to this task as a number from 0 to 1: second to first, bad to good."""
        if self.kind == "comparison":
            return {"second": 0.0, "tie": 0.5, "first": 1.0}[str(answer)]
        low, high = self.scale if self.kind == "rating" else (0, 1)
        return (float(answer) - low) / (high - low)


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

    @property
    def shown_chat(self) -> Chat | None:
        """The same as messages, if the task is of a chat."""
        chat = self.task.chat
        return chat.swapped() if self.swapped and chat is not None else chat


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


def swap_choice(answer: AnswerValue) -> AnswerValue:
    """The same choice once a comparison's completions have changed places; others stay."""
    if isinstance(answer, str):
        return {"first": "second", "second": "first"}.get(answer, answer)
    return answer


def tasks_from_jsonl(
    path: str | os.PathLike[str], kind: Kind, refused: list[str] | None = None
) -> list[Task]:
    """Read tasks from a JSON lines file.

    A line is `{"prompt", "completions": [...]}`, `{"prompt", "completion"}` or, for comparisons,
    `{"prompt", "chosen", "rejected"}` (asked anew: the choice in the file is not shown and is no
    gold). More completions than a task takes make several tasks, as in `tasks_from_completions`,
    and equal ones none. `origins` (one per completion), `gold`, `scale`, `uncertainty` and `chat`
    (see `as_chat`) may stand beside them; a missing `prompt` is the empty one, and other keys are
    passed over.

    Args:
        path: the file.
        kind: of the tasks.
        refused: a list that gets "file, line N: reason" for each bad line, which is then passed
            over; None raises at the first one.

    Raises:
        ValueError: if a line is not a task; the message begins with file and line number.
    """
    groups = read_json_lines(path, lambda values: _tasks_of_line(values, kind), refused)
    return [task for tasks in groups for task in tasks]


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
    return [
        Task(kind, prompt, texts, () if origin is None else (origin,) * len(texts))
        for prompt, samples in completions.items()
        for texts in _grouped(list(dict.fromkeys(samples)), kind)
    ]


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
    if first.keys() != second.keys():
        differing = sorted(first.keys() ^ second.keys())
        raise ValueError(
            f"expected the same prompts from {origins[0]} and {origins[1]}, got {len(differing)} "
            f"from one only, {differing[0]!r} first"
        )
    tasks = []
    for prompt, samples in first.items():
        others = second[prompt]
        if len(samples) != len(others):
            raise ValueError(
                f"expected as many samples from {origins[0]} as from {origins[1]}, "
                f"got {len(samples)} and {len(others)} for {prompt!r}"
            )
        for pair in zip(samples, others, strict=True):
            if pair[0] != pair[1]:
                tasks.append(Task("comparison", prompt, pair, origins))
    return tasks


def with_chats(tasks: Iterable[Task], chats: Mapping[tuple[str, str], Chat]) -> list[Task]:
    """Say of each task which messages its texts are made of, where that is known.

    Args:
        tasks: the questions.
        chats: of one completion each, by prompt and completion, as `chats_of` gives them.
    """
    return [
        replace(task, chat=side_by_side(chats, task.prompt, task.completions) or task.chat)
        for task in tasks
    ]


def _tasks_of_line(values: Any, kind: Kind) -> list[Task]:
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {str(values)[:60]}")
    if "completions" in values:
        completions = values["completions"]
    elif "completion" in values:
        completions = [values["completion"]]
    elif "chosen" in values and "rejected" in values:
        completions = [values["chosen"], values["rejected"]]
    else:
        raise ValueError(
            "expected the key 'completions' or 'completion', or 'chosen' and 'rejected', "
            f"got the keys {sorted(values)}"
        )
    completions = _check_texts("completions", completions)
    origins = _check_texts("origins", values.get("origins") or [])
    if origins and len(origins) != len(completions):
        raise ValueError(f"expected one origin per completion, got {list(origins)}")
    if kind == "comparison" and len(completions) < 2:
        raise ValueError(f"expected at least 2 completions to compare, got {len(completions)}")
    origin_of = dict(zip(completions, origins, strict=False))
    chat = as_chat(values.get("chat"), len(completions))
    messages_of = {} if chat is None else dict(zip(completions, chat.completions, strict=True))
    groups = _grouped(list(dict.fromkeys(completions)), kind)
    if values.get("gold") is not None and len(groups) != 1:
        raise ValueError(f"expected one task for a gold answer, got {len(groups)}")
    further = {key: values[key] for key in ("scale", "gold", "uncertainty") if key in values}
    return [
        Task(
            kind,
            values.get("prompt", ""),
            texts,
            tuple(origin_of[text] for text in texts) if origins else (),
            chat=chat and Chat(chat.prompt, tuple(messages_of[text] for text in texts)),
            **further,
        )
        for texts in groups
    ]


def _grouped(samples: list[str], kind: Kind) -> list[tuple[str, ...]]:
    """Disjoint pairs for comparisons, single ones for other kinds."""
    if kind == "comparison":
        return list(zip(samples[::2], samples[1::2], strict=False))
    return [(sample,) for sample in samples]


def _check_texts(name: str, texts: Any) -> tuple[str, ...]:
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected {name} to be text, got {str(texts)[:60]}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"expected {name} to be text, got half a character") from error
    return tuple(texts)


def _check_scale(scale: Any) -> tuple[int, int]:
    if not isinstance(scale, list | tuple) or len(scale) != 2 or not all(map(_is_number, scale)):
        raise ValueError(f"expected scale [lowest, highest], got {scale!r}")
    low, high = scale
    if low != int(low) or high != int(high) or not low < high:
        raise ValueError(f"expected a scale of whole numbers, lowest first, got {list(scale)}")
    return int(low), int(high)


def _is_number(value: object) -> TypeGuard[float]:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
