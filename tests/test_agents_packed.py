"""Packed linear layers against the layers that they stand for."""

import copy

import pytest
import torch as th
from transformers.pytorch_utils import Conv1D

from agents.packed import PackedLinear, called_linears, can_pack, pack_linears

pytestmark = pytest.mark.skipif(
    not can_pack(th.device("cpu"), th.float32), reason="this torch has no oneDNN"
)


@pytest.mark.parametrize("shape", [(1, 48), (33, 1, 48), (2, 5, 48)])
@pytest.mark.parametrize(
    "layer", [th.nn.Linear(48, 80), th.nn.Linear(48, 80, bias=False), Conv1D(80, 48)]
)
def test_packed_gives_the_layers_output(layer, shape) -> None:
    x, packed = th.randn(shape), PackedLinear.of(layer)
    with th.no_grad():
        th.testing.assert_close(packed(x), layer(x), atol=1e-5, rtol=1e-5)


def test_a_models_layers_are_packed_and_its_own_parameters_are_not_copied(make_lm) -> None:
    lm, ids = make_lm(9), th.randint(0, 9, (2, 5))
    twin = copy.deepcopy(lm, {id(p): p for p in lm.parameters()})
    pack_linears(twin, called_linears(twin))
    n_packed = sum(isinstance(m, PackedLinear) for m in twin.modules())
    assert n_packed == sum(type(m) in (th.nn.Linear, Conv1D) for m in lm.base_model.modules()) > 0
    with th.no_grad():
        whole = lm.base_model(input_ids=ids).last_hidden_state
        th.testing.assert_close(
            twin.base_model(input_ids=ids).last_hidden_state, whole, atol=1e-4, rtol=1e-4
        )
