"""Token sequences as the agent trains on them: a batch type and the pure functions around it.

Nothing here knows a model, an environment or an algorithm.
"""

from typing import NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

PAD = -1
"""What fills an observation to the right of its last token. No token has this id."""


class TokenBatch(NamedTuple):
    """Whole sequences, with the completion tokens that are trained on packed to one dimension.

    The token at packed place ``k`` is the one that follows column ``position[k]`` of sequence
    ``row[k]``: its state is everything up to and including that column.

    Attributes:
        ids: (B, L) int64, prompt and completion, right-padded with -1. A sequence's last token
            is not an input: nothing that follows it is predicted.
        row: (N,) int64, the sequence of each trained token.
        position: (N,) int64, the column of each trained token's state.
        mask_id: (N,) int64, which row of ``masks`` holds; or None, where all tokens are allowed.
        masks: (M, V) bool, the distinct action masks of a rollout; or None.
        old_log_prob: (N,) float32, log-probabilities (nats) under the policy that sampled the
            tokens. Only the first minibatch after a rollout carries them: there they must be
            met again.
        frozen: (B, L, H), the sequences' states after the layers that do not learn; or None.
    """

    ids: th.Tensor
    row: th.Tensor
    position: th.Tensor
    mask_id: th.Tensor | None = None
    masks: th.Tensor | None = None
    old_log_prob: th.Tensor | None = None
    frozen: th.Tensor | None = None


def count_ids(observation_space: spaces.Space) -> int:
    """Return V of a space of observations: a one-dimensional Box of ids, -1 to V - 1.

    Raises:
        ValueError: If it is another.
    """
    fits = (
        isinstance(observation_space, spaces.Box)
        and len(observation_space.shape) == 1
        and (observation_space.low == PAD).all()
        and (observation_space.high == observation_space.high[0]).all()
    )
    if not fits:
        raise ValueError(
            "expected observations in a one-dimensional Box of token ids, -1 to V - 1, got "
            f"{observation_space}"
        )
    return int(observation_space.high[0]) + 1


def require_token_actions(action_space: spaces.Space, n_tokens: int) -> None:
    """Require one action per token.

    Raises:
        ValueError: If the actions are others.
    """
    fits = isinstance(action_space, spaces.Discrete) and action_space.start == 0
    if not fits or action_space.n != n_tokens:
        raise ValueError(
            f"expected actions in Discrete({n_tokens}), one per token of the observations, got "
            f"{action_space}"
        )


def lengths(ids: th.Tensor) -> th.Tensor:
    """Count the tokens of each right-padded row: (B, L) ids to (B,) int64."""
    return (ids != PAD).sum(dim=1)


def pad_right(sequences: list[np.ndarray]) -> np.ndarray:
    """Stack B id arrays of any lengths to (B, L) int64, right-padded with -1."""
    width = max(len(sequence) for sequence in sequences)
    padded = np.full((len(sequences), width), PAD, dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def n_minibatches(n_tokens: int, batch_size: int) -> int:
    """Return how many minibatches of `batch_size` stock SB3 would make of `n_tokens` tokens."""
    return max(1, -(-n_tokens // batch_size))


def deal(order: np.ndarray, n_tokens: np.ndarray, n_parts: int) -> list[np.ndarray]:
    """Deal whole sequences, in the given order, into parts of nearly equally many tokens.

    Args:
        order: (B,) int, the sequences to deal.
        n_tokens: Trained tokens of each sequence there is.
        n_parts: How many parts to make; as many as there are sequences, if these are fewer.

    Returns:
        Arrays of sequence indices, none empty, each sequence in exactly one of them.
    """
    n_parts = min(n_parts, len(order))
    if n_parts == 0:
        return []
    filled = np.cumsum(n_tokens[order])
    edges = filled[-1] * np.arange(1, n_parts) / n_parts
    cuts = np.searchsorted(filled, edges, side="left") + 1
    steps = np.arange(1, n_parts)  # leave a sequence for each part, before and behind
    cuts = np.maximum.accumulate(np.maximum(cuts, steps) - steps) + steps
    cuts = np.minimum(cuts, len(order) - n_parts + steps)
    return np.split(order, cuts)


def similar_lengths(length: th.Tensor, least: int = 256) -> list[th.Tensor]:
    """Group rows so that little padding is computed, and each group is worth a forward pass.

    Args:
        length: (B,) int64, tokens per row.
        least: Tokens that a group has at least, if there are so many. Groups are joined where
            that adds less than an eighth of it in padding.

    Returns:
        Row numbers, each (b,) int64, each row in exactly one group, shortest rows first.
    """
    order = length.argsort(stable=True)
    filled = length[order].cumsum(0)
    n_groups = max(1, int(filled[-1]) // least)
    edges = filled[-1] * th.arange(1, n_groups, device=length.device) // n_groups
    cuts = th.searchsorted(filled, edges).unique().tolist()
    groups: list[th.Tensor] = []
    for rows in order.tensor_split(cuts):
        if len(rows) == 0:
            continue
        longest = int(length[rows[-1]])
        if groups and len(groups[-1]) * (longest - int(length[groups[-1][-1]])) <= least // 8:
            rows = th.cat((groups.pop(), rows))  # one pass more would cost more than the padding
        groups.append(rows)
    return groups


Part = tuple[TokenBatch, th.Tensor]
"""Some sequences of a batch, and the packed places (n,) of their tokens in it."""


def split(batch: TokenBatch, n_parts: int) -> list[Part]:
    """Cut a batch into parts of about equally many tokens: whole sequences, by length."""
    order = lengths(batch.ids).argsort(stable=True)
    n_tokens = th.bincount(batch.row, minlength=len(batch.ids))
    dealt = deal(order.cpu().numpy(), n_tokens.cpu().numpy(), n_parts)
    return [take(batch, th.from_numpy(part).to(batch.ids.device)) for part in dealt]


def take(batch: TokenBatch, rows: th.Tensor) -> Part:
    """Take some sequences, (b,) int64, out of a batch, without old log-probabilities."""
    within = th.full((len(batch.ids),), -1, device=rows.device)
    within[rows] = th.arange(len(rows), device=rows.device)
    places = (within[batch.row] >= 0).nonzero()[:, 0]
    longest = int(lengths(batch.ids[rows]).max())
    part = TokenBatch(
        ids=batch.ids[rows, :longest],
        row=within[batch.row[places]],
        position=batch.position[places],
        mask_id=None if batch.mask_id is None else batch.mask_id[places],
        masks=batch.masks,
        frozen=None if batch.frozen is None else batch.frozen[rows, :longest],
    )
    return part, places


def one_state_per_row(ids: th.Tensor) -> TokenBatch:
    """Make a batch of observations (N, L) in which each row's next token is evaluated."""
    length = lengths(ids)
    row = th.arange(len(ids), device=ids.device)
    return TokenBatch(ids.long()[:, : int(length.max())], row, length - 1)
