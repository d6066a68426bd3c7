"""Tasks and people's answers in one SQLite file that several processes may use at once."""

import hashlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from reward_models.feedback.accounts import account_name
from reward_models.feedback.assignment import (
    choose_task,
    count_left,
    draw_overlap,
    is_open_to,
    is_shown_swapped,
    place,
)
from reward_models.feedback.conversion import NAMELESS, as_record, as_task_and_answer, joint_origin
from reward_models.feedback.database import (
    AlreadyAnswered,
    Database,
    StaleTask,
    UnknownAnnotator,
    UnknownTask,
)
from reward_models.feedback.records import Feedback
from reward_models.feedback.tasks import (
    Answer,
    AnswerValue,
    Assignment,
    Kind,
    Task,
    swap_choice,
)

_CHOICES: dict[str, AnswerValue] = {"left": "first", "right": "second", "tie": "tie"}

_json = partial(json.dumps, ensure_ascii=False)


@dataclass(frozen=True)
class Progress:
    """How far one person is.

    Args:
        answered: tasks answered.
        skipped: tasks passed over.
        left: tasks that this person can still be given, the open one among them.
    """

    answered: int
    skipped: int
    left: int


class FeedbackStore:
    """Tasks and answers in a file.

    An instance may be shared by threads; every process opens its own. Each method is one
    transaction: when it has returned, what it did is on the disk.

    Args:
        path: the file; made, with its folder, if it is not there.
        seed: of the order in which tasks are given and their completions shown.
        gold_rate: share of the questions given that have a known answer, while there are some.
        expire_after: seconds after which a task given but not answered may go to somebody else.

    Raises:
        StoreError: if the file is not a store, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        seed: int = 0,
        gold_rate: float = 0.1,
        expire_after: float = 1800,
    ) -> None:
        self._database = Database(path)
        self._seed = seed
        self._gold_rate = gold_rate
        self._expire_after = expire_after

    def __enter__(self) -> "FeedbackStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    def add(
        self, tasks: Iterable[Task], overlap_share: float = 0.1, overlap_annotators: int = 3
    ) -> int:
        """Take up tasks; one that is there already stays as it is, but for gold and uncertainty.

        Tasks are the same if texts, kind, scale and origins are; the order of a comparison's
        completions does not matter, and the one kept is the store's own.

        Args:
            tasks: the questions.
            overlap_share: share of them that several people are asked, to measure agreement.
            overlap_annotators: how many people that is; the others are asked of one person, and
                those with `gold` of everybody.

        Returns:
            How many were new.
        """
        tasks = list(tasks)
        if overlap_annotators < 1:
            raise ValueError(f"expected at least 1 overlap annotator, got {overlap_annotators}")
        if not 0 <= overlap_share <= 1:
            raise ValueError(f"expected an overlap share from 0 to 1, got {overlap_share}")
        with self._database.writing() as connection:
            last = connection.execute("SELECT coalesce(max(id), 0) FROM tasks").fetchone()[0]
            for task in tasks:
                self._insert_task(connection, _ordered(task), wanted=1)
            new = [
                row["id"]
                for row in connection.execute("SELECT id FROM tasks WHERE id > ?", (last,))
            ]
            for number in draw_overlap(self._seed, new, overlap_share):
                connection.execute(
                    "UPDATE tasks SET wanted = ? WHERE id = ?", (overlap_annotators, number)
                )
        return len(new)

    def next_task(self, annotator: str) -> Assignment | None:
        """Give a task that this person has not answered or skipped, or None if there is none.

        The one given last comes again until it is answered, skipped or taken back.
        """
        _check_annotator(annotator)
        with self._database.writing() as connection:
            now = time.time()
            live_since = now - self._expire_after
            current = _open_row(connection, annotator)
            if current is not None:
                if current["opened"] > live_since:
                    return _as_assignment(current)
                if is_open_to(connection, current["task"], annotator, live_since):
                    connection.execute(
                        "UPDATE assignments SET opened = ? WHERE id = ?", (now, current["id"])
                    )
                    return _as_assignment(current)
                _release(connection, annotator)
            number = choose_task(connection, annotator, self._seed, self._gold_rate, live_since)
            if number is None:
                return None
            digest, kind = connection.execute(
                "SELECT digest, kind FROM tasks WHERE id = ?", (number,)
            ).fetchone()
            swapped = kind == "comparison" and is_shown_swapped(self._seed, digest, annotator)
            connection.execute(
                "INSERT INTO assignments (task, annotator, swapped, opened) VALUES (?, ?, ?, ?)",
                (number, annotator, swapped, now),
            )
            opened = _open_row(connection, annotator)
            assert opened is not None
            return _as_assignment(opened)

    def answer(
        self, assignment: int, annotator: str, answer: object, seconds: float | None = None
    ) -> None:
        """Save an answer.

        Args:
            assignment: its `id`.
            annotator: who answers; must be the one whom it was given to.
            answer: "left", "right" or "tie", as `Assignment.shown` (the store un-swaps it);
                a whole number for a rating; true or false for a label.
            seconds: how long it took; from when the task was given if it is left out.

        Raises:
            UnknownTask, AlreadyAnswered, StaleTask: if that assignment is not open.
            ValueError: if it is no answer to the task.
        """
        with self._database.writing() as connection:
            row = _named_row(connection, annotator, assignment)
            _finish(connection, row, _as_kept(_as_assignment(row), answer), seconds)

    def skip(self, assignment: int, annotator: str) -> None:
        """Pass over a task: this person is not asked again, others may be.

        Raises:
            UnknownTask, AlreadyAnswered, StaleTask: if that assignment is not open.
        """
        with self._database.writing() as connection:
            _finish(connection, _named_row(connection, annotator, assignment), None, None)

    def undo(self, annotator: str) -> Assignment | None:
        """Take this person's last answer or skip back and give its task again, shown as before.

        The task that was open goes back to the pile.

        Returns:
            What is open now, or None if there was nothing to take back.
        """
        with self._database.writing() as connection:
            last = connection.execute(
                "SELECT id FROM assignments WHERE annotator = ? AND done IS NOT NULL "
                "AND opened IS NOT NULL ORDER BY done DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if last is None:
                return None
            _release(connection, annotator)
            connection.execute(
                "UPDATE assignments SET opened = ?, done = NULL, answer = NULL, seconds = NULL, "
                "time = NULL WHERE id = ?",
                (time.time(), last["id"]),
            )
            opened = _open_row(connection, annotator)
            assert opened is not None
            return _as_assignment(opened)

    def progress(self, annotator: str) -> Progress:
        """How far this person is."""
        with self._database.reading() as connection:
            answered, skipped = connection.execute(
                "SELECT count(answer), count(done) - count(answer) FROM assignments "
                "WHERE annotator = ?",
                (annotator,),
            ).fetchone()
            left = count_left(connection, annotator, time.time() - self._expire_after)
        return Progress(answered, skipped, left)

    def count_tasks(self) -> int:
        """How many tasks there are, those that came in with their answers not counted."""
        with self._database.reading() as connection:
            return connection.execute("SELECT count(*) FROM tasks WHERE wanted > 0").fetchone()[0]

    def answers(self) -> list[Answer]:
        """Every answer, the oldest first; skipped tasks are not among them."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT * FROM assignments JOIN tasks ON tasks.id = assignments.task "
                "WHERE answer IS NOT NULL ORDER BY done"
            ).fetchall()
        tasks: dict[int, Task] = {}
        answers = []
        for row in rows:
            if row["task"] not in tasks:
                tasks[row["task"]] = _as_task(row)
            answers.append(
                Answer(
                    task_id=row["task"],
                    task=tasks[row["task"]],
                    annotator=row["annotator"],
                    answer=json.loads(row["answer"]),
                    swapped=None if row["swapped"] is None else bool(row["swapped"]),
                    seconds=row["seconds"],
                    time=row["time"],
                )
            )
        return answers

    def export(
        self, kind: Kind | None = None, ties: bool = True, gold: bool = True
    ) -> list[Feedback]:
        """Answers as records (contract 3), the oldest first.

        Args:
            kind: only answers of this kind.
            ties: whether ties are among them. TRL's trainers know no ties: they would read one as
                a preference for `chosen`.
            gold: whether answers to questions with a known answer are among them.
        """
        return [
            as_record(answer)
            for answer in self.answers()
            if kind in (None, answer.task.kind)
            and (ties or answer.answer != "tie")
            and (gold or answer.task.gold is None)
        ]

    def import_records(self, records: Iterable[Feedback]) -> int:
        """Take up answers that were given elsewhere.

        The same answer twice is one: of several by one person to one task the first stays.
        Several without an annotator stay beside each other. Nobody is asked what only came in
        with its answer.

        Returns:
            How many answers were new.

        Raises:
            ValueError: if a record makes no task, named by its number; nothing was saved.
        """
        nameless: Counter[int] = Counter()
        added = 0
        with self._database.writing() as connection:
            first = _next_done(connection)
            for number, record in enumerate(records, start=1):
                try:
                    task, answer = as_task_and_answer(record)
                    ordered = _ordered(task)
                    answer = answer if ordered is task else swap_choice(answer)
                    task_id = self._find_or_insert(connection, ordered)
                    nameless[task_id] += record.annotator is None
                    annotator = record.annotator
                    if annotator is None:
                        annotator = f"{NAMELESS}{nameless[task_id]}"
                    _check_annotator(annotator)
                except ValueError as error:
                    raise ValueError(f"record {number}: {error}") from error
                added += connection.execute(
                    "INSERT INTO assignments (task, annotator, done, answer, time) "
                    "VALUES (?, ?, ?, ?, ?) ON CONFLICT (task, annotator) DO UPDATE SET "
                    "swapped = NULL, opened = NULL, done = excluded.done, "
                    "answer = excluded.answer, seconds = NULL, time = excluded.time "
                    "WHERE answer IS NULL",
                    (task_id, annotator, first + number, _json(answer), record.time),
                ).rowcount
        return added

    def forget(self, name: str) -> int:
        """Erase a person: answers, open task, name, password and sessions.

        Afterwards they are no longer in the file's bytes either.

        Args:
            name: as at sign-in, or the pseudonym.

        Returns:
            How many answers were erased.

        Raises:
            UnknownAnnotator: if there is nobody of that name.
        """
        with self._database.writing() as connection:
            account = connection.execute(
                "SELECT name, pseudonym FROM accounts WHERE name = ? OR pseudonym = ?",
                (account_name(name), name),
            ).fetchone()
            names = {name, *(account or ())}
            counts = [
                connection.execute(
                    "SELECT count(answer), count(*) FROM assignments WHERE annotator = ?", (one,)
                ).fetchone()
                for one in names
            ]
            answers, rows = map(sum, zip(*counts, strict=True))
            if account is None and rows == 0:
                raise UnknownAnnotator(f"expected the name of an annotator, got {name!r}")
            for one in names:
                connection.execute("DELETE FROM assignments WHERE annotator = ?", (one,))
                connection.execute("DELETE FROM accounts WHERE pseudonym = ?", (one,))
        self._database.scrub()
        return answers

    def _insert_task(self, connection: sqlite3.Connection, task: Task, wanted: int) -> int:
        """Take up a task in the store's own order, or find the same one; gives its number."""
        digest = _digest(task)
        return connection.execute(
            "INSERT INTO tasks (digest, origins, kind, prompt, completions, scale, gold, "
            "uncertainty, wanted, place) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (digest, origins) DO UPDATE SET gold = coalesce(excluded.gold, gold), "
            "uncertainty = coalesce(excluded.uncertainty, uncertainty), "
            "wanted = max(wanted, excluded.wanted) RETURNING id",
            (
                digest,
                _json(task.origins),
                task.kind,
                task.prompt,
                _json(task.completions),
                _json(task.scale),
                None if task.gold is None else _json(task.gold),
                task.uncertainty,
                wanted,
                place(self._seed, digest),
            ),
        ).fetchone()["id"]

    def _find_or_insert(self, connection: sqlite3.Connection, task: Task) -> int:
        """The task with these texts and an origin that is exported alike, or a new one."""
        for row in connection.execute("SELECT * FROM tasks WHERE digest = ?", (_digest(task),)):
            if joint_origin(_as_task(row)) == joint_origin(task):
                return row["id"]
        return self._insert_task(connection, task, wanted=0)


def _ordered(task: Task) -> Task:
    """The task with its completions in the store's own order, so that both orders are one."""
    return task if list(task.completions) == sorted(task.completions) else task.swapped()


def _digest(task: Task) -> str:
    question = (task.kind, task.prompt, task.completions, task.scale)
    return hashlib.sha256(_json(question).encode()).hexdigest()


def _as_task(row: sqlite3.Row) -> Task:
    return Task(
        kind=row["kind"],
        prompt=row["prompt"],
        completions=tuple(json.loads(row["completions"])),
        origins=tuple(json.loads(row["origins"])),
        scale=tuple(json.loads(row["scale"])),
        gold=None if row["gold"] is None else json.loads(row["gold"]),
        uncertainty=row["uncertainty"],
    )


def _as_assignment(row: sqlite3.Row) -> Assignment:
    return Assignment(row["assignment"], _as_task(row), row["annotator"], bool(row["swapped"]))


def _open_row(connection: sqlite3.Connection, annotator: str) -> sqlite3.Row | None:
    """What is open to this person, with its task."""
    return connection.execute(
        "SELECT assignments.id AS assignment, task, annotator, swapped, opened, tasks.* "
        "FROM assignments JOIN tasks ON tasks.id = assignments.task "
        "WHERE annotator = ? AND done IS NULL",
        (annotator,),
    ).fetchone()


def _named_row(connection: sqlite3.Connection, annotator: str, assignment: int) -> sqlite3.Row:
    """What is open to this person, if it is the assignment with this id."""
    row = _open_row(connection, annotator)
    if row is not None and row["assignment"] == assignment:
        return row
    if connection.execute(
        "SELECT 1 FROM assignments WHERE id = ? AND annotator = ?", (assignment, annotator)
    ).fetchone():
        raise AlreadyAnswered(f"expected an open task, got {assignment}, which is answered already")
    given = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'assignments'")
    if 1 <= assignment <= (given.fetchone() or (0,))[0]:
        raise StaleTask(f"expected the task that is open now, got {assignment}, an earlier one")
    raise UnknownTask(f"expected a task that was given, got {assignment}")


def _finish(
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
            _next_done(connection),
            None if answer is None else _json(answer),
            max(0.0, now - row["opened"] if seconds is None else float(seconds)),
            datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            row["assignment"],
        ),
    )


def _release(connection: sqlite3.Connection, annotator: str) -> None:
    """Put what is open to this person back on the pile."""
    connection.execute("DELETE FROM assignments WHERE annotator = ? AND done IS NULL", (annotator,))


def _next_done(connection: sqlite3.Connection) -> int:
    return connection.execute("SELECT coalesce(max(done), 0) + 1 FROM assignments").fetchone()[0]


def _as_kept(assignment: Assignment, answer: object) -> AnswerValue:
    """An answer as a person gave it, in the task's own order."""
    task = assignment.task
    if task.kind == "comparison":
        if not isinstance(answer, str) or answer not in _CHOICES:
            raise ValueError(f"expected left, right or tie, got {answer!r}")
        choice = _CHOICES[answer]
        return swap_choice(choice) if assignment.swapped else choice
    if task.kind == "rating" and not isinstance(answer, int):
        low, high = task.scale
        raise ValueError(f"expected a whole number from {low} to {high}, got {answer!r}")
    return task.check(answer)


def _check_annotator(annotator: object) -> None:
    if not isinstance(annotator, str) or not annotator.strip():
        raise ValueError(f"expected an annotator's pseudonym, got {annotator!r}")
