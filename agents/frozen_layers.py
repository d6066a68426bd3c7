"""Layers that do not learn: choosing them, storing them small, and running them once per sequence.

A stack whose first layers are frozen gives the same states before the first layer that learns as
long as the tokens are the same. A rollout's update, reference and old log-probabilities can
therefore share one pass through them.
"""

import copy
from typing import Any

import torch as th
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from agents.states import close, example_ids, run, sequence_states, view


def freeze_below(lm: PreTrainedModel, trainable_layers: int | None) -> None:
    """Let only the last layers, all if there are no more, and the final norm of `lm` learn.

    None lets all of it learn, embeddings included. Of an encoder-decoder, the decoder's layers are
    counted. What stands between the layers and the output layer learns with them.

    Raises:
        ValueError: If the number is negative, or the model has no stack of layers.
    """
    if trainable_layers is None:
        return
    n_layers = len(stack_of(lm) or ())
    if n_layers == 0 or trainable_layers < 0:
        raise ValueError(
            f"expected trainable_layers >= 0 of the {n_layers} layers of {type(lm).__name__}, "
            f"got {trainable_layers}"
        )
    lm.requires_grad_(False)
    _, layers, behind = _parts(lm)
    heads = {id(p) for p in lm.get_output_embeddings().parameters()}
    # What stands behind the stack of layers works on its output: the final norm.
    for part in [*layers[max(0, n_layers - trainable_layers) :], *behind]:
        for parameter in part.parameters():
            parameter.requires_grad_(id(parameter) not in heads)


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


def count_frozen(lm: PreTrainedModel) -> int:
    """Count the first layers that can be run apart from the rest, as nothing in them learns.

    0 if something before them learns, or if the model's layers do not take and give one tensor of
    states. At least the last layer is left for the rest.
    """
    if stack_of(lm) is None:
        return 0
    before, layers, _ = _parts(lm)
    learns = [any(p.requires_grad for p in part.parameters()) for part in layers]
    if any(p.requires_grad for part in before for p in part.parameters()):
        return 0
    n_frozen = min([*learns, True].index(True), len(layers) - 1)
    return n_frozen if n_frozen > 0 and runs_in_two_parts(lm, n_frozen) else 0


def run_frozen(lm: PreTrainedModel, n_frozen: int, ids: th.Tensor) -> th.Tensor:
    """Run ids (B, L) through the first `n_frozen` layers; return the states (B, L, H)."""
    layers = stack_of(lm)
    assert layers is not None
    end = _Catch()
    with th.no_grad():
        kept = nn.ModuleList([*layers[:n_frozen], *[end] * (len(layers) - n_frozen)])
        run(view(lm, layers, kept), input_ids=ids, use_cache=False)
    assert end.states is not None
    return end.states


def go_on_from(lm: PreTrainedModel, n_frozen: int, states: th.Tensor, ids: th.Tensor) -> th.Tensor:
    """Run the layers that follow the first `n_frozen`; return the last states (B, L, H).

    Args:
        lm: The model.
        n_frozen: Layers that have been run.
        states: (B, L, H), what they gave.
        ids: (B, L), the tokens.
    """
    layers = stack_of(lm)
    assert layers is not None
    kept = nn.ModuleList([*[_Replay(states)] * n_frozen, *layers[n_frozen:]])
    return run(view(lm, layers, kept), input_ids=ids, use_cache=False)


def shares_frozen(a: PreTrainedModel, b: PreTrainedModel, n_frozen: int) -> bool:
    """Say whether the first `n_frozen` layers, and all before them, are the same weights."""
    weights = []
    for lm in (a, b):
        before, layers, _ = _parts(lm)
        weights.append([id(p) for part in [*before, *layers[:n_frozen]] for p in part.parameters()])
    return weights[0] == weights[1]


def shard_layers(lm: PreTrainedModel) -> None:
    """Make each layer a group of FSDP2, whose weights are brought together when it runs.

    Raises:
        ValueError: If the model has no stack of layers.
    """
    layers = stack_of(lm)
    if layers is None:
        raise ValueError(f"shard: expected a model with a stack of layers, got {type(lm).__name__}")
    for layer in layers:
        fully_shard(layer)


def stack_of(lm: PreTrainedModel) -> nn.ModuleList | None:
    """Return the model's stack of layers, an encoder-decoder's decoder's; None if it has none."""
    parts: list[nn.Module] = [lm.get_decoder() if lm.config.is_encoder_decoder else lm]
    while parts:
        parts = [child for part in parts for child in part.children()]
        for part in parts:
            if isinstance(part, nn.ModuleList):
                return part
    return None


def runs_in_two_parts(lm: PreTrainedModel, n_frozen: int) -> bool:
    """Try it: layers of some models give tuples, or hand on more than states."""
    ids = example_ids(lm, n_rows=2)
    with th.no_grad():
        try:
            states = run_frozen(lm, n_frozen, ids)
            whole = sequence_states(lm, ids)
            parts = go_on_from(lm, n_frozen, states, ids)
        except Exception:  # whatever a model does with a layer that is not its own
            return False
    return parts.shape == whole.shape and close(parts, whole)


class _Catch(nn.Module):
    """Stands for layers that are left out at the end: keeps the states that come first."""

    def __init__(self) -> None:
        super().__init__()
        self.states: th.Tensor | None = None

    def forward(self, hidden_states: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        if self.states is None:
            self.states = hidden_states
        return hidden_states


class _Replay(nn.Module):
    """Stands for layers that have been run: gives their states, whatever comes in."""

    def __init__(self, states: th.Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, hidden_states: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        return self.states


def _parts(lm: PreTrainedModel) -> tuple[list[nn.Module], nn.ModuleList, list[nn.Module]]:
    """Return what stands before the stack of layers, the stack, and what stands behind it."""
    layers = stack_of(lm)
    assert layers is not None
    before: list[nn.Module] = []
    behind: list[nn.Module] = []
    around: nn.Module = lm
    while around is not layers:
        children = list(around.named_children())
        place = next(i for i, (_, part) in enumerate(children) if layers in part.modules())
        for i, (name, part) in enumerate(children):
            if i < place or (
                i > place and "embed" in name
            ):  # BART's norm of embeddings stands last
                before.append(part)
        behind = [p for name, p in children[place + 1 :] if "embed" not in name] + behind
        around = children[place][1]
    return before, layers, behind
