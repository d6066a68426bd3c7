"""Episodes of several turns: the user's part from data or a callable, alike in the three faces."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as check_sb3
from text_env_fixtures import character_tokenizer

from text_env import PromptSet, TextEnvironment, TextVecEnv, TextVectorEnv, load_prompts
from text_env.prompts import load_examples
from text_env.turns import UserError

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
"""A turn is a letter for who speaks, "u" or "a", the text, and <eos>."""


def chat_tokenizer():
    tokenizer = character_tokenizer("abcdefghsu")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


CHATS = [
    {"prompt": [user("ab")], "turns": ["cd", "e"]},
    {"prompt": [user("c")], "turns": ["ffff"]},
    {"prompt": [{"role": "system", "content": "h"}, user("d")], "turns": []},
]


def count_a(prompts, completions, **columns) -> list[float]:
    return [float(sum(m["content"].count("a") for m in c[::2])) for c in completions]


def arguments(**changes) -> dict:
    defaults = {
        "tokenizer": chat_tokenizer(),
        "prompts": CHATS,
        "reward_fn": count_a,
        "max_new_tokens": 3,
        "shuffle": False,
    }
    return {**defaults, **changes}


def texts(obs) -> str:
    tokenizer = chat_tokenizer()
    return tokenizer.decode(np.asarray(obs)[np.asarray(obs) >= 0], skip_special_tokens=False)


def ids_of(text: str) -> list[int]:
    return chat_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_the_users_turn_follows_an_end_token_a_stop_text_and_the_budget_at_once() -> None:
    env = TextEnvironment(**arguments(stop="gg"))
    obs, _ = env.reset(seed=0)
    assert texts(obs) == "uab<eos>a"
    for token in ids_of("b<eos>"):  # turn 1: its own end token is not repeated
        obs, reward, *ended, info = env.step(token)
        assert (reward, ended, info) == (0, [False, False], {})
    assert texts(obs) == "uab<eos>ab<eos>ucd<eos>a"
    for token in ids_of("gg"):  # turn 2: the template's end is put behind a stop text
        obs, reward, *ended, info = env.step(token)
    assert texts(obs) == "uab<eos>ab<eos>ucd<eos>agg<eos>ue<eos>a" and ended == [False, False]
    for token in ids_of("aac"):
        obs, reward, terminated, truncated, info = env.step(token)
    assert (terminated, truncated, reward) == (True, False, 2)
    assert texts(obs) == "uab<eos>ab<eos>ucd<eos>agg<eos>ue<eos>aaac"
    assert info["messages"] == [
        user("ab"), answer("b"), user("cd"), answer(""), user("e"), answer("aac"),
    ]  # fmt: skip
    assert info["prompt"] == "uab<eos>a" and info["completion"] == "b\n\naac"
    assert (info["n_turns"], info["n_tokens"], info["finish_reason"]) == (3, 7, "length")
    assert info["turns"] == ["cd", "e"]
    json.dumps(info)


def test_a_turn_that_runs_out_is_closed_by_the_template_and_costs_the_penalty() -> None:
    env = TextEnvironment(**arguments(missing_eos_penalty=0.5))
    env.reset(seed=0)
    rewards = []
    for token in ids_of("aaa" + "b<eos>" + "ccc"):
        obs, reward, terminated, _, info = env.step(token)
        rewards.append(reward)
    assert texts(obs) == "uab<eos>aaaa<eos>ucd<eos>ab<eos>ue<eos>accc"
    assert terminated and rewards == [0, 0, -0.5, 0, 0, 0, 0, 3 - 0.5]
    assert info["score"] == 3


def test_masks_and_the_shortest_turn_count_each_turns_tokens() -> None:
    env = TextEnvironment(**arguments(min_new_tokens=1))
    env.reset(seed=0)
    eos = env.tokenizer.eos_token_id
    for token in ids_of("b<eos>c<eos>"):
        assert env.action_masks()[eos] == (token == eos)
        env.step(token)
    assert not env.action_masks()[eos]


def test_the_observation_has_room_for_the_longest_prompt_and_all_turns() -> None:
    task = TextEnvironment(**arguments()).task
    longest = len("h<ufffffa") - 2  # <eos>uffff<eos>a: 1 + 5 + 1 + 1
    assert (task.max_prompt_tokens, task.user.max_tokens, task.user.max_turns) == (7, 8, 3)
    assert longest == 7 and task.observation_space.shape == (7 + 3 * 3 + 2 * 8,)
    shorter = TextEnvironment(**arguments(max_turns=2))
    assert shorter.observation_space.shape == (7 + 2 * 3 + 8,)
    shorter.reset(seed=0)
    *_, info = [shorter.step(token) for token in ids_of("<eos><eos>")][-1]
    assert info["messages"] == [user("ab"), answer(""), user("cd"), answer("")]
    with pytest.raises(ValueError, match=r"'ffff'.* at most 7 tokens .* got 8; raise max_user"):
        TextEnvironment(**arguments(max_user_tokens=7))


def test_what_the_reward_function_is_given() -> None:
    """TRL's conversational form: prompts and completions are lists of messages."""
    calls = []

    def reward(**given):
        calls.append(given)
        return [1.0] * len(given["prompts"])

    env = TextVectorEnv(3, **arguments(reward_fn=reward))
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.full(3, env.tokenizer.eos_token_id))
    assert [len(call["prompts"]) for call in calls] == [1, 1, 2]  # row 2 begins anew in between
    assert calls[1] == {
        "prompts": [[user("c")]],
        "completions": [[answer(""), user("ffff"), answer("")]],
        "turns": [["ffff"]],
    }
    assert calls[0]["completions"] == [[answer("")]]


def echo(conversations, **columns):
    """Say the last answer's letters again, twice; fall silent at a "d" or the second turn."""
    found = []
    for messages in conversations:
        last = messages[-1]["content"]
        asked = sum(m["role"] == "user" for m in messages)
        found.append(None if "d" in last or asked == 3 else 2 * last)
    return found


ASKED = {"prompts": [[user("ab")], [user("c")], [user("e")]], "user_fn": echo, "max_turns": 4}
ASKED = {**ASKED, "max_user_tokens": 12}


def test_a_callable_speaks_for_the_user() -> None:
    env = TextEnvironment(**arguments(**ASKED))
    obs, _ = env.reset(seed=0)
    assert obs.shape == (5 + 4 * 3 + 3 * 12,)
    for token in ids_of("b<eos>ccc"):
        obs, *_ = env.step(token)
    assert texts(obs) == "uab<eos>ab<eos>ubb<eos>accc<eos>ucccccc<eos>a"
    *_, info = env.step(env.tokenizer.eos_token_id)
    assert info["n_turns"] == 3 and info["completion"] == "b\nccc\n"
    env.reset(seed=0)
    env.step(ids_of("d")[0])
    *_, ended, _, info = env.step(env.tokenizer.eos_token_id)
    assert ended and info["messages"] == [user("ab"), answer("d")]


def test_all_conversations_whose_turn_ends_are_asked_about_in_one_call() -> None:
    calls = []

    def asked(conversations, persona):
        calls.append((conversations, persona))
        return ["h"] * len(conversations)

    prompts = [{"prompt": [user(c)], "persona": i} for i, c in enumerate("abc")]
    env = TextVecEnv(3, **arguments(**{**ASKED, "user_fn": asked, "prompts": prompts}))
    env.seed(0)
    env.reset()
    end = env.tokenizer.eos_token_id
    env.step(np.array([end, ids_of("b")[0], end]))
    assert calls == [([[user("a"), answer("")], [user("c"), answer("")]], [0, 2])]
    for _ in range(2):
        env.step(np.full(3, end))
    assert [len(conversations) for conversations, _ in calls] == [2, 3, 3]
    env.step(np.full(3, end))  # the fourth turn of rows 0 and 2 is the last: they are not asked
    assert [len(conversations) for conversations, _ in calls] == [2, 3, 3, 1]


@pytest.mark.parametrize("source", [{}, ASKED], ids=["data", "callable"])
def test_the_same_trajectories_in_three_faces(source) -> None:
    n, steps = 3, 60
    allowed = TextEnvironment(**arguments(**source)).allowed_tokens
    rng = np.random.default_rng(0)
    actions = rng.choice(np.flatnonzero(allowed), (steps, n))
    how = arguments(**{**source, "shuffle": True, "missing_eos_penalty": 0.1})
    seen: dict[str, list] = {name: [] for name in ("rows", "vector", "sb3")}
    infos: dict[str, list] = {name: [] for name in seen}

    rows = [TextEnvironment(**how) for _ in range(n)]
    obs = np.stack([env.reset(seed=7 + i)[0] for i, env in enumerate(rows)])
    for taken in actions:
        before = obs.copy()
        results = [env.step(int(a)) for env, a in zip(rows, taken, strict=True)]
        for i, (o, _, ended, _, info) in enumerate(results):
            obs[i] = rows[i].reset()[0] if ended else o
            if ended:
                infos["rows"].append(info)
        seen["rows"].append((before, [r[1] for r in results], [r[2] for r in results]))

    vector = TextVectorEnv(n, autoreset_mode=AutoresetMode.SAME_STEP, **how)
    obs, _ = vector.reset(seed=7)
    for taken in actions:
        following, rewards, ended, _, info = vector.step(taken)
        seen["vector"].append((obs, rewards.tolist(), ended.tolist()))
        infos["vector"] += [
            {name: values[i] for name, values in info["final_info"].items() if name[0] != "_"}
            for i in np.flatnonzero(ended)
        ]
        obs = following

    sb3 = TextVecEnv(n, **how)
    sb3.seed(7)
    obs = sb3.reset()
    for taken in actions:
        following, rewards, ended, info = sb3.step(taken)
        seen["sb3"].append((obs, rewards.astype(float).tolist(), ended.tolist()))
        infos["sb3"] += [info[i] for i in np.flatnonzero(ended)]
        obs = following

    for face in ("vector", "sb3"):
        for a, b in zip(seen["rows"], seen[face], strict=True):
            np.testing.assert_array_equal(a[0], b[0])
            np.testing.assert_allclose(a[1], b[1], atol=1e-6)
            assert a[2] == b[2]
        assert len(infos[face]) == len(infos["rows"]) > 5
        for a, b in zip(infos["rows"], infos[face], strict=True):
            assert a == {name: b[name] for name in a}
    assert max(info["n_turns"] for info in infos["rows"]) > 1


@pytest.mark.parametrize("source", [{}, ASKED], ids=["data", "callable"])
def test_the_state_in_mid_conversation(source) -> None:
    """Stop after each of the first steps, go on elsewhere from JSON: nothing is different."""
    how = arguments(**{**source, "shuffle": True})
    rng = np.random.default_rng(1)
    allowed = np.flatnonzero(TextEnvironment(**how).allowed_tokens)
    actions = rng.choice(allowed, (12, 3))
    env = TextVecEnv(3, **how)
    env.seed(3)
    env.reset()
    states, steps = [], []
    for taken in actions:
        states.append(json.loads(json.dumps(env.get_state())))
        steps.append(env.step(taken))
    assert any(row["said"] for state in states for row in state["rows"])
    for i, state in enumerate(states):
        other = TextVecEnv(3, **how)
        other.set_state(state)
        for taken, expected in zip(actions[i:], steps[i:], strict=True):
            found = other.step(taken)
            for a, b in zip(found[:3], expected[:3], strict=True):
                np.testing.assert_array_equal(a, b)
            for a, b in zip(found[3], expected[3], strict=True):
                assert a.get("messages") == b.get("messages")
    with pytest.raises(ValueError, match="same prompts"):
        chats = [{**CHATS[0], "turns": ["g"]}, *CHATS[1:]] if not source else [[user("b")]]
        TextVecEnv(3, **{**how, "prompts": chats}).set_state(env.get_state())


def test_the_state_of_a_given_conversation() -> None:
    how, end = arguments(), chat_tokenizer().eos_token_id
    env = TextEnvironment(**how)
    env.reset(options={"prompt": {"prompt": [user("g")], "turns": ["h", "h"]}})
    for token in (*ids_of("b"), end, *ids_of("ac")):
        env.step(token)
    other = TextEnvironment(**how)
    other.set_state(json.loads(json.dumps(env.get_state())))
    for token in (end, *ids_of("a"), end):
        a, b = env.step(token), other.step(token)
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:] == b[1:]
    assert a[4]["messages"][1::2] == [answer("b"), answer("ac"), answer("a")]
    assert a[1] == 2 and a[2]


@pytest.mark.filterwarnings("ignore:.*(not within the observation space|render).*")
def test_both_checkers() -> None:
    env = gym.make("TextEnvironment-v0", **arguments())
    check_gymnasium(env.unwrapped, skip_render_check=True)
    check_sb3(TextEnvironment(**arguments(**ASKED)), warn=True)


def test_render_shows_who_said_what() -> None:
    env = TextEnvironment(render_mode="ansi", **arguments())
    env.reset(seed=0)
    for token in ids_of("b<eos>c"):
        env.step(token)
    plain = env.render().replace("\x1b[2m", "").replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert plain == "uab<eos>ab\ncd\nc"
    env.step(env.tokenizer.eos_token_id)
    for token in ids_of("d<eos>"):
        env.step(token)
    assert env.render().endswith("\x1b[1md\x1b[0m")


def test_whole_conversations_are_prompts_too(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [user("a"), answer("b"), user("c"), answer("d")], "topic": "x"},
        {"messages": [user("a"), answer("b")], "topic": "y"},
        {"messages": [{"role": "system", "content": "s"}, user("a")], "topic": "z"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    records = load_prompts(path)
    assert records[0] == {"prompt": [user("a")], "turns": ["c"], "topic": "x"}
    assert [record["turns"] for record in records] == [["c"], [], []]
    assert len(records[2]["prompt"]) == 2
    assert PromptSet(path, chat_tokenizer())[0].messages == [user("a")]
    with pytest.raises(ValueError, match="line 3: expected an answer in the conversation"):
        load_examples(path)
    path.write_text("\n".join(map(json.dumps, [*rows[:2], {"text": "ab"}])))
    assert load_examples(path) == [rows[0]["messages"], rows[1]["messages"], "ab"]
    for roles, message in (
        (["assistant"], "take turns after the prompt, got the roles"),
        (["user", "assistant", "assistant"], "take turns after"),
        (["user", "assistant", "system"], "take turns after"),
    ):
        chat = [{"role": role, "content": "a"} for role in roles]
        with pytest.raises(ValueError, match=f"prompt 0: .*{message}"):
            load_prompts([{"messages": chat}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["ab"], "max_turns": 2}, 'or prompts with the column "turns"'),
        ({"prompts": [{"prompt": "ab", "turns": ["c"]}]}, "prompt 0: expected chat messages"),
        ({"prompts": [{"prompt": [user("a")], "turns": "c"}]}, "expected a list of texts as turns"),
        ({"prompts": [{"prompt": [user("a")], "turns": [1]}]}, "expected texts in turns, got int"),
        ({"user_fn": echo, "max_turns": 2, "max_user_tokens": 9}, "the column .turns., got both"),
        ({**ASKED, "max_turns": None}, "max_turns: expected a number with user_fn"),
        ({**ASKED, "max_user_tokens": None}, "max_user_tokens: expected a number with user_fn"),
        ({**ASKED, "max_turns": 0}, "max_turns: expected at least 1"),
        ({**ASKED, "user_fn": "nothing:here"}, 'user_fn: expected a callable or "module:name"'),
        ({**ASKED, "prompts": ["ab"]}, "prompt 0: expected chat messages"),
        ({"prompts": [{**CHATS[0], "messages": 1}]}, r"does not use itself, got \['messages'\]"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_together(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        TextEnvironment(**arguments(**changes))


def test_a_template_that_hides_the_answer_is_refused() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="expected one that shows the assistant's text"):
        TextEnvironment(**arguments(tokenizer=tokenizer))


def failing(conversations, **columns):
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("user_fn", "error", "message"),
    [
        (failing, UserError, "user_fn: failing raised KeyError: 'lost' .first of 1 conversations"),
        (lambda c: "bb", ValueError, "expected a sequence of 1 texts or None, got str"),
        (lambda c: ["b", "b"], ValueError, "expected 1 texts or None, .* got 2"),
        (lambda c: [3], ValueError, "expected 1 texts or None, .* got int"),
        (lambda c: ["b" * 30], ValueError, "expected at most 12 tokens .* got 33; raise max_user"),
    ],
)
def test_what_a_user_function_may_do_wrong(user_fn, error, message) -> None:
    env = TextEnvironment(**arguments(**{**ASKED, "user_fn": user_fn}))
    env.reset(seed=0)
    with pytest.raises(error, match=message):
        env.step(env.tokenizer.eos_token_id)
    env.reset()
    env.step(ids_of("b")[0])
