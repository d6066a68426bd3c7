"""Fitting a classifier with one label to feedback: the split, the loss and the training.

Every record is a claim about a margin m of logits u, and the loss is the mean negative
log-likelihood of the records, in nats:

    rating      m = u(text)                    (m − r)² / 2, r the rating on the logit scale
    comparison  m = u(chosen) − u(rejected)    −log σ(m)     (Bradley & Terry 1952; a tie is half
                                                              a win for each side)
    label       m = u(text)                    −log σ(m) if good, −log σ(−m) if bad

The logit scale puts the ends of a human scale at −4 and +4, where σ is 0.02 and 0.98, so all three
pull on u with about the same strength. A scale from −4 to +4 is the logit itself.
"""

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch as th
from torch.nn import functional as F
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

logger = logging.getLogger(__name__)


def split(
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


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    bf16: bool | None,
    on_log: Callable[[dict[str, float]], None] | None,
    **arguments: Any,
) -> Any:
    """Train the model in place and leave it in evaluation mode, on its device, without gradients.

    Args:
        model: a classifier with one label.
        examples: what to learn from.
        bf16: compute products in bfloat16; None for where the hardware has it.
        on_log: called with each entry of the log.
        arguments: of `TrainingArguments`.

    Returns:
        What `Trainer.train` returns.
    """
    device = model.device
    trainer = _FeedbackTrainer(
        _has_bf16(device) if bf16 is None else bf16,
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
        return trainer.train()
    finally:
        model.to(device).eval()
        model.zero_grad(set_to_none=True)


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
        with self._precision(inputs["target"].device.type):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = feedback_loss(
            outputs.logits[:, 0].float(),
            *(inputs[name] for name in ("first", "second", "target", "is_rating")),
        )
        return (loss, outputs) if return_outputs else loss

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
