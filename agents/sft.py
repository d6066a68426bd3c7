"""Supervised warm start: a causal LM learns to write texts of a kind, or answers, and to end them.

Built on `transformers.Trainer`. What the texts are good for is not known here.
"""

import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from agents.frozen_layers import freeze_below
from agents.language_model import check_fit, check_positions
from agents.sequences import TokenBatch
from agents.states import no_end, prompt_lengths
from agents.whole_texts import Row, Text, TextModel, cut, encode, whole_texts


@dataclass(frozen=True)
class SFTReport:
    """What a warm start did.

    Attributes:
        n_texts: Texts learned from.
        n_held_out: Texts that the losses are measured on.
        steps: Updates.
        seconds: Duration of the training.
        loss_before: Mean negative log-likelihood of the held-out texts, nats per token, EOS
            included.
        loss_after: The same at the end.
    """

    n_texts: int
    n_held_out: int
    steps: int
    seconds: float
    loss_before: float
    loss_after: float


def warm_start(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    max_tokens: int = 64,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    trainable_layers: int | None = None,
    dtype: str = "float32",
    held_out: int = 100,
    seed: int = 0,
    progress_bar: bool = False,
) -> SFTReport:
    """Train `lm` in place on whole texts, or on completions behind their prompts, ended by EOS.

    AdamW with a linear warm-up over the first tenth and a linear decay to 0; batches of texts of
    similar length; dropout as the model has it.

    Args:
        lm: A causal LM or encoder-decoder.
        tokenizer: Its tokenizer, with an EOS token.
        texts: Texts; or (prompt, completion), of which the completion alone is learned; an
            encoder-decoder, whose encoder reads the prompt, needs those; or conversations, which
            the tokenizer's chat template makes texts of, and of which the answers and their ends
            are learned. A random tenth, `held_out` at most, is only measured on.
        max_tokens: Longer texts, with their prompts, are cut there, and not ended; a text of
            which that leaves nothing to learn is passed over.
        epochs: Passes over the texts.
        max_steps: Updates at most, if the epochs have more.
        batch_size: Texts per update.
        learning_rate: The highest one.
        trainable_layers: How many of the last layers learn, with the final norm; None: all of
            the model, embeddings included.
        dtype: "float32", or "bfloat16" by autocast.
        held_out: Texts to measure on, at most.
        seed: Of the order, and of which texts are held out.
        progress_bar: Show one.

    Raises:
        ValueError: If there is no EOS token, there are fewer than two texts, or model,
            tokenizer and settings do not fit together.
        FloatingPointError: If the loss is not finite; nothing was learned from that batch.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("expected a tokenizer with an EOS token, got none: texts could not end")
    if len(texts) < 2:
        raise ValueError(f"expected at least two texts to learn from, got {len(texts)}")
    alone = next((text for text in texts if not isinstance(text, tuple)), None)
    if lm.config.is_encoder_decoder and alone is not None:
        raise ValueError(
            f"expected pairs of a prompt and its completion for {type(lm).__name__}, whose encoder "
            f"reads the prompt, got {str(alone)[:40]!r} alone"
        )
    rows = [cut(row, max_tokens) for row in encode(tokenizer, texts)]
    rows = [row for row in rows if len(row["input_ids"]) > row["n_given"]]
    if lm.config.is_encoder_decoder:
        for row in rows:
            ids, n_given = row["input_ids"], row["n_given"]
            if int(prompt_lengths(lm, th.tensor([ids]))) != n_given:
                raise no_end(lm, ids[:n_given])
    if len(rows) < 2:
        raise ValueError(
            f"expected at least two texts of which max_tokens={max_tokens} leaves something to "
            f"learn, got {len(rows)} of {len(texts)}: raise max_tokens"
        )
    random.Random(seed).shuffle(rows)
    n_held_out = max(1, min(held_out, len(rows) // 10))
    train, test = rows[n_held_out:], rows[:n_held_out]
    steps = math.ceil(epochs * math.ceil(len(train) / batch_size))
    if max_steps is not None:
        steps = min(steps, max_steps)
    if steps < 1:
        raise ValueError(f"expected at least one update, got max_steps={max_steps}, {epochs=}")
    check_fit(lm, len(tokenizer))
    check_positions(lm, max_tokens)
    freeze_below(lm, trainable_layers)
    learner = TextModel(lm, dtype)
    before = _loss(learner, test)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _TextTrainer(
            model=lm,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                train_sampling_strategy="group_by_length",
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=0.1,
                adam_beta2=0.95,
                optim="adamw_torch_fused",
                use_cpu=lm.device.type == "cpu",
                dataloader_pin_memory=lm.device.type == "cuda",
                remove_unused_columns=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=not progress_bar,
                seed=seed,
            ),
            train_dataset=train,  # type: ignore[arg-type]
            data_collator=whole_texts,
        )
        trainer.learner = learner
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    lm.requires_grad_(True)
    lm.zero_grad(set_to_none=True)
    return SFTReport(
        n_texts=len(train),
        n_held_out=len(test),
        steps=result.global_step,
        seconds=time.perf_counter() - start,
        loss_before=before,
        loss_after=_loss(learner, test),
    )


class _TextTrainer(Trainer):
    """A Trainer whose loss is that of the policy: bounded logits, float32 log-probabilities."""

    learner: TextModel

    def compute_loss(
        self, model: th.nn.Module, inputs: TokenBatch, *args: Any, **kwargs: Any
    ) -> th.Tensor:
        loss = -self.learner.log_probs(inputs).mean()
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"expected a finite loss, got {float(loss)} at step {self.state.global_step}; no "
                "parameter was changed by it: lower the learning rate"
            )
        return loss

    def _prepare_inputs(self, inputs: TokenBatch) -> TokenBatch:
        return TokenBatch(*(x.to(self.learner.lm.device) for x in inputs[:3]))


def _loss(learner: TextModel, rows: Sequence[Row]) -> float:
    """Return the mean negative log-likelihood of texts, nats per token."""
    log_prob, count = learner.sums(rows)
    return float(-log_prob.sum() / count.sum())
