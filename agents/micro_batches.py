"""Gradient accumulation that leaves the objective as it is, and SB3's training loop too.

A minibatch is evaluated in parts without keeping their activations; the loss, any loss, sees all
of it at once; when it is known what each token's figures are worth, each part is run again with
its activations and handed its share of the gradient (Gao et al. 2021, "Scaling deep contrastive
learning batch size under memory limited setup"). The price is one more forward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from agents.sequences import Part, TokenBatch, split

Outputs = tuple[th.Tensor, th.Tensor, th.Tensor]
Evaluate = Callable[[TokenBatch, th.Tensor], Outputs]


def evaluate_in_parts(
    evaluate: Evaluate,
    batch: TokenBatch,
    actions: th.Tensor,
    n_parts: int,
    unsynchronised: Callable[[], AbstractContextManager] = nullcontext,
) -> Outputs:
    """Return `evaluate(batch, actions)`, with the activations of one part of it at a time.

    Args:
        evaluate: Maps sequences and tokens to values (N, 1), log-probabilities and entropies (N,).
        batch: N tokens' sequences.
        actions: (N,) tokens.
        n_parts: How many parts of nearly equally many tokens, in whole sequences.
        unsynchronised: Entered for the backward pass of all parts but the last: for DDP.
    """
    parts = split(batch, n_parts)
    if len(parts) == 1 or not th.is_grad_enabled():
        return evaluate(batch, actions)
    anchor = th.zeros((), device=actions.device, requires_grad=True)
    return _InParts.apply(anchor, evaluate, parts, actions, unsynchronised)


class _InParts(th.autograd.Function):
    """Forward without a graph, part by part; backward builds each part's graph in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: th.Tensor,
        evaluate: Evaluate,
        parts: list[Part],
        actions: th.Tensor,
        unsynchronised: Callable[[], AbstractContextManager],
    ) -> Outputs:
        ctx.evaluate, ctx.parts, ctx.actions = evaluate, parts, actions
        ctx.unsynchronised = unsynchronised
        n_tokens = len(actions)
        found = (
            th.empty(n_tokens, 1, device=actions.device),
            th.empty(n_tokens, device=actions.device),
            th.empty(n_tokens, device=actions.device),
        )
        for batch, places in parts:
            for whole, part in zip(found, evaluate(batch, actions[places]), strict=True):
                whole[places] = part
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple:
        for i, (batch, places) in enumerate(ctx.parts):
            last = i == len(ctx.parts) - 1
            with th.enable_grad(), nullcontext() if last else ctx.unsynchronised():
                found = ctx.evaluate(batch, ctx.actions[places])
                pairs = [(f, g[places]) for f, g in zip(found, gradients, strict=True)]
                pairs = [(f, g) for f, g in pairs if f.requires_grad]
                th.autograd.backward(*zip(*pairs, strict=True))
        return None, None, None, None, None
