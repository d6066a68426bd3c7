"""The three faces: the same trajectories, and each library's conventions at an episode's end."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor
from text_env_fixtures import RecordedReward, arguments, character_tokenizer

import text_env
from text_env import TextEnvironment, TextVecEnv, TextVectorEnv

A, B, EOS = 4, 5, 2  # ids of the character tokenizer
TOKENIZER = character_tokenizer()
PROMPTS = [{"prompt": text, "k": i} for i, text in enumerate(["ab", "cd", "efg", "h", "a h"])]


def task(**changes):
    return arguments(
        **{"tokenizer": TOKENIZER, "prompts": PROMPTS, "stop": ("ba", "\n"), **changes}
    )


def sync(num_envs, mode=AutoresetMode.NEXT_STEP, **changes):
    """The slow reference: separate environments in Gymnasium's own batch."""
    return SyncVectorEnv(
        [lambda: TextEnvironment(**task(**changes))] * num_envs, autoreset_mode=mode
    )


def assert_same(one, two):
    """Equal to the last bit and type, through tuples, dicts, and arrays of objects."""
    assert data_equivalence(one, two, exact=True), f"{one}\n{two}"


def random_actions(seed, steps, rows):
    """Mostly a and b, so that stop texts, ends and full budgets all occur."""
    weights = np.array([1, 1, 8, 1, 12, 12, *[2] * 8], dtype=float)
    generator = np.random.default_rng(seed)
    return generator.choice(14, size=(steps, rows), p=weights / weights.sum())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    max_new_tokens=st.integers(1, 6),
    min_new_tokens=st.integers(0, 1),
    obs_dtype=st.sampled_from(["int64", "float32"]),
)
def test_three_faces_one_trajectory(seed, rows, **changes):
    changes = {**changes, "missing_eos_penalty": 0.25}
    envs = [TextEnvironment(**task(**changes)) for _ in range(rows)]
    vector = TextVectorEnv(rows, autoreset_mode="SameStep", **task(**changes))
    venv = TextVecEnv(rows, **task(**changes))
    venv.seed(seed)
    expected = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    np.testing.assert_array_equal(vector.reset(seed=seed)[0], expected)
    np.testing.assert_array_equal(venv.reset(), expected)
    for actions in random_actions(seed, 30, rows):
        masks = np.stack([env.action_masks() for env in envs])
        np.testing.assert_array_equal(vector.action_masks(), masks)
        np.testing.assert_array_equal(np.stack(venv.env_method("action_masks")), masks)
        answers = [env.step(int(action)) for env, action in zip(envs, actions, strict=True)]
        observations, rewards, terminations, truncations, infos = vector.step(actions)
        sb3_observations, sb3_rewards, dones, sb3_infos = venv.step(actions)
        for row, (observation, reward, terminated, _, info) in enumerate(answers):
            assert rewards[row] == reward and sb3_rewards[row] == np.float32(reward)
            assert terminations[row] == dones[row] == terminated and not truncations[row]
            if terminated:
                last = observation
                observation = envs[row].reset()[0]
                np.testing.assert_array_equal(infos["final_obs"][row], last)
                np.testing.assert_array_equal(sb3_infos[row]["terminal_observation"], last)
                for key, value in info.items():
                    assert infos["final_info"][key][row] == sb3_infos[row][key] == value
                assert sb3_infos[row]["episode"]["r"] == reward
                assert sb3_infos[row]["episode"]["l"] == info["n_tokens"]
                assert sb3_infos[row]["TimeLimit.truncated"] is False
            else:
                assert sb3_infos[row] == {}
            np.testing.assert_array_equal(observations[row], observation)
            np.testing.assert_array_equal(sb3_observations[row], observation)
            assert observations.dtype == sb3_observations.dtype == observation.dtype


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("seed", [3, [5, 5, 1]])
def test_as_gymnasiums_own_batch(mode, seed):
    ours, theirs = TextVectorEnv(3, autoreset_mode=mode, **task()), sync(3, mode)
    assert ours.metadata["autoreset_mode"] is mode
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert_same(ours.reset(seed=seed), theirs.reset(seed=seed))
    for actions in random_actions(0, 80, 3):
        one, two = ours.step(actions), theirs.step(actions)
        assert_same(one, two)
        assert [array.dtype for array in one[:4]] == [array.dtype for array in two[:4]]
    assert_same(ours.reset(), theirs.reset())


def test_disabled_autoreset_with_masks():
    ours, theirs = (
        TextVectorEnv(3, autoreset_mode="Disabled", **task()),
        sync(3, AutoresetMode.DISABLED),
    )
    assert_same(ours.reset(seed=1), theirs.reset(seed=1))
    for actions in random_actions(1, 80, 3):
        one, two = ours.step(actions), theirs.step(actions)
        assert_same(one, two)
        if one[2].any():
            masks = [{"reset_mask": one[2].copy()} for _ in range(2)]
            assert_same(ours.reset(options=masks[0]), theirs.reset(options=masks[1]))
            assert "reset_mask" in masks[0]  # the user's dict is left alone


def test_disabled_autoreset_holds():
    envs = TextVectorEnv(2, autoreset_mode="Disabled", **task())
    envs.reset(seed=0)
    observations, _, terminations, _, _ = envs.step(np.array([EOS, B]))
    assert terminations.tolist() == [True, False] and observations[0].max() > -1
    # the held row ignores its action, whatever it is
    observations, rewards, terminations, _, infos = envs.step(np.array([-7, B]))
    assert (observations[0] == -1).all() and rewards[0] == 0 and not terminations[0] and not infos
    with pytest.raises(ValueError, match="reset_mask: expected 2 bools"):
        envs.reset(options={"reset_mask": [True, False]})
    with pytest.raises(ValueError, match="at least one True"):
        envs.reset(options={"reset_mask": np.zeros(2, bool)})
    before = envs.step(np.array([0, B]))[0][1]
    after, _ = envs.reset(options={"reset_mask": np.array([True, False])}, seed=[7, 8])
    np.testing.assert_array_equal(after[1], before)
    np.testing.assert_array_equal(after[0], TextEnvironment(**task()).reset(seed=7)[0])


def test_make_and_make_vec_agree():
    kwargs = task()
    batched = gym.make_vec("TextEnvironment-v0", num_envs=2, **kwargs)
    assert isinstance(batched, TextVectorEnv) and batched.spec.id == "TextEnvironment-v0"
    separate = gym.make_vec("TextEnvironment-v0", num_envs=2, vectorization_mode="sync", **kwargs)
    single = gym.make("TextEnvironment-v0", **kwargs)
    assert_same(batched.reset(seed=9), separate.reset(seed=9))
    assert_same(batched.reset(seed=9)[0][0], single.reset(seed=9)[0])
    for actions in random_actions(2, 40, 2):
        assert_same(batched.step(actions), separate.step(actions))
    batched.close()
    separate.close()


def test_wrappers_of_gymnasium_take_the_batch():
    envs = gym.make_vec(
        "TextEnvironment-v0", num_envs=2, vectorization_mode="vector_entry_point",
        autoreset_mode="SameStep", **task(),
    )  # fmt: skip
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    envs = gym.wrappers.vector.DictInfoToList(envs)
    envs.reset(seed=0)
    _, _, _, _, infos = envs.step(np.array([EOS, A]))
    assert infos[0]["final_info"]["finish_reason"] == "eos" and infos[0]["episode"]["l"] == 1


@pytest.mark.parametrize("face", [TextVectorEnv, TextVecEnv])
def test_one_reward_call_for_all_rows_that_end(face):
    reward = RecordedReward()
    envs = face(4, **task(reward_fn=reward, shuffle=False))
    envs.reset()
    envs.step(np.array([A, EOS, B, EOS]))
    envs.step(np.array([EOS, A, A, A]))  # rows 1 and 3: reset at this step, or under way
    assert [call["completions"] for call in reward.calls] == [["", ""], ["a", ""]]
    assert reward.calls[0]["prompts"] == ["cd", "h"] and reward.calls[0]["k"] == [1, 3]
    for _ in range(3):
        envs.step(np.full(4, A))
    assert all(len(call["prompts"]) == len(call["k"]) for call in reward.calls)


@pytest.mark.parametrize("face", [TextVectorEnv, TextVecEnv])
def test_errors_of_a_batch(face):
    envs = face(2, **task(reward_fn=lambda **columns: [1.0, float("nan")]))
    with pytest.raises(ResetNeeded):
        envs.step(np.array([A, A]))
    envs.reset()
    with pytest.raises(
        ValueError, match=r"action of row 1: expected a token id in \[0, 14\), got 14"
    ):
        envs.step(np.array([A, 14]))
    for actions in (np.array([A]), np.array([A, 1.0]), A):
        with pytest.raises(ValueError, match="actions: expected 2 integers, got shape"):
            envs.step(actions)
    with pytest.raises(ValueError, match="got nan for the completion '' of the prompt"):
        envs.step(np.array([EOS, EOS]))
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        face(0, **task())


def test_masks_of_a_batch_are_views_where_rows_agree():
    envs = TextVectorEnv(2, **task(min_new_tokens=1))
    envs.reset(seed=0)
    assert not envs.action_masks()[:, EOS].any()
    envs.step(np.array([A, A]))
    masks = envs.action_masks()
    assert masks[:, EOS].all() and not masks.flags.writeable
    assert np.shares_memory(masks, envs.allowed_tokens)
    envs.step(np.array([EOS, A]))
    envs.step(np.array([A, A]))  # row 0 is new
    assert envs.action_masks()[:, EOS].tolist() == [False, True]


def test_observations_are_copies():
    for envs in (TextVectorEnv(2, **task()), TextVecEnv(2, **task())):
        envs.reset()
        first = envs.step(np.array([A, A]))[0]
        kept = first.copy()
        second = envs.step(np.array([A, A]))[0]
        np.testing.assert_array_equal(first, kept)
        assert not np.shares_memory(first, second)


def test_fixed_order_shares_prompts_out():
    venv = TextVecEnv(5, autoreset=False, **task(shuffle=False))
    venv.reset()
    _, _, _, infos = venv.step(np.full(5, EOS))
    assert [info["k"] for info in infos] == [0, 1, 2, 3, 4]


def test_sb3_holds_without_autoreset():
    venv = TextVecEnv(2, autoreset=False, **task())
    venv.seed(0)
    venv.reset()
    observations, _, dones, infos = venv.step(np.array([EOS, B]))
    assert dones.tolist() == [True, False]
    assert (observations[0] == -1).all() and infos[0]["terminal_observation"].max() > -1
    observations, rewards, dones, infos = venv.step(np.array([99, B]))
    assert (observations[0] == -1).all() and not rewards.any() and not dones.any()
    assert infos == [{}, {}]
    venv.step(np.array([0, EOS]))
    assert (venv.step(np.array([0, 0]))[0] == -1).all()  # all are held
    expected = [TextEnvironment(**task()) for _ in range(2)]
    for i, env in enumerate(expected):
        env.reset(seed=i)
    np.testing.assert_array_equal(venv.reset(), [env.reset()[0] for env in expected])


def test_sb3_seeds_and_options_are_used_once():
    venv = TextVecEnv(2, **task())
    assert venv.seed(11) == [11, 12]
    first, second = venv.reset(), venv.reset()
    venv.seed(11)
    np.testing.assert_array_equal(venv.reset(), first)
    np.testing.assert_array_equal(venv.reset(), second)
    venv.set_options([{"prompt": {"prompt": "hh", "k": 0}}, {}])
    assert venv.reset()[0].tolist()[:3] == [11, 11, -1]
    assert venv.reset()[0].tolist()[:2] != [11, 11]


def test_sb3_attributes():
    venv = TextVecEnv(3, **task(), render_mode="ansi")
    assert venv.get_attr("render_mode") == ["ansi"] * 3
    assert venv.get_attr("tokenizer", indices=[0, 2]) == [TOKENIZER] * 2
    assert venv.has_attr("action_masks") and not venv.has_attr("nothing")
    venv.set_attr("note", 3)
    assert venv.get_attr("note", indices=1) == [3]
    with pytest.raises(ValueError, match="set_attr: expected all rows"):
        venv.set_attr("note", 3, indices=[1])
    with pytest.raises(AttributeError, match="expected one of action_masks, render, got 'reset'"):
        venv.env_method("reset")
    assert venv.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    assert is_masking_supported(venv) and get_action_masks(venv).shape == (3, 14)
    venv.close()


def test_sb3_render(capsys):
    venv = TextVecEnv(2, **task(shuffle=False), render_mode="ansi")
    venv.reset()
    assert venv.render() == "\n".join(venv.env_method("render"))
    assert "\x1b[2mcd\x1b[0m" in venv.render("ansi")
    with pytest.warns(UserWarning, match="render: expected the constructor's mode"):
        assert venv.render("human") is None
    shown = TextVecEnv(2, **task(shuffle=False), render_mode="human")
    shown.reset()
    assert capsys.readouterr().out.splitlines() == [
        "\x1b[2mab\x1b[0m\x1b[1m\x1b[0m",
        "\x1b[2mcd\x1b[0m\x1b[1m\x1b[0m",
    ]


def test_vector_render():
    envs = TextVectorEnv(2, **task(shuffle=False), render_mode="ansi")
    envs.reset()
    assert envs.render() == ("\x1b[2mab\x1b[0m\x1b[1m\x1b[0m", "\x1b[2mcd\x1b[0m\x1b[1m\x1b[0m")


def test_vec_monitor():
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        venv = VecMonitor(TextVecEnv(2, **task()))
    venv.reset()
    _, rewards, dones, infos = venv.step(np.array([EOS, A]))
    assert dones.tolist() == [True, False]
    assert infos[0]["episode"]["r"] == rewards[0] and infos[0]["episode"]["l"] == 1


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO, DQN])
def test_stock_algorithms_run(algorithm):
    sizes = {} if algorithm is DQN else {"n_steps": 16, "batch_size": 16, "n_epochs": 1}
    model = algorithm("MlpPolicy", TextVecEnv(2, **task()), device="cpu", seed=0, **sizes)
    model.learn(64)
    assert len(model.ep_info_buffer) > 5 and model.ep_info_buffer[0]["l"] >= 1


class Constant:
    """A policy that always takes one token."""

    def predict(self, observations, state=None, **kwargs):
        return np.full(len(observations), A), state


@pytest.mark.filterwarnings("error")
def test_evaluate_policy_takes_it_without_a_warning():
    returns, lengths = evaluate_policy(
        Constant(), TextVecEnv(2, **task()), n_eval_episodes=4, return_episode_rewards=True
    )
    assert returns == [55.0] * 4 and lengths == [5] * 4


@pytest.mark.filterwarnings("ignore:.*render_mode='rgb_array'.*:UserWarning")
def test_make_vec_env_of_sb3():
    theirs = make_vec_env("TextEnvironment-v0", n_envs=3, seed=5, env_kwargs=task())
    ours = TextVecEnv(3, **task())
    ours.seed(5)
    assert theirs.env_is_wrapped(Monitor) == ours.env_is_wrapped(Monitor) == [True] * 3
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    for actions in random_actions(4, 60, 3):
        one, two = ours.step(actions), theirs.step(actions)
        for array, other in zip(one[:3], two[:3], strict=True):
            np.testing.assert_array_equal(array, other)
            assert array.dtype == other.dtype
        for info, other in zip(one[3], two[3], strict=True):
            episode, other_episode = info.pop("episode", None), other.pop("episode", None)
            assert (episode is None) == (other_episode is None)
            if episode:
                assert (episode["r"], episode["l"]) == (other_episode["r"], other_episode["l"])
            info.setdefault("TimeLimit.truncated", False)
            assert_same(info, other)
    assert get_action_masks(theirs).shape == get_action_masks(ours).shape


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ["vector", "same step", "sb3", "sb3 held"])
def test_state_of_a_batch(kind, shuffle):
    make = {
        "vector": lambda: TextVectorEnv(3, **task(shuffle=shuffle)),
        "same step": lambda: TextVectorEnv(3, autoreset_mode="SameStep", **task(shuffle=shuffle)),
        "sb3": lambda: TextVecEnv(3, **task(shuffle=shuffle)),
        "sb3 held": lambda: TextVecEnv(3, autoreset=False, **task(shuffle=shuffle)),
    }[kind]
    envs, other = make(), make()
    envs.reset()
    for steps in (1, 2, 3, 7):
        for actions in random_actions(steps, steps, 3):
            envs.step(actions)
        state = json.loads(json.dumps(envs.get_state()))
        other.set_state(state)
        assert other.get_state() == state
        for actions in random_actions(steps + 100, 9, 3):
            one, two = envs.step(actions), other.step(actions)
            for info in (*one[-1], *two[-1]) if isinstance(one[-1], list) else ():
                info.pop("episode", None)  # has the time in it
            assert_same(one, two)
    with pytest.raises(ValueError, match="state: expected 2 rows, got 3"):
        held = {"autoreset": False} if kind == "sb3 held" else {}
        type(envs)(2, **held, **task()).set_state(state)


def test_no_attribute_that_is_missing():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = text_env.nothing
