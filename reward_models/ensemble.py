"""Several reward models that learned apart: their mean, and how far they are from one another.

Where the members disagree, the feedback has not settled what is good. A policy is kept from going
there by a lower score (Coste et al. 2024, Reward model ensembles help mitigate overoptimization,
whose penalty is the variance; ours the standard deviation, in units of the score), and people are
asked there first. What a member is and how it learns is in `learned`.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from reward_models.atomic import atomic_folder
from reward_models.evaluation import EvaluationReport
from reward_models.feedback.records import Feedback
from reward_models.fitting import split
from reward_models.held_out import distinct_texts, held_out_report
from reward_models.learned import FitReport, LearnedRewardModel, Normalization
from reward_models.model_files import require_plain_name

logger = logging.getLogger(__name__)

_SIDE_FILE = "ensemble.json"


@dataclass(frozen=True)
class EnsembleReport:
    """What the members' fits did, and how well their mean agrees with held-out feedback.

    Args:
        members: each member's fit; all are measured on the same held-out feedback.
        held_out: agreement of the mean of their logits; None if nothing was held out.
        spread: mean over the held-out texts (those learned from if there are none) of the standard
            deviation of the members' scores.
    """

    members: tuple[FitReport, ...]
    held_out: EvaluationReport | None
    spread: float


class RewardEnsemble:
    """Scores a text by the mean of its members' scores less λ times their standard deviation.

    Get one from `from_pretrained` (a backbone, to be fitted) or `load` (a fitted ensemble). Calling
    it is the contract of `RewardFunction`.

    Args:
        members: at least two; their scores have to be comparable, as `fit` and `normalize` make
            them: comparisons alone leave each model a zero of its own.
        penalty: λ, 0 or more.
    """

    def __init__(self, members: Sequence[LearnedRewardModel], penalty: float = 1.0) -> None:
        if len(members) < 2:
            raise ValueError(f"expected at least two members, got {len(members)}")
        if not 0 <= penalty < float("inf"):
            raise ValueError(f"expected a penalty of 0 or more, got {penalty}")
        self.members = list(members)
        self.penalty = penalty

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        n_members: int = 4,
        penalty: float = 1.0,
        device: str | th.device = "auto",
        max_length: int | None = None,
        seed: int = 0,
    ) -> "RewardEnsemble":
        """Start every member from the same pretrained model, each with a new head of its own.

        Args:
            path_or_id: a folder or a hub id that transformers loads.
            n_members: how many, at least two.
            penalty: λ.
            device: as in `LearnedRewardModel.from_pretrained`; `max_length` too.
            max_length: longest text, tokens.
            seed: of the first member's head; the others have the numbers after it.
        """
        seeds = range(seed, seed + n_members)
        made = LearnedRewardModel.from_pretrained
        return cls([made(path_or_id, device, max_length, s) for s in seeds], penalty)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str | th.device = "auto"
    ) -> "RewardEnsemble":
        """Load what `save` wrote.

        Raises:
            OSError: if there is no ensemble there.
            ValueError: if its side file is broken, or names a folder elsewhere.
        """
        file = Path(path) / _SIDE_FILE
        try:
            side = json.loads(file.read_text(encoding="utf-8"))
            names, penalty = list(side["members"]), float(side["penalty"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{file}: expected what RewardEnsemble.save wrote ({error})"
            ) from error
        for name in names:
            require_plain_name(name, file)
        return cls([LearnedRewardModel.load(Path(path) / name, device) for name in names], penalty)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a folder with a folder for each member, `member-0` first; at once or not at all.

        Raises:
            FileExistsError: if the folder exists and `overwrite` is false.
            OSError: if the disk is full; nothing is left behind then.
        """
        names = [f"member-{i}" for i in range(len(self.members))]
        side = {"members": names, "penalty": self.penalty}
        with atomic_folder(path, overwrite) as folder:
            for name, member in zip(names, self.members, strict=True):
                (folder / name).mkdir()
                member.write_into(folder / name)
            (folder / _SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n", encoding="utf-8")
        return Path(path)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion; see `RewardFunction`."""
        return self.score(prompts, completions)

    def score(
        self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
    ) -> np.ndarray:
        """Mean of the members' scores less λ times their standard deviation.

        Args:
            prompts: the texts' beginnings, length B.
            completions: their continuations, length B.
            batch_size: texts per forward pass of a member.

        Returns:
            Scores, float32, shape (B,).
        """
        scores = self._scores(prompts, completions, batch_size)
        return scores.mean(axis=0) - np.float32(self.penalty) * scores.std(axis=0)

    def spread(
        self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
    ) -> np.ndarray:
        """Standard deviation of the members' scores (divided by their number), float32, (B,)."""
        return self._scores(prompts, completions, batch_size).std(axis=0)

    def pair_uncertainty(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        batch_size: int = 64,
    ) -> np.ndarray:
        """How much the members disagree on which completion people prefer; ask the highest first.

        It is the standard deviation over members of the probability that the first is preferred
        (Christiano et al. 2017, section 2.2.4), and not of the margin, which is large where all
        members are sure, nor the entropy of the mean, which is large where all agree on a tie.

        Args:
            prompts: what the completions continue, length B.
            first: completions, length B.
            second: the other completions, length B.
            batch_size: texts per forward pass of a member.

        Returns:
            From 0 to 0.5, float64, shape (B,); sides can be swapped.
        """
        preferences = [m.preference(prompts, first, second, batch_size) for m in self.members]
        return np.std(preferences, axis=0)

    def normalize(
        self, prompts: Sequence[str], completions: Sequence[str], reference: str
    ) -> list[Normalization]:
        """Give every member mean 0 and SD 1 on a reference set.

        Arguments and errors as in `LearnedRewardModel.normalize`.
        """
        return [member.normalize(prompts, completions, reference) for member in self.members]

    def fit(
        self,
        feedback: Sequence[Feedback],
        eval_feedback: Sequence[Feedback] | float | None = None,
        *,
        bootstrap: bool = True,
        seed: int = 0,
        **arguments: Any,
    ) -> EnsembleReport:
        """Fit every member apart, then normalise all of them on the texts learned from.

        Args:
            feedback: what to learn from.
            eval_feedback: what to report on, the same for all members: records, or the fraction of
                the texts to hold out.
            bootstrap: each member learns from as many records drawn with replacement (Breiman
                1996); otherwise from all of them, and members differ by their heads and orders.
            seed: of the split and of the first member; the others have the numbers after it.
            arguments: of `LearnedRewardModel.fit`.

        Raises:
            ValueError: as `LearnedRewardModel.fit`.
        """
        learned, held_out = split(feedback, eval_feedback, seed)
        if not learned:
            raise ValueError("expected feedback to learn from, got none")
        reports = []
        for i, member in enumerate(self.members, start=seed):
            drawn = np.random.default_rng(i).integers(len(learned), size=len(learned))
            own = [learned[k] for k in drawn] if bootstrap else learned
            reports.append(member.fit(own, held_out or None, seed=i, **arguments))
            logger.info("fitted member %d of %d", len(reports), len(self.members))
        texts = distinct_texts(learned)
        self.normalize([""] * len(texts), texts, f"the {len(texts)} texts it was fitted on")
        measured = distinct_texts(held_out) if held_out else texts
        return EnsembleReport(
            members=tuple(reports),
            held_out=self.evaluate(held_out) if held_out else None,
            spread=float(self.spread([""] * len(measured), measured).mean()),
        )

    def evaluate(self, feedback: Sequence[Feedback]) -> EvaluationReport:
        """Compare the mean of the members' logits with feedback that was held out.

        Raises:
            ValueError: if there is no feedback.
        """
        texts = distinct_texts(feedback)
        logits = np.mean([m.logits([""] * len(texts), texts) for m in self.members], axis=0)
        thresholds = [m.tie_threshold for m in self.members if m.tie_threshold is not None]
        return held_out_report(
            feedback,
            dict(zip(texts, logits.astype(np.float64), strict=True)),
            next((m.scale for m in self.members if m.scale is not None), None),
            float(np.mean(thresholds)) if thresholds else None,
        )

    def _scores(
        self, prompts: Sequence[str], completions: Sequence[str], batch_size: int
    ) -> np.ndarray:
        """Scores of each member, float32, shape (members, B)."""
        return np.stack([m.score(prompts, completions, batch_size) for m in self.members])


def load_reward_model(
    path_or_id: str | os.PathLike[str], device: str | th.device = "auto"
) -> LearnedRewardModel | RewardEnsemble:
    """Load what `save` of either wrote, or any sequence classifier with one label.

    Raises:
        OSError: if there is no model there.
        ValueError: if it is neither.
    """
    is_ensemble = (Path(path_or_id) / _SIDE_FILE).exists()
    return (RewardEnsemble if is_ensemble else LearnedRewardModel).load(path_or_id, device)
