"""From logits of texts and what people said of these texts to a report of agreement.

Which texts are held out is decided in `fitting`, how agreement is measured in `evaluation`.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from reward_models.batches import claim, to_scale
from reward_models.evaluation import (
    ChoiceReport,
    EvaluationReport,
    GroupReport,
    RatingReport,
    choice_report,
    pearson,
    rating_report,
    right_choices,
    share_interval,
)
from reward_models.feedback.records import Comparison, Feedback, Label, Rating
from reward_models.loss import expected_share


def distinct_texts(records: Iterable[Feedback]) -> list[str]:
    """Each text of the records once, sorted."""
    return sorted({text for record in records for text in record.texts})


def held_out_report(
    records: Sequence[Feedback],
    logits: Mapping[str, float],
    scale: tuple[float, float] | None,
    tie_threshold: float | None,
) -> EvaluationReport:
    """Compare predictions with feedback, in all and by annotator and origin.

    Ratings of one text by several people are averaged first, but for the groups.

    Args:
        records: what people said.
        logits: of each text among them.
        scale: the human scale that ratings are predicted on; None for logits.
        tie_threshold: η of Rao & Kupper if the model was fitted so.

    Raises:
        ValueError: if there are no records.
    """
    if not records:
        raise ValueError("expected feedback to compare with, got none")
    ratings = [record for record in records if isinstance(record, Rating)]
    comparisons = [record for record in records if isinstance(record, Comparison)]
    labels = [record for record in records if isinstance(record, Label)]

    def grouped(key: str) -> dict[str, GroupReport]:
        groups: dict[str, list[Feedback]] = {}
        for record in records:
            if getattr(record, key) is not None:
                groups.setdefault(getattr(record, key), []).append(record)
        return {name: _group_report(groups[name], logits) for name in sorted(groups)}

    return EvaluationReport(
        ratings=_rating_report(ratings, logits, scale) if ratings else None,
        comparisons=_choice_report(comparisons, logits, tie_threshold) if comparisons else None,
        labels=_choice_report(labels, logits, None) if labels else None,
        annotators=grouped("annotator"),
        origins=grouped("origin"),
    )


def _rating_report(
    records: Sequence[Rating], logits: Mapping[str, float], scale: tuple[float, float] | None
) -> RatingReport:
    by_text: dict[str, list[float]] = {}
    for record in records:
        by_text.setdefault(record.texts[0], []).append(record.rating)
    predicted = to_scale(np.array([logits[text] for text in by_text]), scale)
    return rating_report(predicted, np.array([np.mean(given) for given in by_text.values()]))


def _choice_report(
    records: Sequence[Comparison | Label],
    logits: Mapping[str, float],
    tie_threshold: float | None,
) -> ChoiceReport:
    margins, observed = _choices(records, logits)
    compared = isinstance(records[0], Comparison)
    return choice_report(expected_share(margins, tie_threshold), observed, interchangeable=compared)


def _group_report(records: Sequence[Feedback], logits: Mapping[str, float]) -> GroupReport:
    choices = [record for record in records if isinstance(record, Comparison | Label)]
    ratings = [record for record in records if isinstance(record, Rating)]
    right, decided = right_choices(*_choices(choices, logits))
    share = share_interval(right, decided) if decided else None
    predicted = [logits[record.texts[0]] for record in ratings]
    return GroupReport(
        choices=decided,
        accuracy=(share[0], share[1], share[2]) if share else None,
        ratings=len(ratings),
        pearson=pearson(predicted, [record.rating for record in ratings]) if ratings else None,
    )


def _choices(
    records: Sequence[Comparison | Label], logits: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Margins, and what was chosen: 1 for the first side or good, 0.5 for a tie; both (n,)."""
    margins = [
        logits[record.texts[0]] - (logits[record.texts[1]] if len(record.texts) == 2 else 0.0)
        for record in records
    ]
    return np.array(margins), np.array([claim(record).target for record in records])
