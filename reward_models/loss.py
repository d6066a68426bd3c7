"""The loss of records of human feedback, given what a model says of their texts.

Every record is a claim about a margin m of logits u, and the loss is the mean negative
log-likelihood of the records, in nats:

    rating      m = u(text)                    (m − r)² / 2, r the rating on the logit scale
    comparison  m = u(chosen) − u(rejected)    −log σ(m)     (Bradley & Terry 1952; a tie is half
                                                              a win for each side)
    label       m = u(text)                    −log σ(m) if good, −log σ(−m) if bad

Three variants of the choices, none of them on by default:

    ties by Rao & Kupper (1967)    P(chosen) = σ(m − η), P(tie) = (θ² − 1) σ(m − η) σ(−m − η), with
                                   η = log θ > 0 learned beside the weights: to a person, texts
                                   that differ by less than η are the same
    margin μ                       −log σ(m − μ)     (Touvron et al. 2023, Llama 2, eq. 2)
    label smoothing ε              −(1 − ε) log σ(m) − ε log σ(−m)     (Mitchell 2023, A note on DPO
                                   with noisy preferences: a share ε is the wrong way round)

θ is learned, not given, because nobody knows it beforehand, and the share of ties tells it only
together with the margins: it is one more number with a likelihood of its own.

The logit scale puts the ends of a human scale at −4 and +4, where σ is 0.02 and 0.98, so all three
pull on u with about the same strength. A scale from −4 to +4 is the logit itself.
"""

import numpy as np
import torch as th
from torch.nn import functional as F


def feedback_loss(
    logits: th.Tensor,
    first: th.Tensor,
    second: th.Tensor,
    target: th.Tensor,
    is_rating: th.Tensor,
    weight: th.Tensor | None = None,
    margin: float = 0.0,
    tie_threshold: th.Tensor | None = None,
) -> th.Tensor:
    """Mean negative log-likelihood of R records given the logits of T texts; see the module.

    Args:
        logits: shape (T,).
        first: text whose logit counts for the margin, shape (R,).
        second: text whose logit counts against it, shape (R,); T for none.
        target: the rating on the logit scale, or the probability with which the first side (or
            good) was chosen: 1, 0, or 0.5 for a tie; shape (R,).
        is_rating: which of both the target is, shape (R,).
        weight: factor of each record's loss, shape (R,); 1 if not given.
        margin: μ, how far the sides of a comparison have to be apart; ties have none.
        tie_threshold: η of Rao & Kupper, above 0, a scalar; ties are half-wins if not given.

    Returns:
        Loss in nats per record, a scalar; a rating's is that of a normal distribution with SD 1,
        without its constant.
    """
    padded = F.pad(logits, (0, 1))
    m = padded[first] - padded[second]
    squared = (m - target) ** 2 / 2
    compared = ~is_rating & (second < len(logits))
    tie = compared & (target == 0.5)
    gap = margin if tie_threshold is None else tie_threshold
    gap = th.where(compared & ~tie, gap, 0.0)
    choice = target * F.softplus(gap - m) + (1 - target) * F.softplus(gap + m)
    if tie_threshold is not None:
        log_factor = th.log(th.expm1(2 * tie_threshold))  # θ² − 1
        both = F.softplus(tie_threshold - m) + F.softplus(tie_threshold + m)
        choice = th.where(tie, both - log_factor, choice)
    loss = th.where(is_rating, squared, choice)
    return (loss if weight is None else weight * loss).mean()


def expected_share(margins: np.ndarray, tie_threshold: float | None) -> np.ndarray:
    """Log-odds of the first side's expected share, a tie being half of one, shape as given.

    Without ties, that is the margin. With them, the share is P(first) + P(tie) / 2 =
    (σ(m − η) + σ(m + η)) / 2; worked with logarithms, so that it stays finite.
    """
    if tie_threshold is None:
        return margins

    def log_both(m: np.ndarray) -> np.ndarray:
        return np.logaddexp(
            -np.logaddexp(0, tie_threshold - m), -np.logaddexp(0, -tie_threshold - m)
        )

    return log_both(margins) - log_both(-margins)
