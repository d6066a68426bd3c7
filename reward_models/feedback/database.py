"""The SQLite file that holds feedback: opening it safely, its tables, their versions.

What is in the tables is the business of `store` and `accounts`.
"""


class StoreError(OSError):
    """The file cannot be used: it is no store, a newer one, read-only, locked, or the disk is full.

    Nothing of the step that raised it was saved.
    """


class AnswerError(ValueError):
    """An answer was refused, and nothing was saved."""


class UnknownTask(AnswerError):
    """No such task was ever given out."""


class AlreadyAnswered(AnswerError):
    """The task has been answered or skipped: a form that was sent twice, or from two windows."""


class StaleTask(AnswerError):
    """The task was taken back: undone, expired, or it is somebody else's."""


class UnknownAnnotator(LookupError):
    """Nobody of that name is known."""
