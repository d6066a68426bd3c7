"""Tasks and people's answers in one SQLite file that several processes may use at once."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reward_models.feedback.accounts import account_name
from reward_models.feedback.assignment import (
    choose_task,
    count_left,
    count_open,
    draw_overlap,
    is_open_to,
    is_shown_swapped,
)
from reward_models.feedback.conversion import as_record
from reward_models.feedback.database import Database, StaleTask, UnknownAnnotator
from reward_models.feedback.imports import import_answers
from reward_models.feedback.records import Feedback
from reward_models.feedback.rows import (
    as_answer,
    as_assignment,
    as_task,
    check_annotator,
    finish,
    insert_task,
    named_row,
    open_row,
    ordered,
    release,
)
from reward_models.feedback.tasks import (
    Answer,
    AnswerValue,
    Assignment,
    Kind,
    Task,
    swap_choice,
)

_CHOICES: dict[str, AnswerValue] = {"left": "first", "right": "second", "tie": "tie"}


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

        It is told its chat if it has none.

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
                insert_task(connection, ordered(task), wanted=1, seed=self._seed)
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
        check_annotator(annotator)
        with self._database.writing() as connection:
            now = time.time()
            live_since = now - self._expire_after
            current = open_row(connection, annotator)
            if current is not None:
                if current["opened"] > live_since:
                    return as_assignment(current)
                if is_open_to(connection, current["task"], annotator, live_since):
                    connection.execute(
                        "UPDATE assignments SET opened = ? WHERE id = ?", (now, current["id"])
                    )
                    return as_assignment(current)
                release(connection, annotator)
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
            opened = open_row(connection, annotator)
            assert opened is not None
            return as_assignment(opened)

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
            row = named_row(connection, annotator, assignment)
            finish(connection, row, _as_kept(as_assignment(row), answer), seconds)

    def skip(self, assignment: int, annotator: str) -> None:
        """Pass over a task: this person is not asked again, others may be.

        Raises:
            UnknownTask, AlreadyAnswered, StaleTask: if that assignment is not open.
        """
        with self._database.writing() as connection:
            finish(connection, named_row(connection, annotator, assignment), None, None)

    def undo(self, annotator: str, of: int | None = None) -> Assignment | None:
        """Take this person's last answer or skip back and give its task again, shown as before.

        The task that was open goes back to the pile.

        Args:
            annotator: pseudonym of the person.
            of: how many answers and skips the person has seen to be saved; any number if left out.

        Returns:
            What is open now, or None if there was nothing to take back.

        Raises:
            StaleTask: if there are not `of` any more: of two windows, the other was first.
        """
        with self._database.writing() as connection:
            done = connection.execute(
                "SELECT count(done) FROM assignments WHERE annotator = ?", (annotator,)
            ).fetchone()[0]
            if of is not None and of != done:
                raise StaleTask(f"expected the last of {done} answers, got that of {of}")
            last = connection.execute(
                "SELECT id FROM assignments WHERE annotator = ? AND done IS NOT NULL "
                "AND opened IS NOT NULL ORDER BY done DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if last is None:
                return None
            release(connection, annotator)
            connection.execute(
                "UPDATE assignments SET opened = ?, done = NULL, answer = NULL, seconds = NULL, "
                "time = NULL WHERE id = ?",
                (time.time(), last["id"]),
            )
            opened = open_row(connection, annotator)
            assert opened is not None
            return as_assignment(opened)

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

    def count_tasks(self, kind: Kind | None = None) -> int:
        """How many tasks there are (of a kind), those that came in with their answers left out."""
        with self._database.reading() as connection:
            return connection.execute(
                "SELECT count(*) FROM tasks WHERE wanted > 0 AND (?1 IS NULL OR kind = ?1)", (kind,)
            ).fetchone()[0]

    def count_open(self, origin: str, most: int) -> tuple[int, int]:
        """How many tasks there are from an origin, and how many of them still lack an answer.

        Args:
            origin: of a completion of the task.
            most: answers that a task waits for, even where more are wanted. One that has been
                passed over waits for whoever else has worked on the origin's tasks.
        """
        with self._database.reading() as connection:
            return count_open(connection, origin, most)

    def unanswered(self) -> list[Task]:
        """Tasks that lack an answer still, in no particular order."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT * FROM tasks WHERE wanted > (SELECT count(answer) FROM assignments "
                "WHERE task = tasks.id)"
            ).fetchall()
        return [as_task(row) for row in rows]

    def answers(self) -> list[Answer]:
        """Every answer, the oldest first; skipped tasks are not among them."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT * FROM assignments JOIN tasks ON tasks.id = assignments.task "
                "WHERE answer IS NOT NULL ORDER BY done"
            ).fetchall()
        tasks: dict[int, Task] = {}
        return [as_answer(row, tasks) for row in rows]

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

        The same file twice is the same as once: of several answers by one person to one task the
        first stays, and of those without an annotator as many as one file holds that are alike.
        Nobody is asked what only came in with its answer.

        Returns:
            How many answers were new.

        Raises:
            ValueError: if a record makes no task, named by its number; nothing was saved.
        """
        records = list(records)
        with self._database.writing() as connection:
            return import_answers(connection, records, self._seed)

    def forget(self, name: str) -> int:
        """Erase a person: answers, open task, name, password and sessions.

        Afterwards they are no longer in the file's bytes either. Files exported earlier are not
        touched.

        Args:
            name: as at sign-in, or the pseudonym.

        Returns:
            How many answers were erased.

        Raises:
            UnknownAnnotator: if there is nobody of that name.
            StoreError: if others kept the file busy: it is to be called again then.
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
            for one in names:
                connection.execute("DELETE FROM assignments WHERE annotator = ?", (one,))
                connection.execute("DELETE FROM accounts WHERE pseudonym = ?", (one,))
        self._database.scrub()  # in any case: it may be that an earlier call was cut short here
        if account is None and rows == 0:
            raise UnknownAnnotator(f"expected the name of an annotator, got {name!r}")
        return answers


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
