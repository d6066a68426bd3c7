"""The checks of `train.py check`: good models pass, and each way of being broken is named."""

import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2, tiny_llama
from transformers import GPT2Model, LlamaModel

import agents.policy
import text_env
from agents import checks, forecast, reward_checks
from agents.policy import CausalLMPolicy

BODIES = {tiny_gpt2: GPT2Model, tiny_llama: LlamaModel}


def make_policy(lm, temperature=0.7, max_new_tokens=12, **changes) -> CausalLMPolicy:
    env = text_env.TextVecEnv(
        num_envs=1,
        tokenizer=letter_tokenizer("abcdef"),
        prompts=[">" * 5],
        reward_fn=lambda prompts, completions, **_: [0.0] * len(prompts),
        max_new_tokens=max_new_tokens,
    )
    policy = CausalLMPolicy(
        env.observation_space,
        env.action_space,
        lambda _: 0.0,
        lm=lm,
        temperature=temperature,
        **changes,
    )
    policy.allowed_tokens.copy_(th.from_numpy(np.array(env.allowed_tokens)))
    return policy


PROMPTS = [np.array([6] * n) for n in (1, 3, 5, 2)]


def walked(policy, n_tokens=10) -> list[checks.Walked]:
    th.manual_seed(0)
    return checks.walk(policy, PROMPTS, n_tokens)


def louder(lm):
    """Random weights of tiny models hardly attend to anything: here they do."""
    with th.no_grad():
        for p in lm.parameters():
            if p.ndim > 1:
                p.mul_(6)
    return lm


def broken(monkeypatch, body, spoil) -> None:
    """Let the forward passes of a class of models go through `spoil(call, arguments)`."""
    forward = body.forward

    def spoilt(self, *positional, **arguments):
        return spoil(lambda **given: forward(self, *positional, **given), arguments)

    monkeypatch.setattr(body, "forward", spoilt)


# ----------------------------------------------------------------- the invariants


def test_a_good_model_keeps_the_invariants(make_lm) -> None:
    policy = make_policy(make_lm(9))
    sequences = walked(policy)
    assert len(sequences) == 6  # two of the four rows began anew
    assert sum(len(w.log_probs) for w in sequences) == 4 * 10
    found = [
        checks.check_cache(policy, sequences),
        checks.check_padding(policy, sequences),
        checks.check_temperature(policy, PROMPTS[1]),
        checks.check_ends(policy, sequences, [7], ["eos", "length"], 0, 12),
    ]
    assert [v.level for v in found] == ["ok"] * 4, found
    assert found[0].figures["error"] < 1e-5 and found[0].figures["tokens"] == 40
    assert "1 of 2 completions ended" in found[3].said
    assert 0.05 < found[3].figures["probability"] < 0.4  # 1 / 7, about


def test_plain_log_probs_are_the_models_own(make_lm) -> None:
    lm = make_lm(9)
    policy = make_policy(lm, temperature=0.5)
    with th.no_grad():
        logits = lm(input_ids=th.tensor([[6, 0, 3]])).logits[0] / 0.5
    logits[:, [6, 8]] = -th.inf  # prompt's sign is ordinary, padding is not allowed
    logits[:, 6] = lm(input_ids=th.tensor([[6, 0, 3]])).logits[0, :, 6].detach() / 0.5
    expected = logits.log_softmax(1)
    found = checks.plain_log_probs(policy, np.array([6, 0, 3]))
    th.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_cache_with_wrong_positions_is_named(make_lm, monkeypatch) -> None:
    def forget_positions(call, arguments):
        if arguments.get("past_key_values") is not None:
            arguments.pop("position_ids", None)
        return call(**arguments)

    lm = louder(make_lm(9))
    policy = make_policy(lm)
    broken(monkeypatch, BODIES[make_lm], forget_positions)
    found = checks.check_cache(policy, walked(policy))
    assert found.level == "wrong" and "position_ids" in found.said
    assert checks.check_padding(policy, walked(policy)).level == "ok"
    with pytest.warns(UserWarning, match="cannot be cached"):
        policy = make_policy(lm)  # it tries, and does without
    found = checks.check_cache(policy, walked(policy))
    assert found.level == "look" and "other states than without" in found.said


def test_an_ignored_attention_mask_and_looking_ahead_are_named(make_lm, monkeypatch) -> None:
    def attend_to_all(call, arguments):
        if (mask := arguments.get("attention_mask")) is not None:
            arguments["attention_mask"] = th.ones_like(mask)
        return call(**arguments)

    policy = make_policy(louder(make_lm(9)))
    sequences = walked(policy)
    with monkeypatch.context() as patch:
        broken(patch, BODIES[make_lm], attend_to_all)
        found = checks.check_padding(policy, sequences)
        assert found.level == "wrong" and "padded to the left" in found.said

    def look_ahead(call, arguments):
        output = call(**arguments)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(
            dim=1, keepdim=True
        )
        return output

    broken(monkeypatch, BODIES[make_lm], look_ahead)
    found = checks.check_padding(policy, sequences)
    assert found.level == "wrong" and "not causal" in found.said


def test_another_temperature_in_sampling_is_named(monkeypatch) -> None:
    policy = make_policy(tiny_gpt2(9), temperature=0.1)
    true = agents.policy.sample
    monkeypatch.setattr(agents.policy, "sample", lambda logits: true(logits * 0.1))
    found = checks.check_temperature(policy, PROMPTS[1])
    assert found.level == "wrong" and "not drawn from the distribution" in found.said
    assert found.figures["z"] < -5 and found.figures["error"] < 1e-4  # evaluation is right


def test_another_temperature_in_evaluation_is_named(monkeypatch) -> None:
    policy = make_policy(tiny_gpt2(9), temperature=0.1)
    true = agents.policy.log_prob_of
    monkeypatch.setattr(
        agents.policy, "log_prob_of", lambda logits, places: true(logits * 0.1, places)
    )
    found = checks.check_temperature(policy, PROMPTS[1])
    assert found.level == "wrong" and found.figures["error"] > 0.01
    assert checks.check_cache(policy, walked(policy)).level == "wrong"


def test_an_end_that_is_never_allowed_or_never_comes_is_named() -> None:
    policy = make_policy(tiny_gpt2(9))
    sequences = walked(policy)
    found = checks.check_ends(policy, sequences, [7], ["length"] * 4, 12, 12)
    assert found.level == "wrong" and "EOS is never allowed: min_new_tokens (12)" in found.said
    found = checks.check_ends(policy, sequences, [7], ["length"] * 4, 0, 12)
    assert found.level == "look" and "none of 4 completions ended" in found.said
    found = checks.check_ends(policy, sequences, [], ["length"] * 4, 0, 12)
    assert found.level == "wrong" and "no end token" in found.said
    assert checks.check_ends(policy, sequences, [], ["stop"] * 4, 0, 12).level == "ok"
    policy.allowed_tokens[7] = False
    found = checks.check_ends(policy, sequences, [7], ["length"] * 4, 0, 12)
    assert found.level == "wrong" and "no end token is among" in found.said


def test_vocabulary_and_special_tokens() -> None:
    tokenizer = letter_tokenizer("abcdef")
    assert checks.check_vocabulary(tiny_gpt2(9), tokenizer).level == "ok"
    found = checks.check_vocabulary(tiny_gpt2(8), tokenizer)
    assert found.level == "wrong" and "has 9 tokens, the model 8" in found.said
    assert checks.check_vocabulary(tiny_gpt2(20), tokenizer).level == "look"
    lm = tiny_gpt2(9)
    assert checks.check_end_token(lm, tokenizer).said == "EOS is '<eos>' (7)"
    lm.config.eos_token_id = 3
    found = checks.check_end_token(lm, tokenizer)
    assert found.level == "look" and "ends texts with [3]" in found.said
    lm.config.eos_token_id = [7, 3]
    assert "ends texts with [3] too" in checks.check_end_token(lm, tokenizer).said
    assert checks.check_padding_token(tokenizer).level == "ok"
    tokenizer.pad_token = "<eos>"
    assert checks.check_padding_token(tokenizer).level == "look"
    tokenizer.eos_token = None
    assert checks.check_end_token(lm, tokenizer).level == "wrong"
    assert "there is none" in checks.check_chat_template(tokenizer).said
    tokenizer.chat_template = "{{ messages }}"
    assert checks.check_chat_template(tokenizer).said == "there is one"


def test_a_check_that_fails_is_wrong() -> None:
    found = checks.attempt("cache", checks.check_cache, None, [])
    assert (found.name, found.level) == ("cache", "wrong") and "failed with" in found.said


# ------------------------------------------------------------------------ rewards

TEXTS = ["good film", "bad film", "a good, good film", "dull", "fine", "the film is long"]
ASKED = ["The", "The", "A", "A", "It", "It"]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def relative(prompts, completions, **columns):
    mean = np.mean([len(text) for text in completions])
    return [len(text) - mean for text in completions]


def by_place(prompts, completions, **columns):
    return [float(i) for i in range(len(completions))]


DICE = np.random.default_rng(0)
REWARDS = {
    "NaN": (lambda completions, **_: [float("nan")] * len(completions), "finite", "nan"),
    "infinite for nothing": (
        lambda completions, **_: [1 / len(c) if c else float("inf") for c in completions],
        "finite",
        "the odd text '' is inf",
    ),
    "raises": (lambda completions, **_: 1 / 0, "finite", "ZeroDivisionError"),
    "one too few": (lambda completions, **_: [1.0] * (len(completions) - 1), "finite", "got 5"),
    "a number": (lambda completions, **_: 1.0, "finite", "got float"),
    "strings": (lambda completions, **_: ["1.0"] * len(completions), "finite", "numbers"),
    "relative": (relative, "batch", "the rest of the batch"),
    "by place": (by_place, "batch", "the order of the batch"),
    "random": (lambda completions, **_: DICE.random(len(completions)), "batch", "is random"),
    "constant": (lambda completions, **_: [2.0] * len(completions), "spread", "all 6 samples"),
}
REWARD_CHECKS = {
    "finite": reward_checks.check_finite,
    "batch": reward_checks.check_batch,
    "spread": reward_checks.check_spread,
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_bad_reward_is_named(name) -> None:
    reward, which, said = REWARDS[name]
    found = checks.attempt(which, REWARD_CHECKS[which], reward, ASKED, TEXTS, {})
    assert found.level == "wrong" and said in found.said


def test_a_good_reward_passes() -> None:
    for check in REWARD_CHECKS.values():
        found = check(length, ASKED, TEXTS, {})
        assert found.level == "ok", found
    assert found.figures["sd within prompts"] > 1


def test_a_reward_to_look_at() -> None:
    found = reward_checks.check_spread(
        lambda prompts, completions: [float(len(p)) for p in prompts], ASKED, TEXTS, {}
    )
    assert found.level == "look" and "score is the prompt's" in found.said

    def rounded(prompts, completions):  # off by 1 % of the spread in a batch
        return [len(c) + (0.05 if len(completions) > 1 else 0) for c in completions]

    found = reward_checks.check_batch(rounded, ASKED, TEXTS, {})
    assert found.level == "look" and "rounding, probably" in found.said
    rare = reward_checks.check_spread(
        lambda prompts, completions: [float(i == 0) for i in range(len(completions))],
        ["p"] * 20,
        [str(i) for i in range(20)],
        {},
    )
    assert rare.level == "look" and "19 of 20 score 0 exactly" in rare.said


def test_without_finite_scores_the_rest_is_not_checked() -> None:
    for which in ("batch", "spread"):
        found = REWARD_CHECKS[which](REWARDS["NaN"][0], ASKED, TEXTS, {})
        assert found.level == "look" and "needs finite scores" in found.said


def test_columns_come_along_in_their_order() -> None:
    def reward(prompts, completions, wanted):
        return [float(w in c) for c, w in zip(completions, wanted, strict=True)]

    columns = {"wanted": ["good", "good", "good", "fine", "fine", "long"]}
    for check in REWARD_CHECKS.values():
        assert check(reward, ASKED, TEXTS, columns).level == "ok"


# -------------------------------------------------------------- speed and memory


def test_the_forecast_by_hand() -> None:
    lm = tiny_gpt2(9)
    policy = make_policy(lm)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    sequences = walked(policy)
    found = forecast.measure(policy, PROMPTS, sequences, n_rows=6, n_tokens=5)
    assert found.decode > 0 and found.update > 0 and found.rows == 6
    width = 17 + 16  # 5 + 12 ids, and the decoder's margin
    assert found.cache_per_row == 2 * 2 * width * 32 * 4  # keys and values of 2 layers, float32
    assert all(p.equal(before[name]) and p.grad is None for name, p in policy.named_parameters())
    assert 500 < found.kept_per_position < 50_000
    parts = forecast.memory_parts(policy, found, 10, 100, 200)
    n = sum(p.numel() for p in policy.parameters())
    assert parts["weights"] == parts["gradients"] == 4 * n and parts["optimizer"] == 8 * n
    assert parts["reference"] == 4 * sum(p.numel() for p in lm.parameters())
    assert parts["cache"] == 10 * found.cache_per_row and parts["logits"] == 12 * 10 * 8
    assert parts["activations"] == 100 * found.kept_per_position and parts["frozen states"] == 0
    rollout = parts["decoder"] + parts["cache"] + parts["logits"]
    update = parts["gradients"] + parts["activations"]
    always = parts["weights"] + parts["reference"] + parts["optimizer"]
    assert parts["peak"] == always + max(rollout, update)
    assert forecast.check_memory(parts, parts["peak"] * 2).level == "ok"
    assert "fewer n_envs" in forecast.check_memory(parts, parts["peak"]).said
    assert forecast.device_memory(th.device("cpu")) > 2**28
    speed = forecast.check_speed(found._replace(decode=100.0, update=50.0), 10, 20.0, 2)
    assert "takes some 2 s, its update 8 s" in speed.said


def test_fewer_layers_that_learn_need_less() -> None:
    all_of_it, last = make_policy(tiny_gpt2(9)), make_policy(tiny_gpt2(9), trainable_layers=1)
    kept = [forecast.measure_update(policy, walked(policy))[1] for policy in (all_of_it, last)]
    assert kept[1] < 0.8 * kept[0]
    measured = forecast.Measured(1.0, 1.0, 1, 1.0, 1.0)
    parts = [forecast.memory_parts(p, measured, 1, 1, 10) for p in (all_of_it, last)]
    assert parts[1]["reference"] < 0.7 * parts[0]["reference"]
    assert parts[1]["frozen states"] == 10 * 32 * 4
