"""Answers as records (contract 3) and back, and ratings as CSV for spreadsheets."""

import csv
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from reward_models.atomic import atomic_file
from reward_models.feedback.records import Comparison, Feedback, Label, Rating
from reward_models.feedback.tasks import Answer, AnswerValue, Task

NAMELESS = "anonymous-"
"""Begins the names that the store gives to answers without an annotator: no person stands behind
one of them, and in records it is none again."""

_COLUMNS = ("prompt", "completion", "rating", "lowest", "highest", "annotator", "time", "origin")

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
"""A cell that a spreadsheet would take for a formula, and one that looks as if already quoted."""


def as_record(answer: Answer) -> Feedback:
    """What a person answered, as a record to learn from; of a tie's two, either may be `chosen`."""
    task = answer.task
    annotator = None if answer.annotator.startswith(NAMELESS) else answer.annotator
    if answer.answer == "second":
        task = task.swapped()
    source: dict[str, Any] = {"annotator": annotator, "time": answer.time}
    source |= {"origin": joint_origin(task), "chat": task.chat}
    if task.kind == "comparison":
        chosen, rejected = task.completions
        return Comparison(task.prompt, chosen, rejected, tie=answer.answer == "tie", **source)
    completion = task.completions[0]
    if task.kind == "rating":
        return Rating(task.prompt, completion, float(answer.answer), task.scale, **source)
    return Label(task.prompt, completion, bool(answer.answer), **source)


def as_task_and_answer(record: Feedback) -> tuple[Task, AnswerValue]:
    """The question that a record answers, and the answer."""
    origins: tuple[str, ...] = () if record.origin is None else (record.origin,)
    if isinstance(record, Comparison):
        pair = (record.chosen, record.rejected)
        task = Task("comparison", record.prompt, pair, origins * 2, chat=record.chat)
        return task, "tie" if record.tie else "first"
    if isinstance(record, Label):
        task = Task("label", record.prompt, (record.completion,), origins, chat=record.chat)
        return task, record.label
    scale = cast(tuple[int, int], record.scale)  # the task checks that they are whole
    task = Task("rating", record.prompt, (record.completion,), origins, scale, chat=record.chat)
    return task, task.check(record.rating)


def joint_origin(task: Task) -> str | None:
    """A task's origins as a record's: one, or "this vs that"."""
    return " vs ".join(sorted(set(task.origins))) or None


def write_ratings_csv(path: str | os.PathLike[str], records: Iterable[Feedback]) -> Path:
    """Write the ratings among records as CSV, replacing the file at once or not at all.

    Spreadsheets run a text that begins with `=`, `+`, `-` or `@` as a formula, and the texts are
    a model's. Such cells get an apostrophe in front, which `read_ratings_csv` takes away again.
    The file begins with a byte order mark, so that spreadsheets read Chinese as it is. Of chats it
    has the texts, not the messages.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(_COLUMNS)
        for record in records:
            if isinstance(record, Rating):
                texts = (record.annotator, record.time, record.origin)
                writer.writerow(
                    [
                        _quoted(record.prompt),
                        _quoted(record.completion),
                        *(_plain(number) for number in (record.rating, *record.scale)),
                        *(_quoted(text or "") for text in texts),
                    ]
                )
    return Path(path)


def read_ratings_csv(
    path: str | os.PathLike[str], scale: tuple[float, float] = (1, 5)
) -> list[Feedback]:
    """Read ratings from CSV.

    The first line names the columns: `completion` and `rating`, and if there are any `prompt`,
    `lowest`, `highest`, `annotator`, `time` and `origin`; others are passed over.

    Args:
        path: the file, UTF-8.
        scale: lowest and highest possible rating where the file does not say.

    Raises:
        ValueError: if a line is not a rating; the message begins with file and line number.
    """
    records: list[Feedback] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            missing = {"completion", "rating"} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"expected the column {min(missing)!r}, got {reader.fieldnames or 'none'}"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"expected {len(reader.fieldnames or ())} columns")
                records.append(_rating_of_row(row, scale))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {max(reader.line_num, 1)}: {error}") from error
    return records


def _rating_of_row(row: dict[str, str], scale: tuple[float, float]) -> Rating:
    low, high = (
        _number(name, row[name]) if row.get(name) else end
        for name, end in zip(("lowest", "highest"), scale, strict=True)
    )
    annotator, time, origin = (
        _unquoted(row.get(name, "")) or None for name in ("annotator", "time", "origin")
    )
    return Rating(
        _unquoted(row.get("prompt", "")),
        _unquoted(row["completion"]),
        _number("rating", row["rating"]),
        (low, high),
        annotator=annotator,
        time=time,
        origin=origin,
    )


def _number(name: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise ValueError(f"expected {name} to be a number, got {cell!r}") from error


def _plain(number: float) -> float:
    """4 rather than 4.0."""
    return int(number) if number == int(number) else number


def _quoted(text: str) -> str:
    return "'" + text if _FORMULA.match(text) else text


def _unquoted(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
