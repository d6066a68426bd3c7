"""Reward model and judge are learned from human feedback."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from configs.settings import Common, Reward
from stages.data import data, source_of
from stages.models import named_model
from stages.process import device_of, say
from stages.report import PEOPLE, agreement
from stages.run_folder import folder_of, left_by, stage

if TYPE_CHECKING:
    from reward_models.ensemble import EnsembleReport
    from reward_models.learned import FitReport


def reward(common: Common, settings: Reward) -> None:
    """Learn reward model and judge from human feedback; leaves reward_model and judge."""
    from reward_models import (
        LearnedRewardModel,
        RewardEnsemble,
        agreement_weights,
        read_feedback,
    )

    if settings.feedback is None:
        parts = {name: data(common) / f"{name}.jsonl" for name in ("reward_model", "judge")}
    else:
        parts = {"reward_model": settings.feedback}
    if settings.judge_feedback is not None:
        parts["judge"] = settings.judge_feedback
    with stage(common, "reward") as (facts, made):
        feedback = {name: read_feedback(file) for name, file in parts.items()}
        for seed, (name, file) in enumerate(parts.items(), start=common.seed):
            records = feedback[name]
            start = {"device": device_of(common), "seed": seed}
            base = named_model(settings.model)
            if settings.model == "sft":
                base = str(left_by("sft", folder_of(common) / "sft"))
            model: LearnedRewardModel | RewardEnsemble
            if name == "reward_model" and settings.members > 1:
                model = RewardEnsemble.from_pretrained(base, settings.members, **start)
            else:
                model = LearnedRewardModel.from_pretrained(base, **start)
            weights = agreement_weights(records) if settings.weigh_annotators else None
            report = model.fit(
                records,
                settings.held_out,
                ties=settings.ties,
                margin=settings.margin,
                label_smoothing=settings.label_smoothing,
                annotator_weights=weights,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                seed=seed,
                progress_bar=True,
            )
            texts = [text for record in records for text in record.texts]
            texts = texts[:: max(1, len(texts) // REFERENCE_TEXTS)]  # files may be in some order
            what = f"{len(texts)} texts of {file.name}"
            model.normalize([""] * len(texts), texts, what)
            model.save(made / name)
            facts[name] = asdict(report)
            say(f"{name}: {agreement(facts[name])}")
            if name == "reward_model":
                draw_calibration(report, made / "calibration.png")
        if not (made / "calibration.png").exists():  # an earlier one is of another model
            (folder_of(common) / "calibration.png").unlink(missing_ok=True)
        facts["model"] = settings.model
        if settings.feedback is None and source_of(common) == "movies":
            facts["people"] = human_agreement()
            say(PEOPLE.format(**facts["people"]))


def draw_calibration(report: "FitReport | EnsembleReport", path: Path) -> None:
    """Draw how far predicted shares are people's, where choices were held out."""
    from reward_models.plots import plot_calibration

    kinds = ("comparisons", "labels")
    parts = {kind: part for kind in kinds if (part := getattr(report.held_out, kind, None))}
    if parts:
        plot_calibration(parts, path)


REFERENCE_TEXTS = 500
"""Texts, about, on which a reward model's scores are brought to mean 0 and SD 1."""


def human_agreement() -> dict[str, float]:
    """Return what frames the models' r: people against people, and a plain lexicon."""
    from reward_models import LexiconSentiment
    from reward_models.assets import sentiment_lexicon
    from reward_models.evaluation import pearson
    from reward_models.human_ratings import load_human_ratings, split_half_correlation

    rated = load_human_ratings(("movies",))
    texts = [item.text for item in rated]
    scores = LexiconSentiment(sentiment_lexicon())(prompts=[""] * len(texts), completions=texts)
    return {
        "split_half": split_half_correlation(rated, repeats=3),
        "lexicon": pearson(scores, [item.mean for item in rated]),
    }
