"""Human feedback: collecting it, keeping it, and the records it consists of.

What is learned from it is not here.
"""

from reward_models.feedback.accounts import Account, Accounts
from reward_models.feedback.chats import Chat, Message, chats_of
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
    with_chats,
)

__all__ = [
    "Account",
    "Accounts",
    "AlreadyAnswered",
    "Answer",
    "AnswerError",
    "Assignment",
    "Chat",
    "Comparison",
    "Feedback",
    "FeedbackStore",
    "Label",
    "Message",
    "Progress",
    "Rating",
    "StaleTask",
    "StoreError",
    "Task",
    "UnknownAnnotator",
    "UnknownTask",
    "chats_of",
    "read_feedback",
    "read_ratings_csv",
    "tasks_from_completions",
    "tasks_from_jsonl",
    "tasks_side_by_side",
    "with_chats",
    "write_feedback",
    "write_ratings_csv",
]
