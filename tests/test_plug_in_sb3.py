"""`TextEnvironment-v0` by `gym.make`, unmodified, under SB3, sb3-contrib and all their wrappers."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer
from gymnasium import wrappers
from sb3_contrib import ARS, QRDQN, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from test_agents_token_ppo import arguments, count_a

import text_env
from agents import TokenEmbeddingExtractor

ID = "TextEnvironment-v0"
ON_POLICY = {"n_steps": 64, "batch_size": 64, "n_epochs": 2}
OFF_POLICY = {"learning_starts": 50, "buffer_size": 1000, "target_update_interval": 50}
SETTINGS = {
    PPO: ON_POLICY,
    A2C: {},
    DQN: OFF_POLICY,
    QRDQN: OFF_POLICY,
    TRPO: {"n_steps": 64},
    ARS: {"n_delta": 2, "n_eval_episodes": 2},
    RecurrentPPO: ON_POLICY,
    MaskablePPO: ON_POLICY,
}


def make(**changes) -> gym.Env:
    return gym.make(ID, **arguments(**changes))


@pytest.mark.parametrize("algorithm", SETTINGS, ids=lambda a: a.__name__)
@pytest.mark.filterwarnings("ignore:.*rgb_array.*:UserWarning")
def test_a_few_hundred_steps_of_each_algorithm(algorithm) -> None:
    """With their own policies and no code of ours; all parameters finite, and changed."""
    policy = "MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy"
    venv = make_vec_env(ID, n_envs=2, env_kwargs=arguments(), seed=0)
    model = algorithm(policy, venv, seed=0, device="cpu", **SETTINGS[algorithm])
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(400)
    after = list(model.policy.parameters())
    assert all(th.isfinite(p).all() for p in after)
    assert any(not p.equal(b) for p, b in zip(after, before, strict=True))
    assert model.num_timesteps >= 400
    obs, _ = (env := make()).reset(seed=0)
    ended = False
    while not ended:
        action, _ = model.predict(obs)
        obs, reward, ended, _, _ = env.step(action)
    assert np.isfinite(reward)


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, QRDQN, TRPO, MaskablePPO, RecurrentPPO])
@pytest.mark.filterwarnings("ignore:.*rgb_array.*:UserWarning")
def test_each_learns_to_write_a(algorithm) -> None:
    """With six letters and EOS to choose from, random scores about 0.8 of 6 (0.7 unmasked)."""
    policy = "MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy"
    venv = make_vec_env(ID, n_envs=8, env_kwargs=arguments(), seed=0)
    settings = {"learning_rate": 3e-3, **SETTINGS[algorithm]}
    settings["policy_kwargs"] = {"features_extractor_class": TokenEmbeddingExtractor}
    if algorithm in (DQN, QRDQN):
        settings |= {"buffer_size": 10_000, "gradient_steps": 2, "train_freq": 1}
    if algorithm is QRDQN:
        settings["policy_kwargs"]["n_quantiles"] = 20
    if algorithm is TRPO:
        settings |= {"batch_size": 512}
    if algorithm is RecurrentPPO:
        settings |= {"batch_size": 128}
    model = algorithm(policy, venv, gamma=1.0, seed=0, device="cpu", **settings)
    model.learn(8_000)
    assert np.mean([e["r"] for e in list(model.ep_info_buffer)[-50:]]) > 2


# ------------------------------------------------------------------------------- wrappers


def test_gymnasiums_wrappers() -> None:
    env = wrappers.RecordEpisodeStatistics(make(min_new_tokens=6))
    env = wrappers.TransformReward(env, lambda reward: 10 * reward)
    env = wrappers.FlattenObservation(env)
    env.reset(seed=0)
    for _ in range(5):
        assert env.step(0)[1] == 0
    obs, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated) == (60, True, False)
    assert info["episode"]["r"] == 6 and info["episode"]["l"] == 6
    assert env.observation_space.contains(obs)
    env = wrappers.NormalizeReward(make(), gamma=1.0)
    env.reset(seed=0)
    assert np.isfinite(env.step(0)[1])
    env = wrappers.TimeLimit(make(min_new_tokens=6), max_episode_steps=2)
    env.reset(seed=0)
    env.step(0)
    _, reward, terminated, truncated, info = env.step(0)
    assert (reward, terminated, truncated) == (0, False, True) and "score" not in info


def test_sb3s_vec_wrappers() -> None:
    def venv():
        return DummyVecEnv([make] * 2)

    stacked = VecFrameStack(venv(), n_stack=2)
    width = make().observation_space.shape[0]
    assert stacked.reset().shape == (2, 2 * width)
    for wrapped in (
        stacked,
        VecCheckNan(venv(), raise_exception=True),
        VecMonitor(venv()),
        VecNormalize(venv(), gamma=1.0),
        VecNormalize(text_env.TextVecEnv(2, **arguments()), norm_obs=False, gamma=1.0),
    ):
        model = PPO("MlpPolicy", wrapped, n_steps=16, batch_size=32, n_epochs=1, device="cpu")
        model.learn(64)
        assert all(th.isfinite(p).all() for p in model.policy.parameters())


def trajectory(env: gym.Env, steps: int = 40, seed: int = 1) -> list:
    """Observations, rewards and ends under fixed random actions."""
    generator, seen = np.random.default_rng(seed), []
    seen.append(env.reset(seed=seed)[0].tolist())
    for _ in range(steps):
        obs, reward, terminated, _, _ = env.step(int(generator.integers(9)))
        seen.append((obs.tolist(), reward, terminated))
        if terminated:
            seen.append(env.reset()[0].tolist())
    return seen


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_of_a_made_environment(copied) -> None:
    env = make()
    trajectory(env, 7)
    assert trajectory(copied(env)) == trajectory(env) == trajectory(make())


def test_spec_round_trip(tmp_path) -> None:
    letter_tokenizer().save_pretrained(tmp_path)
    env = make(tokenizer=str(tmp_path), reward_fn="test_agents_token_ppo:count_a")
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert trajectory(gym.make(spec)) == trajectory(env)


def make_for_worker() -> gym.Env:
    import text_env  # noqa: F401  in the worker, nothing has registered it yet

    return gym.make(ID, **arguments(reward_fn=count_a))


def test_subproc_vec_env_with_spawn() -> None:
    apart = SubprocVecEnv([make_for_worker] * 2, start_method="spawn")
    here = DummyVecEnv([make_for_worker] * 2)
    try:
        apart.seed(3), here.seed(3)
        np.testing.assert_array_equal(apart.reset(), here.reset())
        generator = np.random.default_rng(0)
        for _ in range(20):
            actions = generator.integers(0, 9, 2)
            one, two = apart.step(actions), here.step(actions)
            for array, other in zip(one[:3], two[:3], strict=True):
                np.testing.assert_array_equal(array, other)
        masks = apart.env_method("action_masks")
        np.testing.assert_array_equal(masks, here.env_method("action_masks"))
    finally:
        apart.close()
