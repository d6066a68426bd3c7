"""From hidden states to tokens: log-probabilities, entropies and sampling at packed positions.

Pure functions on tensors. Logits exist for a bounded number of tokens at a time: at a vocabulary
of 49,152 those of one large minibatch would not fit in memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24
"""Logits held at a time (64 MiB in float32)."""

Head = Callable[[th.Tensor], th.Tensor]
"""(N, H) hidden states to (N, V) float32 logits, with temperature and masks applied."""


class TokenStatistics(NamedTuple):
    """What a policy says of N given tokens: log-probability and entropy, (N,) in nats."""

    log_prob: th.Tensor
    entropy: th.Tensor


def mask_logits(logits: th.Tensor, allowed: th.Tensor | None) -> th.Tensor:
    """Give tokens that are not `allowed` (bool, broadcastable) probability 0 exactly."""
    if allowed is None:
        return logits
    return logits.masked_fill(~allowed, th.finfo(logits.dtype).min)


def sample(logits: th.Tensor) -> th.Tensor:
    """Draw one token per row by inverting the distribution function.

    Several times faster than `torch.multinomial` on CPU. A token of probability 0 is never
    drawn: the first place where the cumulative sum exceeds the draw is one where it rises.

    Args:
        logits: (n, V) float32.

    Returns:
        (n,) int64.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    draw = th.rand_like(total) * total
    draw = th.minimum(draw, total.nextafter(th.zeros_like(total)))
    return th.searchsorted(cumulative, draw, right=True)[:, 0]


def log_prob_of(logits: th.Tensor, tokens: th.Tensor) -> th.Tensor:
    """Return the log-probability (nats) of one token per row: (n, V), (n,) to (n,)."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)


def token_statistics(
    hidden: th.Tensor,
    tokens: th.Tensor,
    head: Callable[[th.Tensor, slice], th.Tensor],
    vocab_size: int,
    entropy_gradient: bool = True,
) -> TokenStatistics:
    """Compute log-probability and entropy of N tokens, a bounded number of logits at a time.

    Where the tokens need more than one piece, the logits of a piece are computed again in the
    backward pass rather than kept.

    Args:
        hidden: (N, H), the state of each token.
        tokens: (N,) int64.
        head: Maps the hidden states of a slice of the N tokens to their logits, (n, V) float32.
        vocab_size: V.
        entropy_gradient: Whether the entropy can be differentiated; if it has no weight in the
            loss, leaving it out saves a pass over the logits.

    Returns:
        `TokenStatistics`, both (N,) float32.
    """

    def piece(states: th.Tensor, place: slice) -> TokenStatistics:
        logits = head(states, place)
        total = logits.logsumexp(dim=1)
        log_prob = logits.gather(1, tokens[place, None])[:, 0] - total
        with th.set_grad_enabled(entropy_gradient and th.is_grad_enabled()):
            log_probs = logits - total[:, None]
            entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        return TokenStatistics(log_prob, entropy)

    places = pieces(len(tokens), vocab_size)
    if len(places) == 1 or not th.is_grad_enabled():
        done = [piece(hidden[place], place) for place in places]
    else:
        done = [checkpoint(piece, hidden[place], place, use_reentrant=False) for place in places]
    return TokenStatistics(*(th.cat(parts) for parts in zip(*done, strict=True)))


def exact_kl(
    hidden: th.Tensor,
    ref_hidden: th.Tensor,
    head: Callable[[th.Tensor, slice], th.Tensor],
    ref_head: Callable[[th.Tensor, slice], th.Tensor],
    vocab_size: int,
) -> th.Tensor:
    """Sum p·(log p − log q) over the vocabulary at N states: (N, H) twice to (N,) nats."""
    parts = []
    for place in pieces(len(hidden), vocab_size):
        log_p = head(hidden[place], place).log_softmax(dim=1)
        log_q = ref_head(ref_hidden[place], place).log_softmax(dim=1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(dim=1))
    return th.cat(parts)


def pieces(n_tokens: int, vocab_size: int) -> list[slice]:
    """Cut `n_tokens` into slices of at most `LOGITS_AT_ONCE` logits."""
    step = max(1, LOGITS_AT_ONCE // vocab_size)
    return [slice(start, start + step) for start in range(0, max(n_tokens, 1), step)]
