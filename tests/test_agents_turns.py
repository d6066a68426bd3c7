"""TokenPPO in conversations: the user's tokens are read, and nothing is learned from them."""

import numpy as np
import pytest
import torch as th
from checkpoint_fixtures import Seen, Watch, decay, differences, make_model, result, run
from conftest import letter_tokenizer, tiny_gpt2
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

import text_env
from agents import CausalLMPolicy, TokenPPO, TokenRLOO
from agents.buffer import TokenRolloutBuffer
from agents.language_model import Reference
from agents.writing import write_episodes

ASSISTANT, USER, VOCABULARY = "abcdef", "uvwxyz", 15
"""Letters of each: one can tell a token's author by it."""

CHATS = [
    {"prompt": [{"role": "user", "content": "v"}], "turns": ["wx", "yyyy"]},
    {"prompt": [{"role": "user", "content": "vvv"}], "turns": ["z"]},
    {"prompt": [{"role": "user", "content": "x"}], "turns": []},
]


def chat_tokenizer():
    """A user's turn begins with "u", the assistant's with ">"; both end with <eos>."""
    tokenizer = letter_tokenizer(ASSISTANT + USER)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'u' if m.role == 'user' else '>' }}{{ m.content }}<eos>"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    return tokenizer


def count_a(prompts, completions, **columns) -> list[float]:
    return [float(sum(m["content"].count("a") for m in c[::2])) for c in completions]


def make_env(num_envs: int = 3, **changes) -> text_env.TextVecEnv:
    settings = {
        "tokenizer": chat_tokenizer(),
        "prompts": CHATS,
        "reward_fn": count_a,
        "max_new_tokens": 4,
        "allowed_token_ids": range(len(ASSISTANT)),
        **changes,
    }
    return text_env.TextVecEnv(num_envs=num_envs, **settings)


def model_of(env=None, algorithm=TokenPPO, **changes):
    kwargs = {"lm": tiny_gpt2(VOCABULARY), **changes.pop("policy_kwargs", {})}
    env = env if env is not None else make_env()
    return make_model(env, algorithm, policy_kwargs=kwargs, **changes)


class AtRolloutEnd(BaseCallback):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.function(self.model)


def test_cached_decoding_equals_full_passes_through_users_turns(make_lm) -> None:
    env, lm = make_env(5), make_lm(VOCABULARY)
    policy = CausalLMPolicy(env.observation_space, env.action_space, lambda _: 0.0, lm=lm)
    rng, inserted = np.random.default_rng(0), 0
    env.seed(0)
    obs = env.reset()
    with th.no_grad():
        for _ in range(60):
            found = policy.get_distribution(th.from_numpy(obs)).distribution.logits
            for row, logits in zip(obs, found, strict=True):
                ids = th.from_numpy(row[row >= 0])[None]
                expected = lm(input_ids=ids).logits[0, -1].log_softmax(0)
                th.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            before = (obs >= 0).sum(axis=1)
            obs, _, dones, _ = env.step(rng.choice(np.flatnonzero(env.allowed_tokens), 5))
            inserted += int((~dones & ((obs >= 0).sum(axis=1) > before + 1)).sum())
    assert inserted > 10


@pytest.mark.parametrize("n_steps", [5, 16])
def test_only_own_tokens_are_trained_and_the_first_ratio_is_1(make_lm, n_steps: int) -> None:
    model = model_of(make_env(4), n_steps=n_steps, policy_kwargs={"lm": make_lm(VOCABULARY)})
    seen = {"users": 0, "batches": 0}

    def check(model) -> None:
        buffer = model.rollout_buffer
        model.policy.action_masks = None
        for samples in buffer.get():
            batch, actions = samples.observations, samples.actions
            assert len(actions) == buffer.n_tokens == 4 * n_steps
            _, log_prob, _ = model.policy.evaluate_actions(batch, actions)
            th.testing.assert_close(log_prob, samples.old_log_prob, atol=1e-5, rtol=0)
            users = (batch.ids >= len(ASSISTANT)) & (batch.ids < len(ASSISTANT + USER))
            seen["users"] += int(users.sum())
            seen["batches"] += 1
            # what follows a trained state is the action, wherever it is shown
            for row, position, action in zip(batch.row, batch.position, actions, strict=True):
                if position + 1 < batch.ids.shape[1] and batch.ids[row, position + 1] >= 0:
                    assert batch.ids[row, position + 1] == action
        buffer._first_minibatch = True

    model.learn(6 * 4 * n_steps, callback=AtRolloutEnd(check))  # the policy checks the ratio too
    assert seen["users"] > 50 and seen["batches"] >= 6


class Disturb:
    """A hook that changes the last states wherever the next token is a user's."""

    calls = 0

    def __call__(self, module, args, kwargs, output):
        ids = args[0] if args else kwargs["input_ids"]
        following = ids.roll(-1, dims=1)
        following[:, -1] = 0
        users = (following >= len(ASSISTANT)) & (following < len(ASSISTANT + USER))
        assert users.any()
        self.calls += 1
        output.last_hidden_state = output.last_hidden_state + 5.0 * users[:, :, None]
        return output


def test_loss_and_kl_do_not_depend_on_what_is_predicted_of_the_user() -> None:
    """The reference, then the policy, is perturbed at users' tokens only: nothing changes."""
    results = []
    for where in (None, "reference", "policy"):
        model = model_of(n_steps=24, batch_size=72, n_epochs=1, policy_kwargs={"dtype": "float32"})
        with th.no_grad():
            for p in model.policy.lm.parameters():  # away from the reference
                p.add_(0.05 * th.randn(p.shape, generator=th.Generator().manual_seed(1)))
        hook = Disturb()
        seen = {}

        def check(model, seen=seen, where=where, hook=hook) -> None:
            seen["rewards"] = model.rollout_buffer.rewards.copy()
            seen["ref_kl"] = [episode["ref_kl"] for episode in model.finished_episodes]
            if where == "policy":
                model.policy.lm.base_model.register_forward_hook(hook, with_kwargs=True)

        if where == "reference":
            model.reference.lm.base_model.register_forward_hook(hook, with_kwargs=True)
        model.learn(72, callback=AtRolloutEnd(check))
        assert hook.calls > 0 or where is None
        seen["weights"] = [p.detach().clone() for p in model.policy.parameters()]
        results.append(seen)
    plain = results[0]
    assert len(plain["ref_kl"]) > 3 and max(map(abs, plain["ref_kl"])) > 1e-3
    for other in results[1:]:
        np.testing.assert_array_equal(plain["rewards"], other["rewards"])
        assert plain["ref_kl"] == other["ref_kl"]
        for a, b in zip(plain["weights"], other["weights"], strict=True):
            assert a.equal(b)


def test_the_last_turns_score_reaches_the_first_turns_tokens() -> None:
    """With γ = λ = 1 and no KL every token's return is its episode's score, across turns."""
    model = model_of(
        make_env(3, autoreset=False), n_steps=12, gae_lambda=1.0, kl_coef=0, whole_episodes=True,
        normalize_advantage=False, target_ref_kl=None,
    )  # fmt: skip
    seen = []

    def check(model) -> None:
        buffer = model.rollout_buffer
        for episode in model.finished_episodes:
            returns = buffer.returns[: episode["step"] + 1, episode["row"]]
            np.testing.assert_allclose(returns, episode["score"], atol=1e-5)
            assert len(returns) == episode["n_tokens"]
            seen.append((episode["n_turns"], episode["score"]))

    model.learn(200, callback=AtRolloutEnd(check))
    assert len(seen) >= 9 and any(turns > 1 and score > 0 for turns, score in seen)


def test_the_kl_of_written_episodes_is_of_own_tokens() -> None:
    env, lm = make_env(4, autoreset=False), tiny_gpt2(VOCABULARY)
    policy = CausalLMPolicy(env.observation_space, env.action_space, lambda _: 0.0, lm=lm)
    policy.allowed_tokens.copy_(th.from_numpy(np.array(env.allowed_tokens)))
    reference = Reference(tiny_gpt2(VOCABULARY, seed=5), policy)
    env.seed(0)
    episodes = write_episodes(policy, env, reference)
    tokenizer = chat_tokenizer()
    assert max(e["n_turns"] for e in episodes) > 1
    for episode in episodes:
        n_prompt = len(episode["messages"]) - 2 * episode["n_turns"] + 1
        expected, n = 0.0, 0
        for i in range(n_prompt, len(episode["messages"]), 2):
            text = tokenizer.apply_chat_template(
                episode["messages"][:i], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = tokenizer(episode["messages"][i]["content"])["input_ids"]
            answer += [tokenizer.eos_token_id] * (len(answer) < 4)
            for token in answer:
                n += 1
                with th.no_grad():
                    p, q = (
                        model.lm(input_ids=th.tensor([ids])).logits[0, -1][policy.allowed_tokens]
                        for model in (policy, reference)
                    )
                p, q = p.log_softmax(0), q.log_softmax(0)
                expected += float((p.exp() * (p - q)).sum())
                ids = [*ids, token]
        assert n == episode["n_tokens"]
        assert episode["ref_kl"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stop", [2, 5, 11])
def test_a_run_stopped_in_mid_conversation_goes_on_as_if_it_never_had(tmp_path, stop) -> None:
    model, callback = model_of(), Watch(tmp_path, [stop])
    rows = run(model, 80, callback)
    never = result(model, tmp_path / "end", rows, callback)
    assert len(never["rows"]) == 4
    again = TokenPPO.load(tmp_path / str(stop), make_env(), "cpu", learning_rate=decay)
    callback = Watch(tmp_path / "again", [])
    rows = run(again, 80, callback, go_on=True)
    assert differences(never, result(again, tmp_path / "b", rows, callback)) == []


def test_the_buffer_knows_what_was_seen_at_each_step_users_turns_and_all() -> None:
    model, seen = model_of(), Seen()
    model.learn(80, callback=seen)
    assert len(seen.pairs) >= 24 and all((obs == made).all() for obs, made in seen.pairs)


def test_the_buffer_keeps_what_was_inserted_in_its_state_and_checks_continuity() -> None:
    model, seen = model_of(n_steps=24), {}

    def check(model) -> None:
        buffer = model.rollout_buffer
        seen["segments"] = [(buffer._ids(s).tolist(), len(s.inserted)) for s in buffer.segments]
        seen["state"] = buffer.get_state()

    model.learn(72, callback=AtRolloutEnd(check))
    new = TokenRolloutBuffer(24, model.observation_space, model.action_space, "cpu", n_envs=3)
    new.set_state(seen["state"])
    assert [(new._ids(s).tolist(), len(s.inserted)) for s in new.segments] == seen["segments"]
    assert max(n_inserted for _, n_inserted in seen["segments"]) > 1

    obs = np.full((3, model.observation_space.shape[0]), -1)
    obs[:, :2] = 7
    zeros, value = np.zeros(3), th.zeros(3, 1)
    new = TokenRolloutBuffer(24, model.observation_space, model.action_space, "cpu", n_envs=3)
    new.add(obs, np.full(3, 1), zeros, np.ones(3), value, value[:, 0])
    obs[:, 2:5] = [1, 8, 9]
    new.add(obs, np.full(3, 1), zeros, zeros, value, value[:, 0])  # two tokens are inserted
    obs[1, 5:7] = [2, 1]  # the token chosen is there, but not where it was appended
    with pytest.raises(ValueError, match="expected row 0's observation to be its last one"):
        new.add(obs, np.full(3, 1), zeros, zeros, value, value[:, 0])


def test_stock_ppo_and_rloo_run_in_conversations() -> None:
    kwargs = {"lm": tiny_gpt2(VOCABULARY)}
    PPO(CausalLMPolicy, make_env(2), policy_kwargs=kwargs, n_steps=12, batch_size=24).learn(24)
    groups = make_env(4, group_size=2, autoreset=False)
    TokenRLOO("CausalLMPolicy", groups, policy_kwargs=kwargs, n_steps=12, batch_size=32).learn(30)
    with pytest.raises(ValueError, match="expected n_steps of at least 12"):
        TokenRLOO("CausalLMPolicy", groups, policy_kwargs=kwargs, n_steps=4).learn(30)
