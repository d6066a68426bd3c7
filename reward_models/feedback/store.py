"""Tasks and people's answers in one SQLite file that several processes may use at once."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reward_models.feedback.records import Feedback
from reward_models.feedback.tasks import Answer, Assignment, Kind, Task


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
    ) -> None: ...

    def __enter__(self) -> "FeedbackStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None: ...

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
        ...

    def next_task(self, annotator: str) -> Assignment | None:
        """Give a task that this person has not answered or skipped, or None if there is none.

        The one given last comes again until it is answered, skipped or taken back.
        """
        ...

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
        ...

    def skip(self, assignment: int, annotator: str) -> None:
        """Pass over a task: this person is not asked again, others may be.

        Raises:
            UnknownTask, AlreadyAnswered, StaleTask: if that assignment is not open.
        """
        ...

    def undo(self, annotator: str) -> Assignment | None:
        """Take this person's last answer or skip back and give its task again, shown as before.

        The task that was open goes back to the pile.

        Returns:
            What is open now, or None if there was nothing to take back.
        """
        ...

    def progress(self, annotator: str) -> Progress:
        """How far this person is."""
        ...

    def answers(self) -> list[Answer]:
        """Every answer, the oldest first; skipped tasks are not among them."""
        ...

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
        ...

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
        ...

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
        ...
