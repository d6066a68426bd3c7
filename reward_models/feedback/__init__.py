"""Human feedback: the records it consists of. Its collection and storage are not here."""

from reward_models.feedback.records import (
    Comparison,
    Feedback,
    Label,
    Rating,
    read_feedback,
    write_feedback,
)

__all__ = ["Comparison", "Feedback", "Label", "Rating", "read_feedback", "write_feedback"]
