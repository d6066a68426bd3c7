"""From hidden states to tokens: log-probabilities, entropies and sampling at packed positions.

Logits exist for a few rows at a time, small enough to stay in the processor's cache; what the
backward pass needs of them is kept where it is small and computed again where it is not. At a
vocabulary of 49,152 the logits of one large minibatch and their gradients would not fit in memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**22
"""Logits held at a time (16 MiB in float32)."""

KEPT_BYTES = 2**26
"""What the backward pass needs of all logits is kept if it is no larger, else computed again."""

WORTH_GATHERING = 0.75
"""Where fewer tokens than this share are ever allowed, their rows of the head are gathered; else
logits are computed of all, as copying a large head costs more."""


class TokenStatistics(NamedTuple):
    """What a policy says of N given tokens: log-probability and entropy, (N,) in nats."""

    log_prob: th.Tensor
    entropy: th.Tensor


class Capping(NamedTuple):
    """What a model makes of its output layer's products z: logits = cap·tanh(scale·z / cap).

    Attributes:
        scale: 1 in most models.
        cap: None: logits = scale·z.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: th.Tensor) -> th.Tensor:
        """Map products to logits."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


UNCAPPED = Capping()


class Head(NamedTuple):
    """The map from hidden states to the logits of tokens, in A places.

    Attributes:
        weight: (A, H): a row per token, or per token that is ever allowed.
        bias: (A,), or None.
        token_ids: (A,) int64, the token at each place.
        place_of: (V,) int64, each token's place; -1 where it is never allowed.
        temperature: Divides the logits, before they are capped.
        forbidden: (F,) int64, places that are never allowed.
        masks: (M, A) bool, further masks, or None.
        mask_id: (N,) int64, the row of `masks` that holds for each of N states, or None.
        dtype: What gradients are multiplied in.
        product: Multiplies states (n, H) with the weight and adds the bias, faster than PyTorch.
        cap: Logits z become cap·tanh(z / cap), where that is not None.
    """

    weight: th.Tensor
    bias: th.Tensor | None
    token_ids: th.Tensor
    place_of: th.Tensor
    temperature: float
    forbidden: th.Tensor
    masks: th.Tensor | None = None
    mask_id: th.Tensor | None = None
    dtype: th.dtype = th.float32
    product: Callable[[th.Tensor], th.Tensor] | None = None
    cap: float | None = None

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        allowed: th.Tensor,
        temperature: float,
        capping: Capping = UNCAPPED,
    ) -> "Head":
        """Make a head of an LM's output layer and the tokens ever allowed, (V,) bool.

        cap·tanh(scale·z / cap) / T is cap'·tanh(z / T' / cap'), with T' = T / scale and
        cap' = cap / T.
        """
        if capping.cap is not None:
            capped = cls.of(layer, allowed, temperature, capping._replace(cap=None))
            return capped._replace(cap=capping.cap / temperature)
        temperature = temperature / capping.scale
        weight, bias = layer.weight, getattr(layer, "bias", None)
        token_ids = allowed.nonzero()[:, 0]
        if len(token_ids) < WORTH_GATHERING * len(weight):
            place_of = th.where(allowed, allowed.cumsum(0) - 1, -1)
            weight = weight[token_ids]
            bias = bias[token_ids] if bias is not None else None
            return cls(weight, bias, token_ids, place_of, temperature, token_ids[:0])
        token_ids = th.arange(len(allowed), device=allowed.device)
        place_of = th.where(allowed, token_ids, -1)
        if len(allowed) < len(weight):
            weight, bias = (
                weight[: len(allowed)],
                bias[: len(allowed)] if bias is not None else None,
            )
        return cls(weight, bias, token_ids, place_of, temperature, (~allowed).nonzero()[:, 0])

    def logits(self, hidden: th.Tensor, part: slice | None = None) -> th.Tensor:
        """Map states to float32 logits, not differentiable.

        Args:
            hidden: (n, H).
            part: Which of the N states these are, where each has a mask of its own.

        Returns:
            (n, A); a token that a mask forbids has the lowest number there is.
        """
        with th.no_grad():
            hidden = hidden.to(self.weight.dtype)
            if self.product is not None:
                logits = self.product(hidden).float()
            else:
                logits = nn.functional.linear(hidden, self.weight, self.bias).float()
            if self.temperature != 1:
                logits /= self.temperature
            if self.cap is not None:
                logits.div_(self.cap).tanh_().mul_(self.cap)
            if len(self.forbidden):
                logits.index_fill_(1, self.forbidden, th.finfo(logits.dtype).min)
            if self.masks is not None and self.mask_id is not None:
                mask_logits_(logits, self.masks[self.mask_id[part]])
            return logits

    def bend(self, logits: th.Tensor) -> th.Tensor | None:
        """Return the slope of the cap at these logits, 1 − (z/cap)²; None without a cap."""
        # Of a masked token, which has the lowest number there is, it is 0.
        return None if self.cap is None else (1 - (logits / self.cap) ** 2).clamp_(min=0)

    def places_in(self, masks: th.Tensor) -> th.Tensor:
        """Bring masks over tokens (n, V) to masks over places (n, A)."""
        return masks if len(self.token_ids) == masks.shape[1] else masks[:, self.token_ids]

    def places(self, tokens: th.Tensor) -> th.Tensor:
        """Return the places of tokens, both (N,).

        Raises:
            ValueError: If a token is never allowed.
        """
        places = self.place_of[tokens]
        if bool((places < 0).any()):
            token = int(tokens[places < 0][0])
            raise ValueError(f"expected tokens that the policy may choose, got {token}")
        return places


def mask_logits_(logits: th.Tensor, allowed: th.Tensor) -> th.Tensor:
    """Give tokens that are not `allowed` (bool, broadcastable) probability 0 exactly, in place."""
    return logits.masked_fill_(~allowed, th.finfo(logits.dtype).min)


def sample(logits: th.Tensor) -> th.Tensor:
    """Draw one token per row by inverting the distribution function.

    Several times faster than `torch.multinomial` on CPU. A token of probability 0 is never
    drawn: the first place where the cumulative sum exceeds the draw is one where it rises.

    Args:
        logits: (n, V) float32.

    Returns:
        (n,) int64, places.

    Raises:
        FloatingPointError: If a logit is not finite.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise FloatingPointError("the policy's logits are not finite: its weights have diverged")
    draw = th.rand_like(total) * total
    draw = th.minimum(draw, total.nextafter(th.zeros_like(total)))
    return th.searchsorted(cumulative, draw, right=True)[:, 0]


def log_prob_of(logits: th.Tensor, places: th.Tensor) -> th.Tensor:
    """Return the log-probability (nats) of one place per row: (n, A), (n,) to (n,)."""
    return logits.gather(1, places[:, None])[:, 0] - logits.logsumexp(dim=1)


def token_statistics(hidden: th.Tensor, tokens: th.Tensor, head: Head) -> TokenStatistics:
    """Compute log-probability and entropy of N tokens, a few rows of logits at a time.

    Args:
        hidden: (N, H), the state of each token.
        tokens: (N,) int64.
        head: What maps the states to logits.

    Returns:
        `TokenStatistics`, both (N,) float32; differentiable in `hidden` and the head's weight.
    """
    places = head.places(tokens)
    learns = th.is_grad_enabled()
    return TokenStatistics(*_Statistics.apply(hidden, head.weight, head.bias, places, head, learns))


class _Statistics(th.autograd.Function):
    """Log p(a) and H = −Σ p·log p, with p = softmax(z), and their gradients.

    ∂ log p(a) / ∂z = 1_a − p   and   ∂H / ∂z = −p·(log p + H),

    each times the slope of the cap, where there is one.

    Where the head does not learn, ∂ log p(a) / ∂hidden = (1_a − p)·W / temperature is a vector
    per token and computed on the way forward. Where it does, 1_a − p is kept if it is small.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor | None,
        places: th.Tensor,
        head: Head,
        learns: bool,
    ) -> tuple[th.Tensor, th.Tensor]:
        log_prob = hidden.new_empty(len(places), dtype=th.float32)
        entropy = th.empty_like(log_prob)
        needed = ctx.needs_input_grad[:3] if learns else ()  # it says True under no_grad too
        slope = th.empty_like(hidden) if needed == (True, False, False) else None
        multiplier = weight.to(head.dtype) if slope is not None else weight
        small = len(places) * len(weight) * head.dtype.itemsize <= KEPT_BYTES
        kept = any(needed) and slope is None and small
        rises = []
        for part in pieces(len(places), len(weight)):
            logits = head.logits(hidden[part], part)
            bend = head.bend(logits) if slope is not None or kept else None
            log_p = log_softmax_(logits)
            p = log_p.exp()
            log_prob[part] = log_p.gather(1, places[part, None])[:, 0]
            entropy[part] = -(log_p.mul_(p)).sum(dim=1)
            if slope is None and not kept:
                continue
            # 1_a − p before it is rounded: near p(a) = 1 it is small
            rise = p.neg_().scatter_add_(1, places[part, None], p.new_ones(len(p), 1))
            rise = (rise if bend is None else rise.mul_(bend)).to(head.dtype)
            if slope is None:
                rises.append(rise)
            else:
                slope[part] = (rise @ multiplier).to(hidden.dtype) / head.temperature
        ctx.save_for_backward(hidden, weight, bias, places, entropy, slope, *rises)
        ctx.head = head
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_prob: th.Tensor, d_entropy: th.Tensor) -> tuple:
        hidden, weight, bias, places, entropy, slope, *rises = ctx.saved_tensors
        head: Head = ctx.head
        explores = bool(d_entropy.any())
        if slope is not None and not explores:
            return (d_log_prob[:, None] * slope).to(hidden.dtype), *[None] * 5
        d_hidden = th.empty_like(hidden)
        learns, shifts = ctx.needs_input_grad[1:3]
        d_weight = th.zeros_like(weight, dtype=th.float32) if learns else None
        d_bias = th.zeros_like(bias, dtype=th.float32) if shifts else None
        multiplier = weight.to(head.dtype)
        for i, part in enumerate(pieces(len(places), len(weight))):
            scale = d_log_prob[part, None] / head.temperature
            if rises and not explores:
                d_logits = rises[i] * scale.to(head.dtype)
            else:
                logits = head.logits(hidden[part], part)
                bend = head.bend(logits)
                log_p = log_softmax_(logits)
                p = log_p.exp()
                gain = d_entropy[part, None] / head.temperature
                p_log_p = log_p.add_(entropy[part, None]).mul_(p)  # finite, where p is 0 too
                d_logits = p_log_p.mul_(-gain).sub_(p.mul_(scale))
                d_logits.scatter_add_(1, places[part, None], scale)
                d_logits = (d_logits if bend is None else d_logits.mul_(bend)).to(head.dtype)
            if d_bias is not None:
                d_bias += d_logits.float().sum(dim=0)
            d_hidden[part] = (d_logits @ multiplier).to(hidden.dtype)
            if d_weight is None:
                continue
            if head.dtype == th.float32:
                d_weight.addmm_(d_logits.T, hidden[part].float())
            else:
                d_weight += d_logits.T @ hidden[part].to(head.dtype)
        d_weight = d_weight if d_weight is None else d_weight.to(weight.dtype)
        d_bias = d_bias if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


class Comparison(NamedTuple):
    """Two distributions at N states, π and π_ref: log π(a), log π_ref(a) and KL(π‖π_ref).

    All (N,) float32, in nats; the KL is the sum over the whole vocabulary.
    """

    log_prob: th.Tensor
    ref_log_prob: th.Tensor
    kl: th.Tensor


@th.no_grad()
def compare(
    hidden: th.Tensor, ref_hidden: th.Tensor, tokens: th.Tensor, head: Head, ref_head: Head
) -> Comparison:
    """Compare two models at N states, (N, H) each, and tokens (N,), a few rows at a time."""
    places = head.places(tokens)
    found = Comparison(*hidden.new_empty(3, len(hidden), dtype=th.float32))
    for part in pieces(len(hidden), len(head.weight)):
        log_p = log_softmax_(head.logits(hidden[part], part))
        log_q = log_softmax_(ref_head.logits(ref_hidden[part], part))
        found.log_prob[part] = log_p.gather(1, places[part, None])[:, 0]
        found.ref_log_prob[part] = log_q.gather(1, places[part, None])[:, 0]
        found.kl[part] = log_q.sub_(log_p).mul_(log_p.exp_()).sum(dim=1).neg_()
    return found


def log_softmax_(logits: th.Tensor) -> th.Tensor:
    """Normalise logits (n, V) to log-probabilities in place."""
    logits -= logits.logsumexp(dim=1, keepdim=True)
    return logits.clamp_(min=th.finfo(logits.dtype).min)


def pieces(n_tokens: int, vocab_size: int) -> list[slice]:
    """Cut `n_tokens` into slices of at most `LOGITS_AT_ONCE` logits."""
    step = max(1, LOGITS_AT_ONCE // vocab_size)
    return [slice(start, start + step) for start in range(0, n_tokens, step)]
