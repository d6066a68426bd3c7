"""Ranks for tokens and hidden states for ids: one environment and many, cached and not."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2
from gymnasium.utils.env_checker import check_env
from sb3_contrib import MaskablePPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper
from test_agents_token_ppo import LETTERS, arguments

import text_env
from agents import (
    LMFeatures,
    LMReader,
    TokenEmbeddingExtractor,
    TokenPPO,
    TopKActions,
    VecLMFeatures,
    VecTopKActions,
)

V, EOS = 9, 7
LM = tiny_gpt2(V)


def venv(num_envs: int = 3, **changes) -> text_env.TextVecEnv:
    return text_env.TextVecEnv(num_envs, **arguments(**changes))


@th.no_grad()
def full_forward(obs: np.ndarray) -> tuple[th.Tensor, th.Tensor]:
    """The last hidden state (H,) and logits (V,) of one observation, without a cache."""
    ids = th.as_tensor(obs[obs >= 0]).long()[None]
    hidden = LM.transformer(ids).last_hidden_state[0, -1]
    return hidden, LM.lm_head(hidden)


def test_features_are_the_lms_last_hidden_states_through_many_episodes() -> None:
    plain, features = venv(), VecLMFeatures(venv(), LM)
    assert features.observation_space == gym.spaces.Box(-np.inf, np.inf, (32,), np.float32)
    plain.seed(0), features.seed(0)
    obs, seen, ends = plain.reset(), features.reset(), 0
    generator = np.random.default_rng(0)
    for _ in range(40):
        expected = np.stack([full_forward(row)[0].numpy() for row in obs])
        np.testing.assert_allclose(seen, expected, atol=1e-5)
        actions = generator.integers(0, V, 3)
        obs, _, _, infos = plain.step(actions)
        seen, _, _, ours = features.step(actions)
        for one, two in zip(infos, ours, strict=True):
            if "terminal_observation" in one:
                ends += 1
                last = full_forward(one["terminal_observation"])[0].numpy()
                np.testing.assert_allclose(two["terminal_observation"], last, atol=1e-5)
    assert ends > 10


def test_ranks_are_the_likeliest_tokens_that_are_allowed() -> None:
    inner = venv(min_new_tokens=2)
    ranks = VecTopKActions(inner, LM, k=4)
    assert ranks.action_space == gym.spaces.Discrete(4)
    ranks.seed(0)
    obs = ranks.reset()
    generator = np.random.default_rng(0)
    for _ in range(30):
        masks = inner.action_masks()
        expected = []
        for row, mask in zip(obs, masks, strict=True):
            logits = full_forward(row)[1].masked_fill(~th.from_numpy(mask.copy()), -th.inf)
            expected.append(logits.argsort(descending=True)[:4].tolist())
        assert ranks.action_masks().all()
        actions = generator.integers(0, 4, 3)
        before = obs
        obs, _, dones, infos = ranks.step(actions)
        for row in range(3):
            grown = infos[row]["terminal_observation"] if dones[row] else obs[row]
            length = int((before[row] >= 0).sum())
            assert grown[length] == expected[row][actions[row]]


def test_fewer_allowed_than_ranks() -> None:
    """With two letters and EOS allowed, rank 3 stands for the last of these three."""
    inner = venv(allowed_token_ids=[0, 1])
    ranks = VecTopKActions(inner, LM, k=5)
    ranks.reset()
    assert ranks.action_masks().tolist() == [[True] * 3 + [False] * 2] * 3
    for k in (2, 4):
        ranks.seed(3)
        obs = ranks.reset()
        length = (obs >= 0).sum(axis=1)
        after, _, dones, infos = ranks.step(np.full(3, k))
        last = [i["terminal_observation"] if d else o
                for i, d, o in zip(infos, dones, after, strict=True)]  # fmt: skip
        tokens = [row[n] for row, n in zip(last, length, strict=True)]
        assert set(tokens) <= {0, 1, EOS}
        if k == 2:
            expected = tokens
    assert tokens == expected


def single(lm=LM, **changes) -> gym.Env:
    reader = LMReader(lm, V)
    env = gym.make("TextEnvironment-v0", **arguments(**changes))
    return LMFeatures(TopKActions(env, reader, k=4), reader)


def test_one_environment_goes_the_way_of_many() -> None:
    reader = LMReader(LM, V)
    many = VecLMFeatures(VecTopKActions(venv(), reader, k=4), reader)
    many.seed(5)
    seen, envs = many.reset(), [single() for _ in range(3)]
    ours = [env.reset(seed=5 + i)[0] for i, env in enumerate(envs)]
    generator = np.random.default_rng(0)
    for _ in range(30):
        np.testing.assert_allclose(seen, np.stack(ours), atol=1e-5)
        masks = np.stack([env.get_wrapper_attr("action_masks")() for env in envs])
        np.testing.assert_array_equal(np.stack(many.env_method("action_masks")), masks)
        actions = generator.integers(0, 4, 3)
        seen, rewards, dones, _ = many.step(actions)
        for i, env in enumerate(envs):
            ours[i], reward, terminated, _, _ = env.step(int(actions[i]))
            assert (reward, terminated) == (rewards[i], dones[i])
            if terminated:
                ours[i] = env.reset()[0]


def test_gymnasiums_checker_and_copies() -> None:
    env = single()
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    env.step(1)
    again = copy.deepcopy(env)
    (features, *rest), (same, *others) = env.step(2), again.step(2)
    np.testing.assert_allclose(features, same, atol=1e-5)  # a copy has no cache yet
    assert rest == others
    assert env.spec is not None and env.spec.additional_wrappers[0].name == "TopKActions"


def test_a_shared_reader_runs_the_lm_once_a_step(monkeypatch) -> None:
    reader = LMReader(LM, V)
    env = VecLMFeatures(VecTopKActions(venv(2, min_new_tokens=6), reader, k=4), reader)
    env.reset()
    calls, decode = [], reader.decoder._decode
    monkeypatch.setattr(reader.decoder, "_decode", lambda *a: (calls.append(1), decode(*a))[1])
    for _ in range(4):
        env.env_method("action_masks")
        env.step(np.array([0, 1]))
    assert len(calls) == 4


def test_held_rows() -> None:
    reader = LMReader(LM, V)
    inner = venv(2, autoreset=False, max_new_tokens=2)
    env = VecLMFeatures(VecTopKActions(inner, reader, k=4), reader)
    env.reset()
    for _ in range(3):
        features, _, dones, _ = env.step(np.array([0, 1]))
    assert not features.any() and not dones.any()


@pytest.mark.parametrize("algorithm", [DQN, PPO, MaskablePPO])
def test_classic_algorithms_learn_on_ranks_and_features(algorithm) -> None:
    """ "a" is worth a point of 6; random ranks score about 0.9."""
    reader = LMReader(LM, V)
    env = VecLMFeatures(VecTopKActions(venv(8, min_new_tokens=6), reader, k=8), reader)
    settings = {"learning_rate": 3e-3, "gamma": 1.0, "seed": 0, "device": "cpu"}
    if algorithm is DQN:
        settings |= {"learning_starts": 100, "train_freq": 1, "exploration_fraction": 0.3}
        settings |= {
            "gradient_steps": 2,
            "target_update_interval": 100,
            "policy_kwargs": {"net_arch": [64]},
        }
    else:
        settings |= {"n_steps": 32, "batch_size": 64}
    model = algorithm("MlpPolicy", env, **settings)
    model.learn(6000)
    assert np.mean([e["r"] for e in list(model.ep_info_buffer)[-50:]]) > 3


def parity_env(num_envs: int = 16) -> text_env.TextVecEnv:
    """Whether a prompt has an odd number of odd letters: one token says a or b."""
    prompts = [f"{a}{b}{c}>" for a in LETTERS for b in LETTERS for c in LETTERS]

    def right(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        odd = [sum(p.count(x) for x in "bdf") % 2 for p in prompts]
        return [float(c == "ab"[o]) for c, o in zip(completions, odd, strict=True)]

    return text_env.TextVecEnv(
        num_envs, **arguments(prompts=prompts, reward_fn=right, max_new_tokens=1)
    )


def test_ids_mean_nothing_to_an_mlp_without_an_embedding() -> None:
    """Always "a" is right half the time; ids 0 to 5 are even and odd by turns."""
    scores = {}
    for extractor in (None, TokenEmbeddingExtractor):
        kwargs = {} if extractor is None else {"features_extractor_class": extractor}
        model = PPO(
            "MlpPolicy", parity_env(), learning_rate=3e-3, n_steps=32, batch_size=128, gamma=1.0,
            policy_kwargs=kwargs, seed=0, device="cpu",
        )  # fmt: skip
        model.learn(16_000)
        scores[extractor] = np.mean([e["r"] for e in model.ep_info_buffer])
    print(scores)
    assert scores[TokenEmbeddingExtractor] > 0.95 and scores[None] < 0.75


@pytest.mark.parametrize("wrapper", [TopKActions, LMFeatures, VecTopKActions, VecLMFeatures])
def test_what_is_refused(wrapper) -> None:
    vectorized = issubclass(wrapper, VecEnvWrapper)
    env = venv() if vectorized else gym.make("TextEnvironment-v0", **arguments())
    with pytest.raises(ValueError, match="expected a reader of 9 tokens, got one of 5"):
        wrapper(env, LMReader(tiny_gpt2(5), 5))
    long = arguments(max_new_tokens=200)
    far = text_env.TextVecEnv(1, **long) if vectorized else gym.make("TextEnvironment-v0", **long)
    with pytest.raises(ValueError, match="at most 128 tokens"):
        wrapper(far, LM)
    cart = gym.make("CartPole-v1")
    with pytest.raises(ValueError, match="one-dimensional Box of token ids"):
        wrapper(DummyVecEnv([lambda: cart]) if vectorized else cart, LM)
    if "TopK" in wrapper.__name__:
        for k in (0, 10):
            with pytest.raises(ValueError, match=f"expected k in 1 to 9 tokens, got {k}"):
                wrapper(env, LM, k=k)
        inside = (VecTopKActions if vectorized else TopKActions)(env, LM, k=4)
        with pytest.raises(ValueError, match=r"expected actions in Discrete\(9\)"):
            wrapper(inside, LM, k=2)


@pytest.mark.parametrize("wrapper", [VecTopKActions, VecLMFeatures])
def test_other_environments_than_sb3s_are_refused(wrapper) -> None:
    batch = gym.make_vec("TextEnvironment-v0", num_envs=2, **arguments())
    for env in (batch, gym.make("TextEnvironment-v0", **arguments())):
        with pytest.raises(TypeError, match="expected an SB3 VecEnv, such as TextVecEnv, got"):
            wrapper(env, LM)
    with pytest.raises(ValueError, match="such as TextVecEnv, got a TextVectorEnv"):
        TokenPPO("CausalLMPolicy", batch, policy_kwargs={"lm": LM})


def test_letters_are_what_this_file_takes_them_for() -> None:
    assert letter_tokenizer(LETTERS).eos_token_id == EOS


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_log_probs_are_the_models_own_at_its_temperature(dtype, atol) -> None:
    reader, env = LMReader(LM, V, "cpu", temperature=0.5, dtype=dtype), venv(min_new_tokens=2)
    env.seed(0)
    obs = env.reset()
    for action in (1, 2, 3):
        masks = env.action_masks()
        found = reader.log_probs(obs, masks)
        for row, mask, ours in zip(obs, masks, found, strict=True):
            logits = full_forward(row)[1].masked_fill(~th.from_numpy(mask.copy()), -th.inf) / 0.5
            np.testing.assert_allclose(ours, logits.log_softmax(dim=0).numpy(), atol=atol)
        obs = env.step(np.full(3, action))[0]


def test_a_reader_refuses_what_it_cannot_compute_in() -> None:
    with pytest.raises(ValueError, match="expected dtype float32 or bfloat16, got 'int8'"):
        LMReader(LM, V, dtype="int8")
    with pytest.raises(ValueError, match="expected temperature > 0, got 0"):
        LMReader(LM, V, temperature=0)
