"""A reward model learned from human feedback: a pretrained backbone with one output.

It learns from ratings, comparisons and labels, alone or mixed, through one number per text, the
logit; how is in `loss` and `fitting`. Ensembles and metrics are not here, nor is the collection of
feedback.
"""

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch as th
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reward_models.atomic import atomic_folder
from reward_models.batches import Example, claim, pad, to_scale
from reward_models.evaluation import EvaluationReport
from reward_models.feedback.records import Feedback
from reward_models.fitting import (
    common_scale,
    own_random_numbers,
    record_weights,
    split,
    train,
)
from reward_models.held_out import distinct_texts, held_out_report
from reward_models.loss import expected_share
from reward_models.model_files import SAFELY, check_model_folder

logger = logging.getLogger(__name__)

_SIDE_FILE = "reward_model.json"


@dataclass(frozen=True)
class Normalization:
    """The reference set on which scores have mean 0 and standard deviation 1.

    Args:
        mean: mean logit of its texts.
        sd: standard deviation of their logits.
        n: number of its texts.
        reference: what set it is, in words.
    """

    mean: float = 0.0
    sd: float = 1.0
    n: int = 0
    reference: str = "none: scores are logits"


@dataclass(frozen=True)
class FitReport:
    """What a fit did, and how well the result agrees with feedback held out from it.

    `dataclasses.asdict` makes it ready for JSON.

    Args:
        records: number of records learned from.
        steps: number of weight updates.
        seconds: duration of the training, without the evaluation.
        train_loss: mean loss over the whole training, nats per record.
        held_out: agreement with the held-out feedback; None if there was none.
        tie_threshold: η of Rao & Kupper, on the logit scale; None if ties are half-wins.
    """

    records: int
    steps: int
    seconds: float
    train_loss: float
    held_out: EvaluationReport | None
    tie_threshold: float | None = None


class LearnedRewardModel:
    """Scores a text, prompt and completion joined as a reader sees them, with one forward pass.

    Get one from `from_pretrained` (a backbone, to be fitted) or `load` (a fitted model). Calling
    it is the contract of `RewardFunction`. Texts longer than `max_length` lose their beginning,
    since the completion, which is judged, stands at the end.

    Args:
        model: a sequence classifier with one label.
        tokenizer: its tokenizer.
        max_length: longest text, tokens.
        normalization: how logits become scores.
        scale: the human scale that the model was fitted on, if it was fitted on ratings.
        tie_threshold: η of Rao & Kupper, if it was fitted on ties in that way; see `loss`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        normalization: Normalization | None = None,
        scale: tuple[float, float] | None = None,
        tie_threshold: float | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.normalization = normalization or Normalization()
        self.scale = scale
        self.tie_threshold = tie_threshold

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        device: str | th.device = "auto",
        max_length: int | None = None,
        seed: int = 0,
    ) -> "LearnedRewardModel":
        """Start from a pretrained encoder or decoder; a new head is drawn if it has none.

        Args:
            path_or_id: a folder or a hub id that transformers loads.
            device: "auto" is CUDA if there is one, then MPS, then CPU.
            max_length: longest text, tokens; at most what the backbone takes, and 512 if not
                given.
            seed: of the new head's weights. The caller's random numbers are left alone.

        Raises:
            OSError: if there is no model there.
            ValueError: if its files are damaged, or not what they should be.
        """
        check_model_folder(Path(path_or_id))
        try:
            with own_random_numbers(seed):
                model = AutoModelForSequenceClassification.from_pretrained(
                    path_or_id,
                    num_labels=1,
                    dtype=th.float32,
                    ignore_mismatched_sizes=True,
                    **SAFELY,
                )
        except SafetensorError as error:
            raise ValueError(f"{path_or_id}: expected weights as safetensors, {error}") from error
        except ValueError as error:  # whose message may list a hundred kinds of models
            said, unknown, _ = str(error).partition(" for this kind of AutoModel")
            if not unknown:
                raise
            raise ValueError(
                f"{path_or_id}: expected a model that transformers has as a sequence classifier "
                f"({said}); give a reward model another backbone"
            ) from error
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
        tokenizer.truncation_side = "left"
        tokenizer.padding_side = "right"  # a decoder's head reads the last token that is no padding
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        limit = _longest_input(model, tokenizer)
        if max_length is not None and not 1 <= max_length <= limit:
            raise ValueError(f"expected max_length from 1 to {limit} tokens, got {max_length}")
        return cls(model.to(_device(device)), tokenizer, max_length or min(limit, 512))

    @classmethod
    def load(
        cls, path_or_id: str | os.PathLike[str], device: str | th.device = "auto"
    ) -> "LearnedRewardModel":
        """Load what `save` wrote, or any sequence classifier with one label.

        Raises:
            OSError: if there is no model there.
            ValueError: if it has no head yet, or one with several labels.
        """
        side = _read_side_file(Path(path_or_id) / _SIDE_FILE)
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
        if config.num_labels != 1 or not _is_classifier(config):
            raise ValueError(
                f"{path_or_id}: expected a classifier with one label, got one with no head or with "
                "several: use from_pretrained and fit"
            )
        reward_model = cls.from_pretrained(path_or_id, device, side.get("max_length"))
        if "normalization" in side:
            reward_model.normalization = side["normalization"]
        if side.get("scale"):
            reward_model.scale = (side["scale"][0], side["scale"][1])
        reward_model.tie_threshold = side.get("tie_threshold")
        return reward_model

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a folder that `load`, transformers and TRL read; at once or not at all.

        The scores that others get from it are the logits; normalisation and human scale stand
        in `reward_model.json` beside the model.

        Raises:
            FileExistsError: if the folder exists and `overwrite` is false.
            OSError: if the disk is full; nothing is left behind then.
        """
        with atomic_folder(path, overwrite) as folder:
            self.write_into(folder)
        return Path(path)

    def write_into(self, folder: Path) -> None:
        """Write the files of `save` into a folder that is there, one after the other."""
        side = {
            "max_length": self.max_length,
            "normalization": asdict(self.normalization),
            "scale": self.scale,
            "tie_threshold": self.tie_threshold,
        }
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / _SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n", encoding="utf-8")

    @property
    def device(self) -> th.device:
        """Where the model computes."""
        return self.model.device

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion; see `RewardFunction`."""
        return self.score(prompts, completions)

    def score(
        self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
    ) -> np.ndarray:
        """Normalised scores: mean 0 and SD 1 on the reference set, logits if there is none.

        Args:
            prompts: the texts' beginnings, length B.
            completions: their continuations, length B.
            batch_size: texts per forward pass; it changes the speed, not the scores.

        Returns:
            Scores, float32, shape (B,).
        """
        logits = self.logits(prompts, completions, batch_size)
        return (logits - np.float32(self.normalization.mean)) / np.float32(self.normalization.sd)

    def human_scale(
        self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
    ) -> np.ndarray:
        """The ratings that people are expected to give, without normalisation.

        Returns:
            Ratings on `scale`, float32, shape (B,); a model that was never fitted on ratings gives
            logits. They are not clipped, so they can leave the scale.
        """
        return to_scale(self.logits(prompts, completions, batch_size), self.scale)

    def logits(
        self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
    ) -> np.ndarray:
        """What the model itself puts out, float32, shape (B,): the differences are log-odds."""
        return self._logits(_join(prompts, completions), batch_size)

    def preference(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        batch_size: int = 64,
    ) -> np.ndarray:
        """How likely people prefer the first of two completions; a tie is half of each.

        Args:
            prompts: what the completions continue, length B.
            first: completions, length B.
            second: the other completions, length B.
            batch_size: texts per forward pass.

        Returns:
            Probabilities, float64, shape (B,).
        """
        logits = self._logits([*_join(prompts, first), *_join(prompts, second)], batch_size)
        margins = (logits[: len(first)] - logits[len(first) :]).astype(np.float64)
        return 1 / (1 + np.exp(-expected_share(margins, self.tie_threshold)))

    def normalize(
        self, prompts: Sequence[str], completions: Sequence[str], reference: str
    ) -> Normalization:
        """Shift and stretch the scores to mean 0 and SD 1 on a reference set.

        Args:
            prompts: the set's prompts, length B.
            completions: the set's completions, length B.
            reference: what set it is, in words; stored with the model.

        Raises:
            ValueError: if the set has fewer than two texts or all score the same.
        """
        logits = self._logits(_join(prompts, completions)).astype(np.float64)
        if len(logits) < 2 or not logits.std() > 0:
            raise ValueError(
                f"expected a reference set of texts with different scores, got {len(logits)} "
                "texts that all score the same"
            )
        self.normalization = Normalization(
            float(logits.mean()), float(logits.std()), len(logits), reference
        )
        return self.normalization

    def fit(
        self,
        feedback: Sequence[Feedback],
        eval_feedback: Sequence[Feedback] | float | None = None,
        *,
        epochs: float = 1.0,
        max_steps: int | None = None,
        batch_size: int = 32,
        learning_rate: float = 1e-4,
        seed: int = 0,
        ties: Literal["half", "rao-kupper"] = "half",
        margin: float = 0.0,
        label_smoothing: float = 0.0,
        annotator_weights: Mapping[str, float] | None = None,
        bf16: bool | None = None,
        progress_bar: bool = False,
        on_log: Callable[[dict[str, float]], None] | None = None,
    ) -> FitReport:
        """Learn from feedback of one kind or of several, mixed in every batch.

        AdamW with a linear warm-up over the first tenth and a linear decay to 0; batches of texts
        of similar length. The normalisation is reset, since it belonged to the old weights. The
        caller's random numbers (Python, NumPy, torch) are left alone.

        Args:
            feedback: what to learn from.
            eval_feedback: what to report on: records, or the fraction of the texts to hold out.
                Held-out texts are never learned from: training records that share one are dropped.
            epochs: passes over the feedback.
            max_steps: number of updates, instead of `epochs`.
            batch_size: records per update.
            learning_rate: the highest one.
            seed: of the split and of the order.
            ties: "half" a win for each side, or "rao-kupper": the less the texts differ, the more
                likely, with a threshold that is learned; formulas in `loss`.
            margin: how far the logit of the chosen side has to be above the other's.
            label_smoothing: the share of choices expected to be the wrong way round, below 0.5.
            annotator_weights: how much an annotator's records count, by pseudonym; 1 for others.
                `feedback.weights.agreement_weights` works them out.
            bf16: compute products in bfloat16, which halves the time where the hardware has it;
                weights and scoring stay float32. Not given: where the hardware has it.
            progress_bar: show one.
            on_log: called some fifty times with `step`, `loss`, `learning_rate` and `grad_norm`.

        Raises:
            ValueError: if there is nothing to learn from, the scales of the ratings differ, an
                argument is out of its range, or the loss stops being finite.
        """
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"expected max_steps of 1 or more, or None, got {max_steps}")
        if ties not in ("half", "rao-kupper"):
            raise ValueError(f"expected ties 'half' or 'rao-kupper', got {ties!r}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"expected label_smoothing from 0 to below 0.5, got {label_smoothing}")
        if not 0 <= margin < math.inf or (margin > 0 and ties == "rao-kupper"):
            raise ValueError(
                "expected a margin of 0 or more, and 0 with ties by Rao & Kupper, whose threshold "
                f"would take it in, got {margin}"
            )
        learned, held_out = split(feedback, eval_feedback, seed)
        if not learned:
            raise ValueError("expected feedback to learn from, got none")
        weights = record_weights(learned, annotator_weights)
        self.scale = common_scale([*learned, *held_out])
        self.normalization, self.tie_threshold = Normalization(), None
        with own_random_numbers(seed), tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            result, self.tie_threshold = train(
                self.model,
                [
                    Example(self._encode(record.texts), claim(record, label_smoothing), weight)
                    for record, weight in zip(learned, weights, strict=True)
                ],
                bf16,
                on_log,
                margin=margin,
                learn_ties=ties == "rao-kupper",
                output_dir=folder,
                num_train_epochs=epochs,
                max_steps=-1 if max_steps is None else max_steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                seed=seed,
                disable_tqdm=not progress_bar,
            )
            seconds = time.perf_counter() - start
        report = FitReport(
            records=len(learned),
            steps=result.global_step,
            seconds=seconds,
            train_loss=result.training_loss,
            held_out=self.evaluate(held_out) if held_out else None,
            tie_threshold=self.tie_threshold,
        )
        logger.info("fitted on %d records in %.0f s", len(learned), seconds)
        return report

    def evaluate(self, feedback: Sequence[Feedback]) -> EvaluationReport:
        """Compare with feedback that was held out.

        Ratings of one text by several people are averaged first.

        Raises:
            ValueError: if there is no feedback.
        """
        texts = distinct_texts(feedback)
        logits = dict(zip(texts, self._logits(texts).astype(np.float64), strict=True))
        return held_out_report(feedback, logits, self.scale, self.tie_threshold)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, from 1 to `max_length` of them."""
        rows = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, verbose=False
        )["input_ids"]
        return [row or [self.tokenizer.pad_token_id] for row in rows]

    @th.inference_mode()
    def _logits(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """One logit per text, float32, shape (B,); texts of similar length share a batch."""
        rows = self._encode(texts) if texts else []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        logits = np.zeros(len(rows), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = pad([rows[i] for i in chosen], self.tokenizer.pad_token_id)
            output = self.model(ids.to(self.device), attention_mask=mask.to(self.device))
            logits[chosen] = output.logits[:, 0].float().cpu().numpy()
        return logits


def _join(prompts: Sequence[str], completions: Sequence[str]) -> list[str]:
    if len(prompts) != len(completions):
        raise ValueError(
            f"expected as many prompts as completions, got {len(prompts)} and {len(completions)}"
        )
    return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]


def _read_side_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        side = json.loads(path.read_text(encoding="utf-8"))
        normalization = Normalization(**side.get("normalization", {}))
        if not (math.isfinite(normalization.mean) and 0 < normalization.sd < math.inf):
            raise ValueError(f"expected a finite mean and sd > 0, got {normalization}")
        scale = side.get("scale")
        if scale and not -math.inf < scale[0] < scale[1] < math.inf:
            raise ValueError(f"expected scale [lowest, highest], got {scale}")
        return {**side, "normalization": normalization, "scale": scale}
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected what LearnedRewardModel.save wrote ({error})"
        ) from error


def _is_classifier(config: PretrainedConfig) -> bool:
    names = config.architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def _longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the backbone takes at most."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    return int(min(positions, tokenizer.model_max_length, 1 << 20))


def _device(name: str | th.device) -> th.device:
    if name != "auto":
        return th.device(name)
    if th.cuda.is_available():
        return th.device("cuda")
    return th.device("mps" if th.backends.mps.is_available() else "cpu")
