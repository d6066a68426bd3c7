"""From feedback records and ids to padded batches of similar lengths.

What a record claims about the model's logits is decided here; the loss on it is in `loss`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch as th

from reward_models.feedback.records import Comparison, Feedback, Rating

LOGIT_END = 4.0
"""Logit of a human scale's upper end; its lower end is at the negative."""


class Claim(NamedTuple):
    """What a record says of the margin: the logit of its first text less that of its second.

    Args:
        target: the rating on the logit scale, or the probability with which the first side (or
            good) was chosen: 1, 0, or 0.5 for a tie.
        is_rating: which of both the target is.
    """

    target: float
    is_rating: bool


def claim(record: Feedback, label_smoothing: float = 0.0) -> Claim:
    """The claim of a record; the second text's logit is 0 where there is none.

    Args:
        record: what was said.
        label_smoothing: the share ε of choices taken to be the wrong way round: targets 1 and 0
            become 1 − ε and ε. A tie stays one, and a rating is no choice.
    """
    if isinstance(record, Rating):
        low, high = record.scale
        return Claim(LOGIT_END * (2 * record.rating - low - high) / (high - low), True)
    tie = isinstance(record, Comparison) and record.tie
    chosen = 0.5 if tie else float(isinstance(record, Comparison) or record.label)
    return Claim(chosen + label_smoothing * (1 - 2 * chosen), False)


def to_scale(logits: np.ndarray, scale: tuple[float, float] | None) -> np.ndarray:
    """Logits (B,) as ratings on a human scale, the way back from `claim`; as they are if None."""
    if scale is None:
        return logits
    low, high = scale
    return ((low + high) / 2 + logits * ((high - low) / (2 * LOGIT_END))).astype(logits.dtype)


class Example(NamedTuple):
    """A record, ready for the model: one or two rows of ids, what it claims, how much it counts."""

    rows: list[list[int]]
    claim: Claim
    weight: float = 1.0


class Batch(TypedDict):
    """R records over T texts, padded to L tokens.

    `input_ids` and `attention_mask` (T, L) hold the texts, `first` and `second` (R,) the places of
    each record's texts among them; `second` is T, which stands for the logit 0, where the record
    has one text only. `target` and `is_rating` (R,) are the claims, `weight` (R,) how much each
    counts.
    """

    input_ids: th.Tensor
    attention_mask: th.Tensor
    first: th.Tensor
    second: th.Tensor
    target: th.Tensor
    is_rating: th.Tensor
    weight: th.Tensor


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Put the texts of all records into one padded matrix."""
    rows = [row for example in examples for row in example.rows]
    n_texts = th.tensor([len(example.rows) for example in examples])
    first = n_texts.cumsum(0) - n_texts
    input_ids, attention_mask = pad(rows, pad_token_id)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        first=first,
        second=th.where(n_texts == 2, first + 1, len(rows)),
        target=th.tensor([example.claim.target for example in examples]),
        is_rating=th.tensor([example.claim.is_rating for example in examples]),
        weight=th.tensor([example.weight for example in examples]),
    )


def pad(rows: Sequence[list[int]], pad_token_id: int) -> tuple[th.Tensor, th.Tensor]:
    """Right-padded ids and their mask, both of shape (rows, tokens of the longest row)."""
    ids = th.full((len(rows), max(map(len, rows))), pad_token_id)
    mask = th.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = th.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


class SimilarLength(th.utils.data.Sampler[int]):
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
