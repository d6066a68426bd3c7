"""The Gymnasium environment: contract, ends, rewards, masks, errors, rendering, spec."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from text_env_fixtures import (
    RecordedReward,
    arguments,
    character_tokenizer,
    gpt2_tokenizer,
    length_reward,
    llama_tokenizer,
)

import text_env
from text_env import TextEnvironment

A, B, EOS = 4, 5, 2  # ids of the character tokenizer


def run(env, actions):
    """Step through the actions; the last step's answer."""
    env.reset(seed=0)
    for action in actions:
        answer = env.step(action)
    return answer


@pytest.mark.parametrize("make_tokenizer", [character_tokenizer, gpt2_tokenizer, llama_tokenizer])
@pytest.mark.parametrize("obs_dtype", ["int64", "float32"])
def test_checkers_have_nothing_to_say(make_tokenizer, obs_dtype, capsys):
    changes = {"tokenizer": make_tokenizer(), "obs_dtype": obs_dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("TextEnvironment-v0", **arguments(**changes))
        check_env(env.unwrapped)
        sb3_check_env(env.unwrapped)


def test_name_without_version():
    with pytest.warns(UserWarning, match="Using the latest versioned environment"):
        env = gym.make("TextEnvironment", **arguments())
    assert isinstance(env.unwrapped, TextEnvironment)


def test_an_episode_by_hand():
    reward = RecordedReward()
    prompts = [{"prompt": "ab", "reference": "x", "number": 3}]
    env = TextEnvironment(**arguments(prompts=prompts, reward_fn=reward))
    observation, info = env.reset(seed=0)
    assert observation.tolist() == [4, 5, -1, -1, -1, -1, -1] and info == {}
    assert observation.dtype == np.int64 and observation in env.observation_space
    observation, *rest = env.step(A)
    assert observation.tolist() == [4, 5, 4, -1, -1, -1, -1] and rest == [0.0, False, False, {}]
    observation, value, terminated, truncated, info = env.step(EOS)
    assert observation.tolist() == [4, 5, 4, 2, -1, -1, -1]
    assert (type(value), type(terminated), type(truncated)) == (float, bool, bool)
    assert (value, terminated, truncated) == (11.0, True, False)
    assert info == {
        "prompt": "ab",
        "completion": "a",
        "score": 11.0,
        "finish_reason": "eos",
        "n_tokens": 2,
        "reference": "x",
        "number": 3,
    }
    assert reward.calls == [
        {"prompts": ["ab"], "completions": ["a"], "reference": ["x"], "number": [3]}
    ]


@pytest.mark.parametrize(
    ("actions", "reward", "reason", "completion"),
    [
        ([EOS], 0.0, "eos", ""),
        ([B, EOS], 1.0, "eos", "b"),
        ([B, B, B], 3.0 - 0.5, "length", "bbb"),
        ([B, B, EOS], 2.0, "eos", "bb"),
        ([B, A], 1.0, "stop", "b"),
    ],
)
def test_ends_and_penalty(actions, reward, reason, completion):
    env = TextEnvironment(**arguments(max_new_tokens=3, stop="a", missing_eos_penalty=0.5))
    _, value, terminated, truncated, info = run(env, actions)
    assert (value, terminated, truncated) == (reward, True, False)
    assert (info["finish_reason"], info["completion"]) == (reason, completion)
    assert info["n_tokens"] == len(actions)
    assert info["score"] == len(completion)  # the penalty is no part of the score


def test_prompt_that_fills_its_whole_budget():
    env = TextEnvironment(**arguments(prompts=["abcd"], max_prompt_tokens=4, max_new_tokens=2))
    observation, *_ = run(env, [A, B])
    assert observation.tolist() == [4, 5, 6, 7, 4, 5]


def test_end_token_before_min_new_tokens():
    env = TextEnvironment(**arguments(min_new_tokens=2))
    env.reset(seed=0)
    assert not env.action_masks()[EOS] and env.action_masks()[A]
    assert not env.step(A)[2]
    assert not env.action_masks()[EOS]
    assert not env.step(EOS)[2]  # accepted, but no end
    assert env.action_masks()[EOS]
    _, _, terminated, _, info = env.step(EOS)
    assert terminated and info["completion"] == "a" and info["n_tokens"] == 3


def test_no_token_to_begin_with():
    with pytest.raises(ValueError, match="min_new_tokens: expected a token that may come before"):
        TextEnvironment(**arguments(min_new_tokens=1, allowed_token_ids=[]))


def test_masked_tokens_are_accepted():
    env = TextEnvironment(**arguments())
    assert not env.allowed_tokens[0]
    assert run(env, [0, A, EOS])[4]["completion"] == "a"


@pytest.mark.parametrize("action", [-1, 14, 1.0, True, "a", None, [1, 2]])
def test_wrong_actions(action):
    env = TextEnvironment(**arguments())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action.*: expected .* got"):
        env.step(action)
    env.step(A)  # and nothing has happened


@pytest.mark.parametrize("action", [np.int64(A), np.array(A), np.array([A]), np.uint8(A)])
def test_kinds_of_integers(action):
    env = TextEnvironment(**arguments())
    env.reset(options={"prompt": "ab"})
    assert env.step(action)[0].tolist()[:3] == [4, 5, 4]


def test_step_needs_reset():
    env = TextEnvironment(**arguments())
    with pytest.raises(ResetNeeded):
        env.step(A)
    run(env, [EOS])
    with pytest.raises(ResetNeeded):
        env.step(A)


class Tensor:
    """As much of a tensor as a reward function's answer needs."""

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


@pytest.mark.parametrize(
    "answer", [[1], (1.0,), np.ones(1, np.float32), [np.float64(1)], Tensor([1])]
)
def test_answers_of_the_reward_function(answer):
    env = TextEnvironment(**arguments(reward_fn=lambda **columns: answer))
    _, value, *_ = run(env, [EOS])
    assert value == 1.0 and type(value) is float


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([float("nan")], r"expected a finite number, got nan for the completion 'b' of the prompt"),
        ([-np.inf], "expected a finite number, got -inf"),
        (["1"], "expected a finite number, got '1'"),
        ([None], "expected a finite number, got None"),
        ([[1.0]], r"expected a finite number, got \[1.0\]"),
        ([1.0, 2.0], "expected 1 scores, one per completion, got 2"),
        ([], "expected 1 scores, one per completion, got 0"),
        (1.0, "expected a sequence of 1 numbers, got float"),
        (np.float32(1), "expected a sequence of 1 numbers, got float32"),
        ("1", "expected a sequence of 1 numbers, got str"),
        (None, "expected a sequence of 1 numbers, got NoneType"),
    ],
)
def test_wrong_answers_of_the_reward_function(answer, message):
    env = TextEnvironment(**arguments(prompts=["cd"], reward_fn=lambda **columns: answer))
    with pytest.raises(ValueError, match=f"reward_fn: {message}") as error:
        run(env, [B, EOS])
    assert "cd" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"min_new_tokens": 6}, r"min_new_tokens: expected a number in \[0, max_new_tokens=5\]"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens: expected at least 1"),
        ({"obs_dtype": "int32"}, "obs_dtype: expected"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty: expected a number >= 0"),
        ({"reward_fn": 3}, "reward_fn: expected a callable, got int"),
        ({"reward_fn": "nothing:here"}, 'expected a callable or "module:name"'),
        ({"reward_fn": "math"}, 'expected a callable or "module:name"'),
        ({"eos_token_ids": 99}, "eos_token_ids: expected ids in"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        TextEnvironment(**arguments(**changes))


def test_given_prompt():
    prompts = [{"prompt": "ab", "k": 1}, {"prompt": "cd", "k": 2}]
    env = TextEnvironment(**arguments(prompts=prompts))
    other = TextEnvironment(**arguments(prompts=prompts))
    env.reset(seed=3), other.reset(seed=3)
    env.reset(options={"prompt": {"prompt": "h", "k": 9}})
    info = env.step(EOS)[4]
    assert (info["prompt"], info["k"]) == ("h", 9)
    for _ in range(4):  # the order of prompts goes on as if nothing had been given
        assert env.reset()[0].tolist() == other.reset()[0].tolist()
    with pytest.raises(ValueError, match=r"the given prompt: expected the columns \['k'\]"):
        env.reset(options={"prompt": "h"})
    with pytest.raises(ValueError, match=r"the given prompt \('abc'\): expected at most 2 tokens"):
        env.reset(options={"prompt": {"prompt": "abc", "k": 1}})
    with pytest.raises(ValueError, match=r'options: expected only the key "prompt", got \[.promt'):
        env.reset(options={"promt": "h"})


def test_prompts_are_drawn_without_replacement():
    env = TextEnvironment(**arguments())
    first = [env.reset(seed=5 if i == 0 else None)[0].tolist() for i in range(8)]
    assert sorted(first[:4]) == sorted(first[4:]) and len({*map(tuple, first)}) == 4
    assert [env.reset(seed=5 if i == 0 else None)[0].tolist() for i in range(8)] == first


def test_np_random_set_from_outside_is_used():
    env, other = TextEnvironment(**arguments()), TextEnvironment(**arguments())
    env.np_random = np.random.default_rng(7)
    other.np_random = np.random.default_rng(7)
    assert [env.reset()[0].tolist() for _ in range(6)] == [
        other.reset()[0].tolist() for _ in range(6)
    ]


def test_prompts_in_their_own_order():
    env = TextEnvironment(**arguments(shuffle=False, prompts=["a", "b", "c"]))
    drawn = [env.reset()[0][0] for _ in range(4)]
    assert drawn == [4, 5, 6, 4]
    assert env.reset(seed=0)[0][0] == 4


def test_observations_and_infos_are_the_users():
    env = TextEnvironment(**arguments(prompts=[{"prompt": "ab", "tags": ["x"]}]))
    observation, _ = env.reset(seed=0)
    observation[:] = 99
    assert env.step(A)[0].tolist()[:3] == [4, 5, 4]
    info = env.step(EOS)[4]
    info["tags"].append("y")
    assert run(env, [EOS])[4]["tags"] == ["x"]


def test_time_limit_truncates_without_a_score():
    env = TimeLimit(TextEnvironment(**arguments()), 2)
    env.reset(seed=0)
    env.step(A)
    _, value, terminated, truncated, info = env.step(A)
    assert (value, terminated, truncated, info) == (0.0, False, True, {})


def test_render_ansi_and_none():
    env = TextEnvironment(**arguments(render_mode="ansi", prompts=["ab"]))
    assert env.render() == ""
    run(env, [A, B])
    assert env.render() == "\x1b[2mab\x1b[0m\x1b[1mab\x1b[0m"
    with pytest.warns(UserWarning, match="render.. does nothing without a render_mode"):
        assert TextEnvironment(**arguments()).render() is None
    with pytest.raises(TypeError, match="render_mode: expected None or one of"):
        TextEnvironment(**arguments(render_mode="rgb_array"))


def test_render_human(capsys):
    run(TextEnvironment(**arguments(render_mode="human", prompts=["ab"])), [A])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["\x1b[2mab\x1b[0m\x1b[1m\x1b[0m", "\x1b[2mab\x1b[0m\x1b[1ma\x1b[0m"]


def test_no_attribute_that_other_libraries_take_for_something_else():
    env = TextEnvironment(**arguments())
    assert not any(hasattr(env, name) for name in ("compute_reward", "seed", "state"))


def test_spec_to_json(tmp_path):
    character_tokenizer().save_pretrained(tmp_path)
    env = gym.make(
        "TextEnvironment-v0",
        tokenizer=str(tmp_path),
        prompts=["ab", "cd"],
        reward_fn="text_env_fixtures:length_reward",
        max_new_tokens=3,
    )
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    again = gym.make(spec)
    assert again.unwrapped.task.reward_fn is length_reward
    assert again.reset(seed=1)[0].tolist() == env.reset(seed=1)[0].tolist()


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda env: pickle.loads(pickle.dumps(env)),
        lambda env: cloudpickle.loads(cloudpickle.dumps(env)),
    ],
    ids=["deepcopy", "pickle", "cloudpickle"],
)
def test_copies_go_their_own_way(copied):
    env = TextEnvironment(**arguments(tokenizer=gpt2_tokenizer(), stop="\n"))
    env.reset(seed=4)
    env.step(70)
    other = copied(env)
    env.step(71)
    for _ in range(3):
        env.reset()
    assert other.step(72)[0].tolist() != env.step(72)[0].tolist()
    fresh = TextEnvironment(**arguments(tokenizer=gpt2_tokenizer(), stop="\n"))
    fresh.reset(seed=4)
    assert [fresh.reset()[0].tolist() for _ in range(6)] == [
        other.reset()[0].tolist() for _ in range(6)
    ]
    assert other.np_random is other.episodes.generator(0)


def test_state_in_mid_episode():
    prompts = [{"prompt": text, "k": i} for i, text in enumerate(["ab", "cd", "efg", "h"])]
    env = TextEnvironment(**arguments(prompts=prompts, stop="ab"))
    for i in range(6):
        env.reset(seed=2 if i == 0 else None)
    env.step(A)
    state = json.loads(json.dumps(env.get_state()))
    other = TextEnvironment(**arguments(prompts=prompts, stop="ab"))
    other.set_state(state)
    for _ in range(12):
        one, two = env.step(B), other.step(B)
        np.testing.assert_equal(one, two)
        if one[2]:
            np.testing.assert_equal(env.reset(), other.reset())
    assert env.get_state() == other.get_state()
    assert env.np_random.random() == other.np_random.random()


@pytest.mark.parametrize("moment", ["fresh", "given prompt", "ended"])
def test_state_at_odd_moments(moment):
    env = TextEnvironment(**arguments())
    if moment == "given prompt":
        env.reset(options={"prompt": "hh"}, seed=1)
        env.step(A)
    if moment == "ended":
        run(env, [A, EOS])
    other = TextEnvironment(**arguments())
    other.set_state(json.loads(json.dumps(env.get_state())))
    assert other.episodes.ids.tolist() == env.episodes.ids.tolist()
    if moment == "given prompt":
        np.testing.assert_equal(env.step(EOS), other.step(EOS))
    else:
        with pytest.raises(ResetNeeded):
            other.step(A)
    if moment != "fresh":
        assert env.reset()[0].tolist() == other.reset()[0].tolist()


def test_state_of_something_else():
    state = TextEnvironment(**arguments()).get_state()
    with pytest.raises(ValueError, match="state: expected one of the same prompts and tokenizer"):
        TextEnvironment(**arguments(prompts=["a"])).set_state(state)


def test_imports_no_model_library():
    """The environment stands alone: no torch, no Stable-Baselines3, none of the other islands."""
    code = (
        "import sys, text_env; unwanted = {'torch', 'stable_baselines3', 'transformers', 'agents', "
        "'reward_models'}; print(sorted(unwanted & set(sys.modules)))"
    )
    root = Path(text_env.__file__).parents[1]
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert answer.stdout.strip() == "[]"
