"""What makes larger models fit: adapters, parts of minibatches, checkpointed layers, dtypes."""

import copy

import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2, tiny_llama
from test_agents_token_ppo import make_env, make_model
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from agents import SavePretrainedCallback, TokenPPO
from agents.lora import has_adapters, merged, without_adapters
from agents.sequences import TokenBatch, split

IDS = th.tensor([[6, 0, 1, 2, 3], [6, 6, 4, -1, -1]])
LORA = {"r": 4, "lora_alpha": 8}


def trained(**changes) -> TokenPPO:
    model = make_model(n_steps=16, batch_size=64, **changes)
    model.learn(128)
    return model


def kept_by(evaluate, batch) -> int:
    """Count the numbers that autograd keeps for the backward pass."""
    kept = []
    with th.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        evaluate(batch.observations, batch.actions)
    return sum(kept)


def flat(parameters) -> th.Tensor:
    return th.cat([p.detach().flatten() for p in parameters])


# --------------------------------------------------------------------------------------- LoRA


def test_adapters_learn_and_the_base_stays_which_is_the_reference() -> None:
    lm = tiny_llama(9)
    before = copy.deepcopy(lm)
    model = trained(lm=lm, policy_kwargs={"lora": LORA}, kl_coef=0.1)
    base = {n.replace(".base_layer", ""): p for n, p in model.policy.lm.named_parameters()}
    for name, parameter in before.named_parameters():
        assert th.equal(parameter, base[name]), name
    assert model.reference.shares_base and not list(model.reference.parameters())
    learns = {n for n, p in model.policy.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith("value_head") for n in learns)
    ids = IDS[:1]
    with th.no_grad():
        whole, hidden = before(input_ids=ids).logits, model.policy.lm(input_ids=ids).logits
        with without_adapters(model.policy.lm):
            th.testing.assert_close(model.policy.lm(input_ids=ids).logits, whole)
    assert (hidden - whole).abs().max() > 1e-3
    assert max(e["ref_kl"] for e in model.finished_episodes) > 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dora", [False, True])
def test_with_adapters_the_decoder_gives_what_a_whole_pass_gives(make, dora) -> None:
    model = trained(lm=make(9), policy_kwargs={"lora": {**LORA, "use_dora": dora}})
    policy, ids = model.policy, IDS[:1]
    with th.no_grad():
        for n in (3, 4, 5):
            observation = th.full((1, 8), -1)
            observation[:, :n] = ids[:, :n]
            hidden, _ = policy.last_hidden(observation)
            whole = policy.lm.base_model(input_ids=ids[:, :n]).last_hidden_state[:, -1]
            th.testing.assert_close(hidden, whole, atol=1e-5, rtol=1e-5)


def test_trainable_layers_choose_where_adapters_are_and_the_rest_is_run_once() -> None:
    model = trained(
        lm=tiny_llama(9, layers=3),
        policy_kwargs={"lora": LORA, "trainable_layers": 1},
        kl_coef=0.1,
    )
    adapted = {n.split(".")[3] for n, _ in model.policy.named_parameters() if "lora_" in n}
    assert adapted == {"2"} and model.policy.n_frozen == 2 == model.reference.n_frozen
    assert max(e["ref_kl"] for e in model.finished_episodes) > 0


def test_a_saved_adapter_loads_with_peft_and_merged_it_needs_no_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    tiny_llama(9).save_pretrained(tmp_path / "base")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = make_model(lm=lm, policy_kwargs={"lora": LORA})
    model.learn(
        128,
        callback=[
            SavePretrainedCallback(tmp_path / "adapter", letter_tokenizer("abcdef")),
            SavePretrainedCallback(tmp_path / "whole", merge=True),
        ],
    )
    with th.no_grad():
        expected = model.policy.lm(input_ids=IDS[:1]).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert (base(input_ids=IDS[:1]).logits - expected).abs().max() > 1e-3
        for loaded in (
            peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
            peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "whole"),
            merged(model.policy.lm),
        ):
            logits = loaded.eval()(input_ids=IDS[:1]).logits
            th.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = make_model(lm=str(tmp_path / "adapter"))  # merged as it is loaded
    assert not has_adapters(again.policy.lm)
    with th.no_grad():
        logits = again.policy.lm(input_ids=IDS[:1]).logits
        th.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_sb3s_zip_brings_adapters_back(tmp_path) -> None:
    model = trained(lm=tiny_llama(9), policy_kwargs={"lora": LORA}, kl_coef=0.1)
    model.save(tmp_path / "model")
    again = TokenPPO.load(tmp_path / "model", env=make_env())
    for (name, old), (_, new) in zip(
        model.policy.named_parameters(), again.policy.named_parameters(), strict=True
    ):
        assert th.equal(old, new), name
    again.learn(64, reset_num_timesteps=False)
    assert max(e["ref_kl"] for e in again.finished_episodes) > 0


def test_what_adapters_refuse() -> None:
    with pytest.raises(ValueError, match="peft refuses"):
        make_model(policy_kwargs={"lora": {"rank": 4}})
    for odd, match in (
        ({"bias": "lora_only"}, "bias='none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=None"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"target_modules": ["wte"]}, "without embeddings"),
    ):
        with pytest.raises(ValueError, match=match):
            make_model(policy_kwargs={"lora": {**LORA, **odd}})
    with pytest.raises(ValueError, match="without embeddings and the output head"):
        make_model(
            lm=tiny_llama(9), policy_kwargs={"lora": {**LORA, "target_modules": ["lm_head"]}}
        )
    with pytest.raises(ValueError, match="got both"):
        lora = {**LORA, "target_modules": ["q_proj"]}
        make_model(lm=tiny_llama(9), policy_kwargs={"lora": lora, "trainable_layers": 1})
    with pytest.raises(ValueError, match="got none"):
        make_model(lm=tiny_llama(9), policy_kwargs={"lora": LORA, "trainable_layers": 0})
    used = make_model(lm=tiny_llama(9), policy_kwargs={"lora": LORA}).policy.lm
    with pytest.raises(ValueError, match="without adapters"):
        make_model(lm=used)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llama(9), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="wrapped by peft"):
        make_model(lm=wrapped)


# ----------------------------------------------------------------------- parts of minibatches


def test_split_gives_every_sequence_to_one_part() -> None:
    rng = np.random.default_rng(0)
    length = rng.integers(3, 12, size=9)
    ids = th.full((9, 12), -1)
    for row, n in enumerate(length):
        ids[row, :n] = th.arange(n) + 100 * row
    row = th.repeat_interleave(th.arange(9), th.from_numpy(length) - 2)
    position = th.cat([th.arange(2, n) for n in length])
    batch = TokenBatch(ids, row, position, mask_id=row % 2, masks=th.ones(2, 5, dtype=th.bool))
    seen = []
    for part, places in split(batch, 4):
        seen += places.tolist()
        assert th.equal(part.ids[part.row, part.position], ids[row[places], position[places]])
        assert th.equal(part.mask_id, batch.mask_id[places])
    assert sorted(seen) == list(range(len(row))) and len(split(batch, 4)) == 4


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
def test_micro_batches_take_the_step_of_the_whole_minibatch(ent_coef: float, shared: bool) -> None:
    steps = []
    for size in (None, 7, 10**6):
        value_lm = None if shared else tiny_gpt2(9, seed=5)
        model = make_model(
            lm=tiny_llama(9),
            policy_kwargs={"micro_batch_size": size, "value_lm": value_lm},
            ent_coef=ent_coef,
            batch_size=40,
            kl_coef=0.1,
        )
        start = flat(model.policy.parameters())
        model.learn(64)
        steps.append(flat(model.policy.parameters()) - start)
    assert steps[0].abs().max() > 1e-3
    th.testing.assert_close(steps[1], steps[0], atol=2e-6, rtol=1e-3)
    th.testing.assert_close(steps[2], steps[0], atol=0, rtol=0)


def test_micro_batches_keep_no_activations_between_the_passes() -> None:
    peaks = []
    for size in (None, 16):
        model = make_model(env=make_env(16), policy_kwargs={"micro_batch_size": size}, n_steps=12)
        model.learn(1)
        batch = next(model.rollout_buffer.get(10**6))
        peaks.append(kept_by(model.policy.evaluate_actions, batch))
    assert peaks[1] < peaks[0] / 50


# ----------------------------------------------------------------------------- checkpointing


def opt() -> OPTForCausalLM:
    """A model whose layers apply dropout by their own flag."""
    th.manual_seed(0)
    config = OPTConfig(
        vocab_size=9, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "layers"),
    [(tiny_llama, None), (tiny_llama, 1), (tiny_gpt2, None), (tiny_gpt2, 1), (opt, None)],
)
def test_gradient_checkpointing_changes_memory_and_nothing_else(make, layers) -> None:
    steps, kept = [], []
    for checkpointed in (False, True):
        model = make_model(
            lm=make() if make is opt else make(9),
            policy_kwargs={"gradient_checkpointing": checkpointed, "trainable_layers": layers},
            kl_coef=0.1,
        )
        start = flat(model.policy.parameters())
        model.learn(64)
        steps.append(flat(model.policy.parameters()) - start)
        batch = next(model.rollout_buffer.get(10**6))
        kept.append(kept_by(model.policy.evaluate, batch))
        assert not any(m.training for m in model.policy.lm.modules())
    assert steps[0].abs().max() > 1e-3
    th.testing.assert_close(steps[1], steps[0], atol=1e-6, rtol=1e-3)
    assert kept[1] < kept[0]


def test_bfloat16_with_everything_at_once_learns() -> None:
    model = trained(
        lm=tiny_llama(9),
        policy_kwargs={
            "lora": LORA,
            "dtype": "bfloat16",
            "gradient_checkpointing": True,
            "micro_batch_size": 16,
            "value_lm": tiny_gpt2(9, seed=3),
        },
        kl_coef=0.05,
        value_warmup=1,
    )
    learned = [p for p in model.policy.parameters() if p.requires_grad]
    assert all(p.dtype == th.float32 and p.isfinite().all() for p in learned)


# ----------------------------------------------------------------------------- value network


def test_a_value_network_is_apart_from_the_policy() -> None:
    lm, value_lm = tiny_gpt2(9), tiny_llama(9, width=48, seed=1)
    model = make_model(lm=lm, policy_kwargs={"value_lm": value_lm}, kl_coef=0.1)
    model.learn(128)
    policy, obs = model.policy, th.as_tensor(model.env.reset())
    assert policy.value_head.in_features == 48
    with th.no_grad():
        _, values, _ = policy.forward(obs)
        length = (obs >= 0).sum(1)
        for row, n in enumerate(length.tolist()):
            hidden = value_lm.base_model(input_ids=obs[row : row + 1, :n]).last_hidden_state
            expected = policy.value_head(hidden[0, -1])
            th.testing.assert_close(values[row], expected, atol=1e-5, rtol=1e-5)
        th.testing.assert_close(policy.predict_values(obs), values)
    batch = next(model.rollout_buffer.get(10**6))
    values, _, _ = policy.evaluate_actions(batch.observations, batch.actions)
    policy.optimizer.zero_grad()
    values.sum().backward()
    assert all(p.grad is None for p in lm.parameters())
    assert any(p.grad is not None for p in value_lm.parameters())


def test_a_value_network_survives_sb3s_zip(tmp_path) -> None:
    model = trained(policy_kwargs={"value_lm": tiny_llama(9, seed=1)})
    model.save(tmp_path / "model")
    again = TokenPPO.load(tmp_path / "model", env=make_env())
    obs = th.as_tensor(make_env().reset())
    with th.no_grad():
        expected = model.policy.predict_values(obs)
        th.testing.assert_close(again.policy.predict_values(obs), expected)


def test_the_value_network_must_be_another_model() -> None:
    lm = tiny_gpt2(9)
    with pytest.raises(ValueError, match="another model"):
        make_model(lm=lm, policy_kwargs={"value_lm": lm})


@pytest.mark.parametrize("shared", [True, False])
def test_the_value_warms_up_while_the_policy_stays(shared: bool) -> None:
    value_lm = None if shared else tiny_llama(9, seed=1)
    model = make_model(
        policy_kwargs={"value_lm": value_lm},
        value_warmup=2,
        n_epochs=2,
        kl_coef=0.1,
        target_ref_kl=5.0,
    )
    lm, head = flat(model.policy.lm.parameters()), flat(model.policy.value_head.parameters())
    model.learn(2 * 64)  # 4 rows × 16 steps each
    assert th.equal(flat(model.policy.lm.parameters()), lm)
    assert (flat(model.policy.value_head.parameters()) - head).abs().max() > 1e-4
    if not shared:
        moved = flat(value_lm.parameters()) - flat(tiny_llama(9, seed=1).parameters())
        assert moved.abs().max() > 1e-4
    assert model.kl.coef == 0.1  # nothing to adapt to while the policy stays
    model.learn(64, reset_num_timesteps=False)
    assert not th.equal(flat(model.policy.lm.parameters()), lm) and model.kl.coef != 0.1


def test_value_warmup_is_at_least_zero() -> None:
    with pytest.raises(ValueError, match="value_warmup"):
        make_model(value_warmup=-1)
    with pytest.raises(ValueError, match="micro_batch_size"):
        make_model(policy_kwargs={"micro_batch_size": 0})
