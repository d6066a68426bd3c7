"""Layers that do not learn: choosing them, storing them small, and running them once per sequence.

A stack whose first layers are frozen gives the same states before the first layer that learns as
long as the tokens are the same. A rollout's update, reference and old log-probabilities can
therefore share one pass through them.
"""

import copy
from typing import Any

import torch as th
from torch import nn
from transformers import PreTrainedModel


def freeze_below(lm: PreTrainedModel, trainable_layers: int | None) -> int:
    """Let only the last layers, all if there are no more, and the final norm of `lm` learn.

    Args:
        lm: A causal LM.
        trainable_layers: How many layers learn; None: all of the model, embeddings included.

    Returns:
        How many layers before the last one are frozen, with all that comes before them, if the
        model can be run in two parts there; else 0.

    Raises:
        ValueError: If the number is negative, or the model has no stack of layers.
    """
    if trainable_layers is None:
        return 0
    name = stack_name(lm.base_model)
    layers = lm.base_model.get_submodule(name) if name else []
    if not name or trainable_layers < 0:
        raise ValueError(
            f"expected trainable_layers >= 0 of the {len(layers)} layers of {type(lm).__name__}, "
            f"got {trainable_layers}"
        )
    lm.requires_grad_(False)
    n_frozen = max(0, len(layers) - trainable_layers)
    # What stands behind the stack of layers works on its output: the final norm.
    children = dict(lm.base_model.named_children())
    behind = list(children.values())[list(children).index(name) + 1 :]
    for part in [*layers[n_frozen:], *behind]:
        part.requires_grad_(True)
    n_below = min(n_frozen, len(layers) - 1)
    return n_below if resumes_exactly(lm.base_model, n_below) else 0


def round_frozen(lm: PreTrainedModel, dtype: th.dtype) -> None:
    """Keep the matrices that do not learn in the dtype they are computed in.

    Autocast would round them anew at every forward pass. Embeddings (and so the head) and norms
    stay as they are.
    """
    looked_up = [m for m in lm.modules() if isinstance(m, nn.Embedding)]
    kept = {id(module.weight) for module in [*looked_up, lm.get_output_embeddings()]}
    for parameter in lm.parameters():
        if not parameter.requires_grad and parameter.ndim > 1 and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def frozen_copy(lm: PreTrainedModel) -> PreTrainedModel:
    """Copy a model; parameters that do not learn are shared rather than copied."""
    shared = {id(p): p for p in lm.parameters() if not p.requires_grad}
    return copy.deepcopy(lm, shared).requires_grad_(False)


def run_frozen(body: PreTrainedModel, n_frozen: int, ids: th.Tensor) -> th.Tensor:
    """Run ids (B, L) through the first `n_frozen` layers; return the states (B, L, H)."""
    layers = stack_of(body)
    end = _HandOn()
    view = _with_layers(body, [*layers[:n_frozen], *[end] * (len(layers) - n_frozen)])
    with th.no_grad():
        view(input_ids=ids, use_cache=False)
    assert end.states is not None
    return end.states


def go_on_from(
    body: PreTrainedModel, n_frozen: int, states: th.Tensor, ids: th.Tensor
) -> th.Tensor:
    """Run the layers that follow the first `n_frozen`; return the last states (B, L, H).

    Args:
        body: The model without its head.
        n_frozen: Layers that have been run.
        states: (B, L, H), what they gave.
        ids: (B, L), the tokens.
    """
    begin = _HandOn(states)
    view = _with_layers(body, [*[begin] * n_frozen, *stack_of(body)[n_frozen:]])
    return view(input_ids=ids, use_cache=False).last_hidden_state


def shares_layers(a: PreTrainedModel, b: PreTrainedModel, n_frozen: int) -> bool:
    """Say whether the first `n_frozen` layers, and the embeddings, are the same weights."""
    parts = [(x.get_input_embeddings(), *stack_of(x)[:n_frozen]) for x in (a, b)]
    weights = [[id(p) for module in part for p in module.parameters()] for part in parts]
    return weights[0] == weights[1]


def stack_name(body: PreTrainedModel) -> str | None:
    """Return the name of the model's stack of layers; None if it has none."""
    lists = (name for name, part in body.named_children() if isinstance(part, nn.ModuleList))
    return next(lists, None)


def stack_of(body: PreTrainedModel) -> nn.ModuleList:
    """Return the model's stack of layers."""
    stack = body.get_submodule(stack_name(body) or "")
    assert isinstance(stack, nn.ModuleList)
    return stack


@th.no_grad()
def resumes_exactly(body: PreTrainedModel, n_frozen: int) -> bool:
    """Say whether the model can be run in two parts: some hand more than states to a layer."""
    ids = th.arange(4, device=body.device)[None]
    states = run_frozen(body, n_frozen, ids)
    whole = body(input_ids=ids, use_cache=False).last_hidden_state
    return th.allclose(go_on_from(body, n_frozen, states, ids), whole, atol=1e-4)


class _HandOn(nn.Module):
    """Stands for layers left out: keeps the states that came first, and hands them on."""

    def __init__(self, states: th.Tensor | None = None) -> None:
        super().__init__()
        self.states = states

    def forward(self, hidden_states: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        if self.states is None:
            self.states = hidden_states
        return self.states


def _with_layers(body: PreTrainedModel, layers: list[nn.Module]) -> PreTrainedModel:
    """Return a view of the model with another stack; its other parts are the same objects."""
    view = copy.copy(body)
    view._modules = {**body._modules, stack_name(body) or "": nn.ModuleList(layers)}
    return view
