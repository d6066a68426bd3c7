"""Supervised warm start: a causal LM learns to write texts of a kind, and to end them.

Built on `transformers.Trainer`. What the texts are good for is not known here.
"""

import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch as th
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from agents.language_model import freeze_below

IGNORED = -100
"""The label of a place that is not learned, in transformers."""


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
    texts: Sequence[str],
    *,
    max_tokens: int = 64,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    trainable_layers: int | None = None,
    dtype: str = "float32",
    held_out: int = 200,
    seed: int = 0,
    progress_bar: bool = False,
) -> SFTReport:
    """Train `lm` in place on whole texts, each ended by EOS.

    AdamW with a linear warm-up over the first tenth and a linear decay to 0; batches of texts of
    similar length, so that little padding is computed, and none of it learned: where the
    padding token is EOS too, the EOS that ends a text still is.

    Args:
        lm: A causal LM.
        tokenizer: Its tokenizer, with an EOS token.
        texts: Texts; a random tenth of them, `held_out` at most, is only measured on.
        max_tokens: Longer texts are cut there, and not ended.
        epochs: Passes over the texts.
        max_steps: Updates at most, instead of `epochs`.
        batch_size: Texts per update.
        learning_rate: The highest one.
        trainable_layers: How many of the last layers learn, with the final norm; None: all of
            the model, embeddings included.
        dtype: "float32", or "bfloat16" by autocast.
        held_out: Texts to measure on, at most.
        seed: Of the order, and of which texts are held out.
        progress_bar: Show one.

    Raises:
        ValueError: If there is no EOS token or there are fewer than two texts.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("expected a tokenizer with an EOS token, got none: texts could not end")
    if len(texts) < 2:
        raise ValueError(f"expected at least two texts to learn from, got {len(texts)}")
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(list(texts))["input_ids"]]
    rows = [{"input_ids": row[:max_tokens]} for row in ids]
    random.Random(seed).shuffle(rows)
    n_held_out = max(1, min(held_out, len(rows) // 10))
    train, test = rows[n_held_out:], rows[:n_held_out]
    freeze_below(lm, trainable_layers)
    before = held_out_loss(lm, test, dtype)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=lm,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                max_steps=max_steps or -1,
                per_device_train_batch_size=batch_size,
                train_sampling_strategy="group_by_length",
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=0.1,
                adam_beta2=0.95,
                optim="adamw_torch_fused",
                bf16=dtype == "bfloat16",
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
            data_collator=collate,
        )
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
        loss_after=held_out_loss(lm, test, dtype),
    )


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, th.Tensor]:
    """Right-pad texts to (B, L) ids, with labels that leave the padding out."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = th.zeros(len(rows), width, dtype=th.long)
    labels = th.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = labels[i, : len(row["input_ids"])] = th.tensor(
            row["input_ids"]
        )
    # Right padding is never looked at under causal attention: no attention mask is needed.
    return {"input_ids": ids, "labels": labels}


@th.no_grad()
def held_out_loss(
    lm: PreTrainedModel, rows: Sequence[dict[str, list[int]]], dtype: str = "float32"
) -> float:
    """Return the mean negative log-likelihood of texts, nats per token."""
    lm.eval()
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    precision = (
        th.autocast(lm.device.type, dtype=th.bfloat16)
        if dtype == "bfloat16"
        else contextlib.nullcontext()
    )
    total, n_tokens = 0.0, 0
    with precision:
        for start in range(0, len(rows), 16):
            batch = collate(rows[start : start + 16])
            predicted = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss = lm(**{k: v.to(lm.device) for k, v in batch.items()}).loss
            total, n_tokens = total + float(loss) * predicted, n_tokens + predicted
    return total / max(n_tokens, 1)
