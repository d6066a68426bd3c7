"""Texts, what follows prompts, or a conversation's answers, under an LM: their log-probabilities.

For the warm start, which learns them, and for scores of texts that somebody else wrote. Episodes of
an agent, whose tokens are known, are in `buffer`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch as th
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.heads import Head
from agents.language_model import TokenModel
from agents.sequences import TokenBatch, pad_right
from agents.states import find_capping

Text = str | tuple[str, str] | Sequence[Mapping[str, Any]]
"""A text, prompt and completion, or a conversation: messages {"role", "content"}."""


class Row(TypedDict):
    """A text as the Trainer's samplers know it.

    Attributes:
        input_ids: Its tokens.
        n_given: How many of them are given, at least one: those behind are looked at.
        learned: The columns of those that are looked at, where that is not all behind those given.
    """

    input_ids: list[int]
    n_given: int
    learned: NotRequired[list[int]]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> list[Row]:
    """Tokenise texts, each ended by EOS.

    Args:
        tokenizer: With an EOS token.
        texts: A text, of which the first token is given; or prompt and completion, tokenised one
            by one, as they are when an agent writes; or a conversation, of which the answers are
            looked at, each with its end token.
    """
    rows: list[Row] = []
    for whole in texts:
        if not isinstance(whole, str | tuple):
            rows.append(conversation_row(tokenizer, whole))
            continue
        prompt, text = ("", whole) if isinstance(whole, str) else whole
        given = tokenizer(prompt)["input_ids"] if prompt else []
        ids = tokenizer(text, add_special_tokens=not prompt)["input_ids"]
        ids = [*given, *ids, tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "n_given": max(1, len(given))})
    return rows


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
    n_given = learned[0] if learned else len(starts)
    return {"input_ids": encoded["input_ids"], "n_given": n_given, "learned": learned}


def cut(row: Row, max_tokens: int) -> Row:
    """Return the first tokens of a row."""
    short: Row = {**row, "input_ids": row["input_ids"][:max_tokens]}
    if "learned" in row:
        short["learned"] = [column for column in row["learned"] if column < max_tokens]
    return short


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
    """Make a batch of texts, in which every token behind those given is looked at, or some are.

    Padding is neither looked at, under causal attention, nor learned; so where the padding token
    is EOS too, the EOS that ends a text still is.
    """
    ids = [np.array(row["input_ids"]) for row in rows]
    positions = [
        np.array(row.get("learned", range(row["n_given"], len(x))), dtype=int) - 1
        for row, x in zip(rows, ids, strict=True)
    ]
    row = np.repeat(np.arange(len(ids)), [len(x) for x in positions])
    return TokenBatch(*(th.from_numpy(x) for x in (pad_right(ids), row, np.concatenate(positions))))
