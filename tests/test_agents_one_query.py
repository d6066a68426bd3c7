"""Attention of one query per row against transformers' own."""

import pytest
import torch as th
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from agents.one_query import NAME, one_query_attention, use_one_query_attention


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("n_queries", [1, 2])
def test_it_gives_what_sdpa_gives(n_groups: int, floating: bool, n_queries: int) -> None:
    th.manual_seed(0)
    query, key, value = (
        th.randn(5, 2 * g, n, 8) for g, n in ((n_groups, n_queries), (1, 7), (1, 7))
    )
    mask = th.rand(5, 1, n_queries, 7) > 0.3
    mask[..., 0] = True
    if floating:
        mask = th.zeros(mask.shape).masked_fill(~mask, th.finfo(th.float32).min)
    layer = nn.Module()
    layer.num_key_value_groups = n_groups
    layer.is_causal = True
    found, _ = one_query_attention(layer, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    th.testing.assert_close(found, expected)


def test_only_models_that_attend_by_sdpa_are_switched(make_lm) -> None:
    lm, ids = make_lm(9), th.randint(0, 9, (2, 5))
    with th.no_grad():
        before = lm(input_ids=ids).logits
        use_one_query_attention(lm)
        assert lm.config._attn_implementation == NAME
        th.testing.assert_close(lm(input_ids=ids).logits, before)
    eager = make_lm(9)
    eager.set_attn_implementation("eager")
    use_one_query_attention(eager)
    assert eager.config._attn_implementation == "eager"
