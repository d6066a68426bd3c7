"""Supervised warm start: a causal LM learns to write texts of a kind, and to end them.

Of conversations it learns the assistant's part. Built on `transformers.Trainer`. What the texts are
good for is not known here.
"""

import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch as th
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from agents.frozen_layers import freeze_below
from agents.heads import Head
from agents.language_model import TokenModel, check_fit, check_positions
from agents.sequences import TokenBatch, pad_right

Text = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: messages {"role", "content"}."""


class Row(TypedDict):
    """A text as the Trainer's samplers know it; `learned` are the columns of what is learned."""

    input_ids: list[int]
    learned: list[int]


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
    """Train `lm` in place on whole texts, each ended by EOS, or on the answers in conversations.

    AdamW with a linear warm-up over the first tenth and a linear decay to 0; batches of texts of
    similar length; dropout as the model has it.

    Args:
        lm: A causal LM.
        tokenizer: Its tokenizer, with an EOS token.
        texts: Texts, or conversations, which the tokenizer's chat template makes texts of: what the
            assistant says is learned, its end token included, and all else is only read. A random
            tenth of them, `held_out` at most, is only measured on.
        max_tokens: Longer texts are cut there, and not ended.
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
        ValueError: If there is no EOS token, there are fewer than two texts with something to
            learn, or model, tokenizer, chat template and settings do not fit together.
        FloatingPointError: If the loss is not finite; nothing was learned from that batch.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("expected a tokenizer with an EOS token, got none: texts could not end")
    rows = [_cut(row, max_tokens) for row in _rows(tokenizer, texts)]
    rows = [row for row in rows if row["learned"]]
    if len(rows) < 2:
        raise ValueError(
            f"expected at least two texts to learn from, got {len(rows)} with something to learn "
            f"in their first {max_tokens} tokens, of {len(texts)}"
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
    learner = _Learner(lm, dtype)
    before = learner.loss(test)
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
        loss_after=learner.loss(test),
    )


class _TextTrainer(Trainer):
    """A Trainer whose loss is that of the policy: bounded logits, float32 log-probabilities."""

    learner: "_Learner"

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


class _Learner(TokenModel):
    """The language model as a distribution over the next token of whole texts."""

    def __init__(self, lm: PreTrainedModel, dtype: str) -> None:
        super().__init__()
        self.lm, self.dtype = lm, getattr(th, dtype)
        self.vocab_size, self.temperature = lm.get_output_embeddings().weight.shape[0], 1.0
        self.allowed_tokens = th.ones(self.vocab_size, dtype=th.bool, device=lm.device)

    def head(self, *args: Any, **kwargs: Any) -> Head:
        """Return a head in the body's dtype: a mean over texts needs no finer one."""
        head = super().head(*args, **kwargs)
        return head._replace(weight=head.weight.to(self.dtype))

    def log_probs(self, batch: TokenBatch) -> th.Tensor:
        """Return the log-probabilities (nats) of the tokens that are learned: (N,)."""
        tokens = batch.ids[batch.row, batch.position + 1]
        return self.token_statistics(batch, self.hidden_at(batch), tokens).log_prob

    @th.no_grad()
    def loss(self, rows: Sequence[Row], batch_size: int = 16) -> float:
        """Return the mean negative log-likelihood of texts, nats per token."""
        self.lm.eval()
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        starts = range(0, len(rows), batch_size)
        batches = (whole_texts(rows[start : start + batch_size]) for start in starts)
        found = [
            self.log_probs(TokenBatch(*(x.to(self.lm.device) for x in b[:3]))) for b in batches
        ]
        return -float(th.cat(found).mean())


def _rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> list[Row]:
    """Tokenise texts; of a text all but the first token is learned, and its end."""
    plain = [text for text in texts if isinstance(text, str)]
    found = iter(tokenizer(plain)["input_ids"] if plain else ())
    rows: list[Row] = []
    for text in texts:
        if isinstance(text, str):
            ids = [*next(found), tokenizer.eos_token_id]
            rows.append({"input_ids": ids, "learned": list(range(1, len(ids)))})
        else:
            rows.append(conversation_row(tokenizer, text))
    return rows


def _cut(row: Row, max_tokens: int) -> Row:
    learned = [column for column in row["learned"] if column < max_tokens]
    return {"input_ids": row["input_ids"][:max_tokens], "learned": learned}


def conversation_row(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> Row:
    """Tokenise a conversation, of which the assistant's answers are learned, with their ends.

    Raises:
        ValueError: If the tokenizer has no chat template, or one that does not show an answer
            behind what it asks for one with, ended by EOS.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "conversations: expected a tokenizer with a chat template, got one without; set "
            "tokenizer.chat_template or give texts"
        )
    whole = str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = str(
            tokenizer.apply_chat_template(
                list(messages[:i]), tokenize=False, add_generation_prompt=True
            )
        )
        end = whole.find(tokenizer.eos_token, len(before) + len(message["content"].strip()))
        if not whole.startswith(before) or end < 0:
            raise ValueError(
                "chat template: expected one that shows an answer behind its generation prompt, "
                f"and {tokenizer.eos_token} behind that, got another; set tokenizer.chat_template"
            )
        spans.append((len(before), end + len(tokenizer.eos_token)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    learned = [
        column
        for column, start in enumerate(starts)
        if column > 0 and any(begin <= start < end for begin, end in spans)
    ]
    return {"input_ids": encoded["input_ids"], "learned": learned}


def whole_texts(rows: Sequence[Row]) -> TokenBatch:
    """Make a batch of texts, in each of which some tokens are learned.

    Padding is neither looked at, under causal attention, nor learned; so where the padding token
    is EOS too, the EOS that ends a text still is.
    """
    ids = [np.array(row["input_ids"]) for row in rows]
    row = np.repeat(np.arange(len(ids)), [len(row["learned"]) for row in rows])
    position = np.concatenate([np.array(row["learned"]) - 1 for row in rows])
    return TokenBatch(*(th.from_numpy(x) for x in (pad_right(ids), row, position)))
