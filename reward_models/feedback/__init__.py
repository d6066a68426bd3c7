"""Human feedback: collecting it, keeping it, and the records it consists of.

What is learned from it is not here.
"""

from reward_models.feedback.accounts import Account, Accounts
from reward_models.feedback.conversion import read_ratings_csv, write_ratings_csv
from reward_models.feedback.database import (
    AlreadyAnswered,
    AnswerError,
    StaleTask,
    StoreError,
    UnknownAnnotator,
    UnknownTask,
)
from reward_models.feedback.records import (
    Comparison,
    Feedback,
    Label,
    Rating,
    read_feedback,
    write_feedback,
)
from reward_models.feedback.store import FeedbackStore, Progress
from reward_models.feedback.tasks import (
    Answer,
    Assignment,
    Task,
    tasks_from_completions,
    tasks_from_jsonl,
    tasks_side_by_side,
)

__all__ = [
    "Account",
    "Accounts",
    "AlreadyAnswered",
    "Answer",
    "AnswerError",
    "Assignment",
    "Comparison",
    "Feedback",
    "FeedbackStore",
    "Label",
    "Progress",
    "Rating",
    "StaleTask",
    "StoreError",
    "Task",
    "UnknownAnnotator",
    "UnknownTask",
    "read_feedback",
    "read_ratings_csv",
    "tasks_from_completions",
    "tasks_from_jsonl",
    "tasks_side_by_side",
    "write_feedback",
    "write_ratings_csv",
]
