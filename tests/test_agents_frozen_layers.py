"""Layers that do not learn: the same numbers with one pass through them as with many."""

import copy

import pytest
import torch as th
from conftest import tiny_gpt2, tiny_llama
from test_agents_token_ppo import make_env, make_model
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig

from agents.frozen_layers import (
    count_frozen,
    freeze_below,
    frozen_copy,
    go_on_from,
    run_frozen,
    shares_frozen,
    stack_of,
)


@pytest.mark.parametrize("n_frozen", [0, 1, 2])
def test_a_stack_run_in_two_parts_gives_the_whole(make_lm, n_frozen: int) -> None:
    lm = make_lm(9, layers=3)
    ids = th.randint(0, 9, (4, 7))
    with th.no_grad():
        whole = lm.base_model(input_ids=ids).last_hidden_state
        states = run_frozen(lm, n_frozen, ids)
        th.testing.assert_close(go_on_from(lm, n_frozen, states, ids), whole)


def test_frozen_layers_are_counted_from_what_learns(make_lm) -> None:
    lm = make_lm(9, layers=3)
    assert count_frozen(lm) == 0
    for trainable_layers, n_frozen in ((0, 2), (1, 2), (2, 1), (3, 0), (9, 0)):
        freeze_below(lm, trainable_layers)
        assert count_frozen(lm) == n_frozen
    freeze_below(lm, 1)
    lm.get_input_embeddings().requires_grad_(True)
    assert count_frozen(lm) == 0


def test_a_model_that_hands_more_than_states_to_its_layers_is_run_whole(monkeypatch) -> None:
    lm = tiny_llama(9, layers=3)
    freeze_below(lm, 1)
    assert count_frozen(lm) == 2
    left = []  # what the first layer leaves for the last one, past the states
    first, last = lm.base_model.layers[0], lm.base_model.layers[2]
    forward = last.forward
    first.register_forward_hook(lambda *_: left.append(1.0))
    monkeypatch.setattr(last, "forward", lambda x, *a, **k: forward(x, *a, **k) + sum(left))
    last.register_forward_hook(lambda *_: left.clear())
    assert count_frozen(lm) == 0


@pytest.mark.parametrize("family", ["gpt_neo", "bloom"])
def test_models_whose_layers_give_tuples_train_without_sharing(family: str) -> None:
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = {
        "gpt_neo": lambda: GPTNeoConfig(
            vocab_size=9,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            **ends,
        ),
        "bloom": lambda: BloomConfig(vocab_size=9, hidden_size=32, n_layer=2, n_head=2, **ends),
    }[family]()
    lm = AutoModelForCausalLM.from_config(config).eval()
    freeze_below(lm, 1)
    assert count_frozen(lm) == 0


def learned(lm, shared: bool, monkeypatch, **changes) -> tuple:
    """Two rollouts with the first layer of two frozen; how often the policy's and the reference's
    first layers ran behind the rollouts."""
    model = make_model(
        lm=copy.deepcopy(lm),
        kl_coef=0.3,
        n_epochs=3,
        policy_kwargs={"trainable_layers": 1, **changes},
    )
    if not shared:
        model.policy.n_frozen = model.reference.n_frozen = 0
    runs = []
    for lm in (model.policy.lm, model.reference.lm):
        stack_of(lm)[0].register_forward_hook(lambda *_: runs.append(1))
    finish, train = model.rollout_buffer.before_advantages, model.train

    def counted(function):
        def call():
            before = len(runs)
            function()
            behind.append(len(runs) - before)

        return call

    behind = []
    monkeypatch.setattr(model.rollout_buffer, "before_advantages", counted(finish))
    monkeypatch.setattr(model, "train", counted(train))
    model.learn(128)
    logged = model.logger.name_to_value
    return [p.detach().clone() for p in model.policy.parameters()], logged, behind


def test_sharing_the_frozen_layers_changes_nothing_but_the_work(make_lm, monkeypatch) -> None:
    lm = make_lm(9)
    shared, shared_log, shared_runs = learned(lm, True, monkeypatch)
    alone, alone_log, alone_runs = learned(lm, False, monkeypatch)
    start = list(make_model(lm=copy.deepcopy(lm)).policy.parameters())
    for a, b in zip(shared, alone, strict=True):
        th.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert max(float((a - b).abs().max()) for a, b in zip(shared, start, strict=True)) > 1e-3
    for key in ("rollout/ref_kl", "rollout/ref_kl_per_token_exact", "train/approx_kl"):
        assert shared_log[key] == pytest.approx(alone_log[key], abs=1e-5)
    assert shared_runs == [2, 0, 2, 0]  # each of a rollout's two minibatches once
    assert min(alone_runs) > 2


def test_a_reference_of_other_weights_runs_its_own_layers() -> None:
    lm = tiny_gpt2(9)
    own = make_model(lm=copy.deepcopy(lm), policy_kwargs={"trainable_layers": 1})
    assert own.policy.n_frozen == own.reference.n_frozen == 1
    assert shares_frozen(own.policy.lm, own.reference.lm, 1)
    other = make_model(
        lm=copy.deepcopy(lm), ref_lm=tiny_gpt2(9, seed=1), policy_kwargs={"trainable_layers": 1}
    )
    assert (other.policy.n_frozen, other.reference.n_frozen) == (1, 0)
    other.learn(64)
    whole = make_model(lm=copy.deepcopy(lm))
    assert whole.policy.n_frozen == 0


def test_a_frozen_copy_shares_what_does_not_learn() -> None:
    lm = tiny_llama(9)
    freeze_below(lm, 1)
    twin = frozen_copy(lm)
    same = [a is b for a, b in zip(lm.parameters(), twin.parameters(), strict=True)]
    assert same == [not p.requires_grad for p in lm.parameters()] and True in same and False in same
    assert not any(p.requires_grad for p in twin.parameters())


def test_bfloat16_keeps_the_ratio_check_with_shared_layers() -> None:
    model = make_model(
        env=make_env(4), policy_kwargs={"trainable_layers": 1, "dtype": "bfloat16"}, kl_coef=0.1
    )
    model.learn(128)
    assert model.policy.n_frozen == 1
