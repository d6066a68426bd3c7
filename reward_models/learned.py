"""A reward model learned from human feedback: a pretrained backbone with one output.

It learns from ratings, comparisons and labels, alone or mixed, through one number per text, the
logit u. Every record is a claim about a margin m of logits, and the loss is the mean negative
log-likelihood of the records, in nats:

    rating      m = u(text)                    (m − r)² / 2, r the rating on the logit scale
    comparison  m = u(chosen) − u(rejected)    −log σ(m)     (Bradley & Terry 1952; a tie is half
                                                              a win for each side)
    label       m = u(text)                    −log σ(m) if good, −log σ(−m) if bad

The logit scale puts the ends of a human scale at −4 and +4, where σ is 0.02 and 0.98, so all three
pull on u with about the same strength. A scale from −4 to +4 is the logit itself.

Ensembles and metrics are not here, nor is the collection of feedback.
"""

import json
import logging
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch as th
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from reward_models.atomic import atomic_folder
from reward_models.evaluation import EvaluationReport, choice_report, rating_report
from reward_models.feedback.records import Comparison, Feedback, Label, Rating

logger = logging.getLogger(__name__)

LOGIT_END = 4.0
"""Logit of a human scale's upper end; its lower end is at the negative."""

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
    """

    records: int
    steps: int
    seconds: float
    train_loss: float
    held_out: EvaluationReport | None


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
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        normalization: Normalization | None = None,
        scale: tuple[float, float] | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.normalization = normalization or Normalization()
        self.scale = scale

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
        """
        with _own_random_numbers(seed):
            model = AutoModelForSequenceClassification.from_pretrained(
                path_or_id, num_labels=1, dtype=th.float32, ignore_mismatched_sizes=True
            )
        tokenizer = AutoTokenizer.from_pretrained(path_or_id)
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
        config = AutoConfig.from_pretrained(path_or_id)
        if config.num_labels != 1 or not _is_classifier(config):
            raise ValueError(
                f"{path_or_id}: expected a classifier with one label, got one with no head or with "
                "several: use from_pretrained and fit"
            )
        reward_model = cls.from_pretrained(path_or_id, device, side.get("max_length"))
        if "normalization" in side:
            reward_model.normalization = Normalization(**side["normalization"])
        if side.get("scale"):
            reward_model.scale = (side["scale"][0], side["scale"][1])
        return reward_model

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a folder that `load`, transformers and TRL read; at once or not at all.

        The scores that others get from it are the logits; normalisation and human scale stand
        in `reward_model.json` beside the model.

        Raises:
            FileExistsError: if the folder exists and `overwrite` is false.
            OSError: if the disk is full; nothing is left behind then.
        """
        side = {
            "max_length": self.max_length,
            "normalization": asdict(self.normalization),
            "scale": self.scale,
        }
        with atomic_folder(path, overwrite) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            (folder / _SIDE_FILE).write_text(json.dumps(side, indent=2) + "\n", encoding="utf-8")
        return Path(path)

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
        logits = self._logits(_join(prompts, completions), batch_size)
        return (logits - np.float32(self.normalization.mean)) / np.float32(self.normalization.sd)

    def human_scale(
        self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
    ) -> np.ndarray:
        """The ratings that people are expected to give, without normalisation.

        Returns:
            Ratings on `scale`, float32, shape (B,); a model that was never fitted on ratings gives
            logits. They are not clipped, so they can leave the scale.
        """
        return self._to_scale(self._logits(_join(prompts, completions), batch_size))

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
            bf16: compute products in bfloat16, which halves the time where the hardware has it;
                weights and scoring stay float32. Not given: where the hardware has it.
            progress_bar: show one.
            on_log: called some fifty times with `step`, `loss`, `learning_rate` and `grad_norm`.

        Raises:
            ValueError: if there is nothing to learn from, the scales of the ratings differ, or the
                loss stops being finite.
        """
        train, held_out = _split(feedback, eval_feedback, seed)
        if not train:
            raise ValueError("expected feedback to learn from, got none")
        self.scale = _common_scale([*train, *held_out])
        self.normalization = Normalization()
        with _own_random_numbers(seed), tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            result = self._train(
                [self._example(record) for record in train],
                TrainingArguments(
                    output_dir=folder,
                    num_train_epochs=epochs,
                    max_steps=max_steps or -1,
                    per_device_train_batch_size=batch_size,
                    learning_rate=learning_rate,
                    lr_scheduler_type="linear",
                    warmup_steps=0.1,
                    weight_decay=0.01,
                    logging_steps=0.02,
                    logging_nan_inf_filter=False,
                    disable_tqdm=not progress_bar,
                    seed=seed,
                    save_strategy="no",
                    report_to="none",
                    remove_unused_columns=False,
                    use_cpu=self.device.type == "cpu",
                    dataloader_pin_memory=self.device.type == "cuda",
                ),
                _has_bf16(self.device) if bf16 is None else bf16,
                on_log,
            )
            seconds = time.perf_counter() - start
        report = FitReport(
            records=len(train),
            steps=result.global_step,
            seconds=seconds,
            train_loss=result.training_loss,
            held_out=self.evaluate(held_out) if held_out else None,
        )
        logger.info("fitted on %d records in %.0f s", len(train), seconds)
        return report

    def evaluate(self, feedback: Sequence[Feedback]) -> EvaluationReport:
        """Compare with feedback that was held out.

        Ratings of one text by several people are averaged first.

        Raises:
            ValueError: if there is no feedback.
        """
        if not feedback:
            raise ValueError("expected feedback to compare with, got none")
        texts = sorted({text for record in feedback for text in record.texts})
        logit = dict(zip(texts, self._logits(texts).astype(np.float64), strict=True))
        return EvaluationReport(
            ratings=self._rating_report([r for r in feedback if isinstance(r, Rating)], logit),
            comparisons=_choice_report([r for r in feedback if isinstance(r, Comparison)], logit),
            labels=_choice_report([r for r in feedback if isinstance(r, Label)], logit),
        )

    def _rating_report(self, records: Sequence[Rating], logit: dict[str, float]) -> Any:
        if not records:
            return None
        by_text: dict[str, list[float]] = {}
        for record in records:
            by_text.setdefault(record.texts[0], []).append(record.rating)
        predicted = self._to_scale(np.array([logit[text] for text in by_text]))
        return rating_report(predicted, np.array([np.mean(given) for given in by_text.values()]))

    def _to_scale(self, logits: np.ndarray) -> np.ndarray:
        if self.scale is None:
            return logits
        low, high = self.scale
        return ((low + high) / 2 + logits * ((high - low) / (2 * LOGIT_END))).astype(logits.dtype)

    def _train(
        self,
        examples: Sequence["_Example"],
        arguments: TrainingArguments,
        bf16: bool,
        on_log: Callable[[dict[str, float]], None] | None,
    ) -> Any:
        trainer = _FeedbackTrainer(
            bf16,
            model=self.model,
            args=arguments,
            train_dataset=examples,
            data_collator=self._collate,
            callbacks=[_Watch(on_log)],
        )
        trainer.remove_callback(PrinterCallback)
        device = self.device
        try:
            return trainer.train()
        finally:
            self.model.to(device).eval()
            self.model.zero_grad(set_to_none=True)

    def _example(self, record: Feedback) -> "_Example":
        return _Example(self._encode(record.texts), *_claim(record))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, from 1 to `max_length` of them."""
        rows = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, verbose=False
        )["input_ids"]
        return [row or [self.tokenizer.pad_token_id] for row in rows]

    def _pad(self, rows: Sequence[list[int]]) -> dict[str, th.Tensor]:
        """Right-padded ids and their mask, both of shape (rows, longest row)."""
        ids = th.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id)
        mask = th.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = th.tensor(row)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _collate(self, examples: Sequence["_Example"]) -> "_Batch":
        rows = [row for example in examples for row in example.rows]
        ends = np.cumsum([len(example.rows) for example in examples])
        starts = ends - [len(example.rows) for example in examples]
        second = np.where(ends - starts == 2, starts + 1, len(rows))
        return _Batch(
            **self._pad(rows),
            first=th.as_tensor(starts),
            second=th.as_tensor(second),
            target=th.tensor([example.target for example in examples]),
            is_rating=th.tensor([example.is_rating for example in examples]),
        )

    @th.inference_mode()
    def _logits(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """One logit per text, float32, shape (B,); texts of similar length share a batch."""
        rows = self._encode(texts) if texts else []
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        logits = np.zeros(len(rows), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = self._pad([rows[i] for i in chosen])
            output = self.model(**{key: value.to(self.device) for key, value in inputs.items()})
            logits[chosen] = output.logits[:, 0].float().cpu().numpy()
        return logits


class _Example(NamedTuple):
    """A record, ready for the model: one or two rows of ids, and the claim about their margin."""

    rows: list[list[int]]
    target: float
    is_rating: bool


class _Batch(TypedDict):
    """R records over T texts, padded to L tokens.

    `first` and `second` (R,) index the texts whose logits' difference is the margin; `second` is
    T, which stands for the logit 0, where the record has one text only.
    """

    input_ids: th.Tensor
    attention_mask: th.Tensor
    first: th.Tensor
    second: th.Tensor
    target: th.Tensor
    is_rating: th.Tensor


class _FeedbackTrainer(Trainer):
    """transformers' Trainer with the loss of this module and batches of similar length.

    Its own `bf16` is not used: it patches the model's forward, and scores would stay imprecise
    after the training.

    Args:
        autocast: whether to compute products in bfloat16.
        arguments: for `Trainer`.
    """

    def __init__(self, autocast: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.autocast = autocast

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        model.eval()  # no dropout: with it the held-out correlation is lower
        with th.autocast(inputs["target"].device.type, th.bfloat16, enabled=self.autocast):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = feedback_loss(
            outputs.logits[:, 0].float(),
            *(inputs[name] for name in ("first", "second", "target", "is_rating")),
        )
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> "_SimilarLength":
        examples = self.train_dataset if train_dataset is None else train_dataset
        lengths = [max(map(len, example.rows)) for example in examples]
        return _SimilarLength(lengths, self.args.train_batch_size)


class _SimilarLength(th.utils.data.Sampler[int]):
    """An order in which every batch has similar lengths, and long and short batches are mixed.

    The length-grouped sampler of transformers sorts fifty batches at a time from long to short,
    so that the last ones, at the lowest learning rate, are all short.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self.lengths = th.tensor(lengths)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        batches: list[th.Tensor] = []
        for pool in th.randperm(len(self.lengths)).split(50 * self.batch_size):
            by_length = pool[self.lengths[pool].argsort(stable=True)]
            batches.extend(by_length.split(self.batch_size))
        batches.sort(key=len, reverse=True)  # an incomplete batch must be the last one
        full = sum(len(batch) == self.batch_size for batch in batches)
        order = [*th.randperm(full).tolist(), *range(full, len(batches))]
        return iter([index for i in order for index in batches[i].tolist()])


class _Watch(TrainerCallback):
    """Hands the training's log on, and stops the training when the loss is not finite."""

    def __init__(self, receiver: Callable[[dict[str, float]], None] | None) -> None:
        self.receiver = receiver

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        loss = logs.get("loss", logs.get("train_loss", 0.0))  # the latter comes at the very end
        if not math.isfinite(loss):
            raise ValueError(
                f"expected a finite loss, got {loss} up to step {state.global_step}: lower the "
                "learning rate"
            )
        if "loss" not in logs:
            return
        entry = {"step": state.global_step} | logs
        logger.debug("%s", entry)
        if self.receiver is not None:
            self.receiver(entry)


def feedback_loss(
    logits: th.Tensor,
    first: th.Tensor,
    second: th.Tensor,
    target: th.Tensor,
    is_rating: th.Tensor,
) -> th.Tensor:
    """Mean negative log-likelihood of R records given the logits of T texts; see the module.

    Args:
        logits: shape (T,).
        first: text whose logit counts for the margin, shape (R,).
        second: text whose logit counts against it, shape (R,); T for none.
        target: the rating on the logit scale, or the probability with which the first side (or
            good) was chosen: 1, 0, or 0.5 for a tie; shape (R,).
        is_rating: which of both the target is, shape (R,).

    Returns:
        Loss in nats per record, a scalar; a rating's is that of a normal distribution with SD 1,
        without its constant.
    """
    padded = F.pad(logits, (0, 1))
    margin = padded[first] - padded[second]
    squared = (margin - target) ** 2 / 2
    logistic = F.softplus(margin) - target * margin
    return th.where(is_rating, squared, logistic).mean()


def _claim(record: Feedback) -> tuple[float, bool]:
    """The target of a record's margin, and whether it is a rating."""
    if isinstance(record, Rating):
        low, high = record.scale
        return LOGIT_END * (2 * record.rating - low - high) / (high - low), True
    if isinstance(record, Comparison):
        return (0.5 if record.tie else 1.0), False
    return float(record.label), False


def _choice_report(records: Sequence[Comparison | Label], logit: dict[str, float]) -> Any:
    if not records:
        return None
    margins = [
        logit[record.texts[0]] - (logit[record.texts[1]] if len(record.texts) == 2 else 0.0)
        for record in records
    ]
    return choice_report(np.array(margins), np.array([_claim(record)[0] for record in records]))


def _join(prompts: Sequence[str], completions: Sequence[str]) -> list[str]:
    if len(prompts) != len(completions):
        raise ValueError(
            f"expected as many prompts as completions, got {len(prompts)} and {len(completions)}"
        )
    return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]


def _split(
    feedback: Sequence[Feedback], eval_feedback: Sequence[Feedback] | float | None, seed: int
) -> tuple[list[Feedback], list[Feedback]]:
    """Training and held-out records, with no text in both."""
    if eval_feedback is None:
        return list(feedback), []
    if isinstance(eval_feedback, int | float):
        if not 0 < eval_feedback < 1:
            raise ValueError(f"expected a fraction between 0 and 1, got {eval_feedback}")
        texts = sorted({record.texts[0] for record in feedback})
        drawn = set(random.Random(seed).sample(texts, math.ceil(eval_feedback * len(texts))))
        held_out = [record for record in feedback if record.texts[0] in drawn]
        rest = [record for record in feedback if record.texts[0] not in drawn]
    else:
        held_out, rest = list(eval_feedback), list(feedback)
    unseen = {text for record in held_out for text in record.texts}
    train = [record for record in rest if unseen.isdisjoint(record.texts)]
    if len(train) < len(rest):
        logger.info("dropped %d records with held-out texts", len(rest) - len(train))
    return train, held_out


def _common_scale(records: Sequence[Feedback]) -> tuple[float, float] | None:
    scales = Counter(record.scale for record in records if isinstance(record, Rating))
    if len(scales) > 1:
        raise ValueError(
            f"expected ratings on one scale, got {', '.join(map(str, sorted(scales)))}: convert "
            "them to one"
        )
    return next(iter(scales), None)


def _read_side_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: expected what LearnedRewardModel.save wrote ({error})") from error


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


def _has_bf16(device: th.device) -> bool:
    """Whether the hardware multiplies bfloat16 numbers; emulation would be slower than float32."""
    if device.type == "cuda":
        return th.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = th.cpu.get_capabilities()
        return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    return False


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Seed the global generators, which transformers draws from, and give them back as found."""
    python, numpy = random.getstate(), np.random.get_state()
    with th.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        th.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
