"""Whole texts, or what follows their prompts, under a causal LM: batches and log-probabilities.

For the warm start, which learns them, and for scores of texts that somebody else wrote. Episodes of
an agent, whose tokens are known, are in `buffer`.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch as th
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.heads import Head
from agents.language_model import TokenModel
from agents.sequences import TokenBatch, pad_right
from agents.states import find_capping


class Row(TypedDict):
    """A text as the Trainer's samplers know it.

    Attributes:
        input_ids: Its tokens.
        n_given: How many of them are given, at least one: those behind are looked at.
    """

    input_ids: list[int]
    n_given: int


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | tuple[str, str]]) -> list[Row]:
    """Tokenise texts, each ended by EOS.

    Args:
        tokenizer: With an EOS token.
        texts: A text, of which the first token is given; or prompt and completion, tokenised one
            by one, as they are when an agent writes.
    """
    pairs = [("", text) if isinstance(text, str) else text for text in texts]
    rows: list[Row] = []
    for prompt, text in pairs:
        given = tokenizer(prompt)["input_ids"] if prompt else []
        ids = tokenizer(text, add_special_tokens=not prompt)["input_ids"]
        ids = [*given, *ids, tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "n_given": max(1, len(given))})
    return rows


class TextModel(TokenModel):
    """The language model as a distribution over the next token of whole texts."""

    def __init__(self, lm: PreTrainedModel, dtype: str) -> None:
        super().__init__()
        self.lm, self.dtype, self.capping = lm, getattr(th, dtype), find_capping(lm)
        self.vocab_size, self.temperature = lm.get_output_embeddings().weight.shape[0], 1.0
        self.allowed_tokens = th.ones(self.vocab_size, dtype=th.bool, device=lm.device)

    def head(self, *args: Any, **kwargs: Any) -> Head:
        """Return a head in the body's dtype: a mean over texts needs no finer one."""
        head = super().head(*args, **kwargs)
        return head._replace(weight=head.weight.to(self.dtype))

    def log_probs(self, batch: TokenBatch) -> th.Tensor:
        """Return the log-probabilities (nats) of the batch's tokens but those given: (N,)."""
        tokens = batch.ids[batch.row, batch.position + 1]
        return self.token_statistics(batch, self.hidden_at(batch), tokens).log_prob

    @th.no_grad()
    def sums(self, rows: Sequence[Row], batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
        """Return each text's log-probability, nats, and how many tokens it is of, both (B,)."""
        self.lm.eval()
        log_prob, count = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
        order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")
        for start in range(0, len(rows), batch_size):
            part = order[start : start + batch_size]
            batch = whole_texts([rows[i] for i in part])
            batch = TokenBatch(*(x.to(self.lm.device) for x in batch[:3]))
            found, row = self.log_probs(batch).double().cpu().numpy(), batch.row.cpu().numpy()
            log_prob[part] = np.bincount(row, weights=found, minlength=len(part))
            count[part] = np.bincount(row, minlength=len(part))
        return log_prob, count


def whole_texts(rows: Sequence[Row]) -> TokenBatch:
    """Make a batch of texts, in which every token behind those given is looked at.

    Padding is neither looked at, under causal attention, nor learned; so where the padding token
    is EOS too, the EOS that ends a text still is.
    """
    ids = [np.array(row["input_ids"]) for row in rows]
    positions = [
        np.arange(row["n_given"] - 1, len(x) - 1) for row, x in zip(rows, ids, strict=True)
    ]
    row = np.repeat(np.arange(len(ids)), [len(x) for x in positions])
    return TokenBatch(*(th.from_numpy(x) for x in (pad_right(ids), row, np.concatenate(positions))))
