"""Tasks, assignments and answers as rows of the store's tables."""

import hashlib
import json
import sqlite3
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial

from reward_models.feedback.assignment import place
from reward_models.feedback.conversion import joint_origin
from reward_models.feedback.database import AlreadyAnswered, StaleTask, UnknownTask
from reward_models.feedback.tasks import Answer, AnswerValue, Assignment, Task

to_json = partial(json.dumps, ensure_ascii=False)


def ordered(task: Task) -> Task:
    """The task with its completions in the store's own order, so that both orders are one."""
    return task if list(task.completions) == sorted(task.completions) else task.swapped()


def insert_task(connection: sqlite3.Connection, task: Task, wanted: int, seed: int) -> int:
    """Take up a task in the store's own order, or find the same one; gives its number."""
    digest = _digest(task)
    return connection.execute(
        "INSERT INTO tasks (digest, origins, kind, prompt, completions, scale, gold, "
        "uncertainty, chat, wanted, place) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (digest, origins) DO UPDATE SET gold = coalesce(excluded.gold, gold), "
        "uncertainty = coalesce(excluded.uncertainty, uncertainty), "
        "chat = coalesce(chat, excluded.chat), "  # what was shown to some stays
        "wanted = max(wanted, excluded.wanted) RETURNING id",
        (
            digest,
            to_json(task.origins),
            task.kind,
            task.prompt,
            to_json(task.completions),
            to_json(task.scale),
            None if task.gold is None else to_json(task.gold),
            task.uncertainty,
            _chat_json(task),
            wanted,
            place(seed, digest),
        ),
    ).fetchone()["id"]


def find_or_insert_task(connection: sqlite3.Connection, task: Task, seed: int) -> int:
    """The task with these texts and an origin that is exported alike, or a new one."""
    for row in connection.execute("SELECT * FROM tasks WHERE digest = ?", (_digest(task),)):
        if joint_origin(as_task(row)) == joint_origin(task):
            connection.execute(
                "UPDATE tasks SET chat = coalesce(chat, ?) WHERE id = ?",
                (_chat_json(task), row["id"]),
            )
            return row["id"]
    return insert_task(connection, task, wanted=0, seed=seed)


def as_task(row: sqlite3.Row) -> Task:
    """A task as it is kept."""
    return Task(
        kind=row["kind"],
        prompt=row["prompt"],
        completions=tuple(json.loads(row["completions"])),
        origins=tuple(json.loads(row["origins"])),
        scale=tuple(json.loads(row["scale"])),
        gold=None if row["gold"] is None else json.loads(row["gold"]),
        uncertainty=row["uncertainty"],
        chat=None if row["chat"] is None else json.loads(row["chat"]),
    )


def as_assignment(row: sqlite3.Row) -> Assignment:
    """What `open_row` found."""
    return Assignment(row["assignment"], as_task(row), row["annotator"], bool(row["swapped"]))


def as_answer(row: sqlite3.Row, tasks: dict[int, Task]) -> Answer:
    """An answer with its task, which is made once for all its answers and kept in `tasks`."""
    if row["task"] not in tasks:
        tasks[row["task"]] = as_task(row)
    return Answer(
        task_id=row["task"],
        task=tasks[row["task"]],
        annotator=row["annotator"],
        answer=json.loads(row["answer"]),
        swapped=None if row["swapped"] is None else bool(row["swapped"]),
        seconds=row["seconds"],
        time=row["time"],
    )


def open_row(connection: sqlite3.Connection, annotator: str) -> sqlite3.Row | None:
    """What is open to this person, with its task."""
    return connection.execute(
        "SELECT assignments.id AS assignment, task, annotator, swapped, opened, tasks.* "
        "FROM assignments JOIN tasks ON tasks.id = assignments.task "
        "WHERE annotator = ? AND done IS NULL",
        (annotator,),
    ).fetchone()


def named_row(connection: sqlite3.Connection, annotator: str, assignment: int) -> sqlite3.Row:
    """What is open to this person, if it is the assignment with this id."""
    if not 0 < assignment < 2**63:  # beyond, SQLite has no number for it
        raise UnknownTask(f"expected a task that was given, got {assignment}")
    row = open_row(connection, annotator)
    if row is not None and row["assignment"] == assignment:
        return row
    if connection.execute(
        "SELECT 1 FROM assignments WHERE id = ? AND annotator = ?", (assignment, annotator)
    ).fetchone():
        raise AlreadyAnswered(f"expected an open task, got {assignment}, which is answered already")
    given = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'assignments'")
    if assignment <= (given.fetchone() or (0,))[0]:
        raise StaleTask(f"expected the task that is open now, got {assignment}, an earlier one")
    raise UnknownTask(f"expected a task that was given, got {assignment}")


def finish(
    connection: sqlite3.Connection,
    row: sqlite3.Row,
    answer: AnswerValue | None,
    seconds: float | None,
) -> None:
    """Save what a person did with an open task: an answer, or None for a skip."""
    now = time.time()
    connection.execute(
        "UPDATE assignments SET done = ?, answer = ?, seconds = ?, time = ? WHERE id = ?",
        (
            next_done(connection),
            None if answer is None else to_json(answer),
            max(0.0, now - row["opened"] if seconds is None else float(seconds)),
            datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            row["assignment"],
        ),
    )


def release(connection: sqlite3.Connection, annotator: str) -> None:
    """Put what is open to this person back on the pile."""
    connection.execute("DELETE FROM assignments WHERE annotator = ? AND done IS NULL", (annotator,))


def next_done(connection: sqlite3.Connection) -> int:
    """The running number of the next answer or skip."""
    return connection.execute("SELECT coalesce(max(done), 0) + 1 FROM assignments").fetchone()[0]


def check_annotator(annotator: object) -> None:
    """Raise a ValueError unless it can be somebody's pseudonym."""
    if not isinstance(annotator, str) or not annotator.isprintable() or not annotator.strip():
        raise ValueError(f"expected an annotator's pseudonym, got {annotator!r}")


def _chat_json(task: Task) -> str | None:
    return None if task.chat is None else to_json(asdict(task.chat))


def _digest(task: Task) -> str:
    question = (task.kind, task.prompt, task.completions, task.scale)
    return hashlib.sha256(to_json(question).encode()).hexdigest()
