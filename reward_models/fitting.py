"""Fitting a classifier with one label to feedback: the split, the weights and the training.

What is minimised is in `loss`.
"""

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch as th
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from reward_models.batches import Example, SimilarLength, collate
from reward_models.feedback.records import Feedback, Rating
from reward_models.loss import feedback_loss

logger = logging.getLogger(__name__)

_THRESHOLD_RATE = 0.05
"""Learning rate of log η: what it comes to is dozens of updates away, not thousands."""


def split(
    feedback: Sequence[Feedback], eval_feedback: Sequence[Feedback] | float | None, seed: int
) -> tuple[list[Feedback], list[Feedback]]:
    """Training and held-out records, with no text in both."""
    if eval_feedback is None:
        return list(feedback), []
    if isinstance(eval_feedback, int | float):
        if not 0 < eval_feedback < 1:
            raise ValueError(f"expected a fraction between 0 and 1, got {eval_feedback}")
        item = {id(record): tuple(sorted(record.texts)) for record in feedback}  # whoever won
        items = sorted(set(item.values()))
        drawn = set(random.Random(seed).sample(items, math.ceil(eval_feedback * len(items))))
        held_out = [record for record in feedback if item[id(record)] in drawn]
        rest = [record for record in feedback if item[id(record)] not in drawn]
    else:
        held_out, rest = list(eval_feedback), list(feedback)
    unseen = {text for record in held_out for text in record.texts}
    train = [record for record in rest if unseen.isdisjoint(record.texts)]
    if len(train) < len(rest):
        logger.info("dropped %d records with held-out texts", len(rest) - len(train))
    return train, held_out


def common_scale(records: Sequence[Feedback]) -> tuple[float, float] | None:
    """The scale of all ratings among the records; None if there are none.

    Raises:
        ValueError: if they are on different scales.
    """
    scales = {record.scale for record in records if isinstance(record, Rating)}
    if len(scales) > 1:
        raise ValueError(
            f"expected ratings on one scale, got {', '.join(map(str, sorted(scales)))}: convert "
            "them to one"
        )
    return next(iter(scales), None)


def record_weights(
    records: Sequence[Feedback], annotator_weights: Mapping[str, float] | None
) -> list[float]:
    """How much each record counts, 1 on average.

    Args:
        records: of anybody; those of no annotator or one without a weight count 1 beforehand.
        annotator_weights: by pseudonym, zero or more.

    Raises:
        ValueError: if a weight is negative or not finite, or all the records have weight 0.
    """
    for annotator, weight in (annotator_weights or {}).items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"expected weights of 0 or more, got {weight} for {annotator!r}")
    known = annotator_weights or {}
    names = [record.annotator for record in records]
    weights = [1.0 if name is None else known.get(name, 1.0) for name in names]
    mean = sum(weights) / len(weights)
    if mean == 0:
        raise ValueError("expected a record with a weight above 0, got none")
    return [weight / mean for weight in weights]


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    bf16: bool | None,
    on_log: Callable[[dict[str, float]], None] | None,
    margin: float = 0.0,
    learn_ties: bool = False,
    **arguments: Any,
) -> tuple[Any, float | None]:
    """Train the model in place and leave it in evaluation mode, on its device, without gradients.

    Args:
        model: a classifier with one label.
        examples: what to learn from.
        bf16: compute products in bfloat16; None for where the hardware has it.
        on_log: called with each entry of the log.
        margin: of the comparisons.
        learn_ties: take ties as Rao & Kupper do, instead of as half-wins.
        arguments: of `TrainingArguments`.

    Returns:
        What `Trainer.train` returns, and the tie threshold η if it was learned.
    """
    device = model.device
    threshold = _first_threshold(examples) if learn_ties else None
    trainer = _FeedbackTrainer(
        _has_bf16(device) if bf16 is None else bf16,
        margin,
        threshold,
        model=model,
        args=TrainingArguments(
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            weight_decay=0.01,
            logging_steps=0.02,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            **arguments,
        ),
        train_dataset=examples,
        data_collator=partial(collate, pad_token_id=model.config.pad_token_id),
        callbacks=[_Watch(on_log)],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Bar())
    try:
        result = trainer.train()
    finally:
        model.to(device).eval()
        model.zero_grad(set_to_none=True)
    log_threshold = trainer.log_threshold
    return result, None if log_threshold is None else float(log_threshold.detach().exp())


def _first_threshold(examples: Sequence[Example]) -> float | None:
    """η at which texts of the same quality tie as often as these did; None if they never do.

    There P(tie) = (θ − 1) / (θ + 1). Texts differ in quality, so it is too low, and learned from
    here on.
    """
    ties = [example.claim.target == 0.5 for example in examples if len(example.rows) == 2]
    share = min(sum(ties) / max(len(ties), 1), 0.99)
    return 2 * math.atanh(share) if share > 0 else None


class _FeedbackTrainer(Trainer):
    """transformers' Trainer with `feedback_loss` and batches of similar length.

    Its own `bf16` is not used: it patches the model's forward, and scores would stay imprecise
    after the training.

    Args:
        autocast: whether to compute products in bfloat16.
        margin: of the comparisons.
        tie_threshold: first value of Rao & Kupper's η, to be learned; None for half-wins.
        arguments: for `Trainer`.
    """

    def __init__(
        self, autocast: bool, margin: float, tie_threshold: float | None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.autocast = autocast
        self.margin = margin
        self.log_threshold: th.nn.Parameter | None = None
        if tie_threshold is not None:  # its logarithm is learned, so that it stays above 0
            value = th.tensor(math.log(tie_threshold), device=self.args.device)
            self.log_threshold = th.nn.Parameter(value)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        model.eval()  # no dropout: with it the held-out correlation is lower
        with self._precision(inputs["target"].device.type):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = feedback_loss(
            outputs.logits[:, 0].float(),
            inputs["first"],
            inputs["second"],
            inputs["target"],
            inputs["is_rating"],
            inputs["weight"],
            self.margin,
            None if self.log_threshold is None else self.log_threshold.exp(),
        )
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> th.optim.Optimizer:
        made = super().create_optimizer(model)
        if self.log_threshold is not None:
            group = {"params": [self.log_threshold], "lr": _THRESHOLD_RATE, "weight_decay": 0.0}
            made.add_param_group(group)
        return made

    def training_step(self, *args: Any, **kwargs: Any) -> th.Tensor:
        if self.log_threshold is not None:
            self.log_threshold.grad = None  # the trainer clears the model's gradients only
        return super().training_step(*args, **kwargs)

    def _precision(self, device_type: str) -> ExitStack:
        stack = ExitStack()
        if self.autocast:
            stack.enter_context(th.autocast(device_type, th.bfloat16))
            if device_type == "cpu":  # where fused attention is slow to differentiate in bfloat16
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLength:
        examples = self.train_dataset if train_dataset is None else train_dataset
        lengths = [max(map(len, example.rows)) for example in examples]
        return SimilarLength(lengths, self.args.train_batch_size)


class _Bar(ProgressCallback):
    """transformers' progress bar without a line of the log every few steps."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


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


def _has_bf16(device: th.device) -> bool:
    """Whether the hardware multiplies bfloat16 numbers; emulation would be slower than float32."""
    if device.type == "cuda":
        return th.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities: dict[str, Any] = getattr(
            th.cpu, "get_capabilities", dict
        )()  # older torch cannot tell
        return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    return False


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
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
