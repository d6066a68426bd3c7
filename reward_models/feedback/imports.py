"""Answers that were given elsewhere, taken up into the store's tables."""

import sqlite3
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any

from reward_models.feedback.conversion import NAMELESS, as_task_and_answer
from reward_models.feedback.records import Feedback
from reward_models.feedback.rows import (
    check_annotator,
    find_or_insert_task,
    next_done,
    ordered,
    to_json,
)
from reward_models.feedback.tasks import AnswerValue, swap_choice


def import_answers(connection: sqlite3.Connection, records: Sequence[Feedback], seed: int) -> int:
    """Insert the answers that are not there yet; gives their number.

    Raises:
        ValueError: if a record makes no task, named by its number.
    """
    nameless: Counter[tuple[Any, ...]] = Counter()
    added = 0
    first = next_done(connection)
    for number, record in enumerate(records):
        try:
            task_id, answer = _task_and_answer(connection, record, seed)
        except ValueError as error:
            raise ValueError(f"record {number + 1}: {error}") from error
        annotator = record.annotator
        if annotator is None:
            same = (task_id, to_json(answer), record.time)
            nameless[same] += 1
            annotator = _name_for(connection, *same, nameless[same])
        added += connection.execute(
            "INSERT INTO assignments (task, annotator, done, answer, time) "
            "VALUES (?, ?, ?, ?, ?) ON CONFLICT (task, annotator) DO UPDATE SET "
            "swapped = NULL, opened = NULL, done = excluded.done, "
            "answer = excluded.answer, seconds = NULL, time = excluded.time "
            "WHERE answer IS NULL",
            (task_id, annotator, first + number, to_json(answer), record.time),
        ).rowcount
    return added


def _task_and_answer(
    connection: sqlite3.Connection, record: Feedback, seed: int
) -> tuple[int, AnswerValue]:
    """The number of the task that a record answers, and the answer in that task's order."""
    if record.annotator is not None:
        check_annotator(record.annotator)
    task, answer = as_task_and_answer(record)
    kept = ordered(task)
    task_id = find_or_insert_task(connection, kept, seed)
    return task_id, answer if kept is task else swap_choice(answer)


def _name_for(
    connection: sqlite3.Connection, task: int, answer: str, time: str | None, occurrence: int
) -> str:
    """A name for an answer without annotator: that of the same answer imported before, or new.

    Args:
        connection: the store.
        task: what it answers.
        answer: the answer as it is stored.
        time: when it was given.
        occurrence: the how many-th such answer in this import it is.
    """
    names = connection.execute(
        "SELECT annotator, answer = ? AND time IS ? AS same FROM assignments "
        "WHERE task = ? AND annotator GLOB ? ORDER BY done",
        (answer, time, task, f"{NAMELESS}*"),
    ).fetchall()
    same = [row["annotator"] for row in names if row["same"]]
    if len(same) >= occurrence:
        return same[occurrence - 1]
    taken = {row["annotator"] for row in names}
    return next(name for i in count(1) if (name := f"{NAMELESS}{i}") not in taken)
