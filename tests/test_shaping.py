"""Scores of tokens: through the contract, in the environment, in TokenPPO; shaping; schedules."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2
from stable_baselines3.common.callbacks import BaseCallback
from text_env_fixtures import character_tokenizer, gpt2_tokenizer, llama_tokenizer

from agents import TokenPPO, WeightScheduleCallback
from reward_models import LengthReward, PotentialShaping, TimeLimitedReward, WeightedSum
from text_env import TextEnvironment, TextVecEnv, TextVectorEnv

LETTERS = "ab"
EOS = 3  # of letter_tokenizer("ab"): a, b, the prompt's sign, EOS, padding


def of_tokens(prompts, completions, completion_ids, **columns):
    """One for each a, and for the end token a quarter."""
    return [[{0: 1.0, EOS: 0.25}.get(i, 0.0) for i in ids] for ids in completion_ids]


def arguments(reward_fn=of_tokens, **changes):
    task = {"tokenizer": letter_tokenizer(LETTERS), "prompts": [">", ">>"], "max_new_tokens": 4}
    return {**task, "reward_fn": reward_fn, **changes}


def finish(env, tokens) -> tuple[float, dict]:
    env.reset(seed=0)
    for token in tokens:
        _, reward, ended, _, info = env.step(token)
    assert ended
    return reward, info


# ------------------------------------------------------------------------ the environment


def test_scores_of_tokens_are_paid_as_their_sum_and_told_one_by_one() -> None:
    env = TextEnvironment(**arguments(missing_eos_penalty=2.0))
    reward, info = finish(env, [0, 1, 0, EOS])
    assert (reward, info["score"], info["n_tokens"]) == (2.25, 2.25, 4)
    assert info["token_scores"] == [1.0, 0.0, 1.0, 0.25]
    reward, info = finish(env, [1, 0, 0, 1])
    assert (reward, info["score"], info["token_scores"]) == (0.0, 2.0, [0.0, 1.0, 1.0, 0.0])
    _, info = finish(TextEnvironment(**arguments(lambda **_: [0.5])), [EOS])
    assert info["score"] == 0.5 and "token_scores" not in info


def test_the_batched_faces_tell_the_same() -> None:
    vector, vec = TextVectorEnv(2, **arguments()), TextVecEnv(2, **arguments())
    vector.reset(seed=0), vec.reset()
    for tokens in ([0, 0], [EOS, 0], [0, EOS]):
        infos = vector.step(np.array(tokens))[-1]
        told = vec.step(np.array(tokens))[-1]
        for row in range(2):
            if "token_scores" in told[row]:
                assert list(infos["token_scores"][row]) == told[row]["token_scores"]
    assert told[1]["token_scores"] == [1.0, 1.0, 0.25]


def test_only_who_asks_is_told_of_tokens() -> None:
    seen = {}

    def neither(prompts, completions, **columns):
        seen["neither"] = set(columns)
        return [0.0] * len(prompts)

    def both(prompts, completions, completion_ids, completion_pieces, **columns):
        seen["both"] = (completion_ids, completion_pieces, set(columns))
        return [0.0] * len(prompts)

    for reward_fn in (neither, both):
        finish(TextEnvironment(**arguments(reward_fn)), [0, 1, EOS])
    assert seen == {"neither": set(), "both": ([[0, 1, EOS]], [["a", "b", ""]], set())}
    finish(TextEnvironment(**arguments(WeightedSum([(neither, 1), (both, 1)]))), [0, EOS])
    assert seen == {"neither": set(), "both": ([[0, EOS]], [["a", ""]], set())}


@pytest.mark.parametrize("make", [character_tokenizer, gpt2_tokenizer, llama_tokenizer])
def test_pieces_make_the_completion(make) -> None:
    """Of random tokens, of characters in several tokens, and with a stop text that is cut off."""
    seen = []

    def keep(prompts, completions, completion_pieces, completion_ids, **columns):
        seen.append((completions[0], completion_pieces[0], completion_ids[0]))
        return [0.0]

    tokenizer, rng = make(), np.random.default_rng(0)
    env = TextEnvironment(
        tokenizer=tokenizer, prompts=["a film"], reward_fn=keep, max_new_tokens=9, stop="d f"
    )
    given = [tokenizer("电影 film d film", add_special_tokens=False)["input_ids"]]
    given += [rng.choice(np.flatnonzero(env.action_masks()), 9).tolist() for _ in range(20)]
    for tokens in given:
        env.reset()
        for token in (tokens * 9)[:9]:
            if env.step(int(token))[2]:
                break
    for completion, pieces, ids in seen:
        assert "".join(pieces) == completion and len(pieces) == len(ids)
    assert len(seen) == len(given)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, 2.0], "expected a number, or 3, one per token, got 2 for the completion 'ab'"),
        ([1.0, float("nan"), 2.0], "expected a finite number, got nan"),
        ([3e38, 3e38, 0.0], "expected a finite number, got 6e"),
        ([1.0, "2", 0.0], "expected a finite number, got '2'"),
    ],
)
def test_wrong_scores_of_tokens_are_refused(scores, message) -> None:
    env = TextEnvironment(**arguments(lambda prompts, completions, completion_ids: [scores]))
    with pytest.raises(ValueError, match=message):
        finish(env, [0, 1, EOS])


# ------------------------------------------------------------------- sums, and potentials


def test_a_weighted_sum_adds_whole_scores_at_the_last_token() -> None:
    def whole(prompts, completions, **columns):
        return np.array([float(len(text)) for text in completions])

    total = WeightedSum([(of_tokens, 2.0), (whole, 10.0)])
    assert total.asks_for == {"completion_ids"}
    told = {"prompts": [">"] * 2, "completions": ["ab", "b"]}
    scores = total(**told, completion_ids=[[0, 1, EOS], [1]])
    assert scores == [[2.0, 0.0, 20.5], 10.0]
    total.set_weight(1, 0.0)
    assert total(**told, completion_ids=[[0, 1, EOS], [1]]) == [[2.0, 0.0, 0.5], 0.0]
    some = WeightedSum([(lambda completion_ids, **_: [[1.0, 2.0, 3.0], 4.0], 1), (whole, 1)])
    assert some(**told, completion_ids=[[0, 1, EOS], [0, EOS]]) == [[1.0, 2.0, 5.0], 5.0]
    two = WeightedSum([(of_tokens, 1), (lambda completion_ids, **_: [[1.0, 1.0]], 1)])
    with pytest.raises(ValueError, match="expected scores of 3 tokens, got 2"):
        two(prompts=[">"], completions=["ab"], completion_ids=[[0, 1, EOS]])
    assert TimeLimitedReward(total, 1.0).asks_for == {"completion_ids"}
    plain = WeightedSum([(whole, 1)])
    assert plain.asks_for == set() and plain(**told).tolist() == [2.0, 1.0]


def soft_optimum(reward_fn, gamma: float, beta: float) -> dict[tuple[int, ...], np.ndarray]:
    """The best policy under a KL penalty to the uniform one, by recursion over all completions.

    V(s) = β log mean_a exp((r(s, a) + γ V(s′)) / β), and π(a|s) goes with the exponential. The
    rewards are those of the environment's information.
    """
    env = TextEnvironment(**arguments(reward_fn, prompts=[">"], max_new_tokens=3))
    actions = (0, 1, EOS)
    rewards: dict[tuple[int, ...], float] = {}
    for length in (1, 2, 3):
        for tokens in product(actions, repeat=length):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == 3):
                _, info = finish(env, tokens)
                scores = info.get("token_scores", [0.0] * (length - 1) + [info["score"]])
                for end, score in enumerate(scores, start=1):
                    # what a token earns depends on what it follows, not on what comes after
                    assert rewards.setdefault(tokens[:end], score) == pytest.approx(score)

    def value(state: tuple[int, ...]) -> float:
        if len(state) == 3 or EOS in state:
            return 0.0
        gains = [rewards[(*state, a)] + gamma * value((*state, a)) for a in actions]
        weights = np.exp(np.array(gains) / beta)
        policy[state] = weights / weights.sum()
        return beta * float(np.log(weights.mean()))

    policy: dict[tuple[int, ...], np.ndarray] = {}
    value(())
    return policy


def wanted(prompts, completions, **columns):
    return [float(text == "ab") - 0.3 * len(text) for text in completions]


def potential(prompts, completions, **columns):
    return [1.7 * ("a" in t) + 0.4 * len(t) ** 2 - (t == "bb") + len(p) for p, t in
            zip(prompts, completions, strict=True)]  # fmt: skip


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_a_potential_leaves_the_optimum_as_it_is(gamma, beta) -> None:
    """By enumeration of all 15 completions; β = 0.01 is as good as no penalty."""
    plain = soft_optimum(wanted, gamma, beta)
    shaped = soft_optimum(PotentialShaping(wanted, potential, 0.7, gamma), gamma, beta)
    assert plain.keys() == shaped.keys() and len(plain) == 7
    for state in plain:
        assert shaped[state] == pytest.approx(plain[state], abs=1e-9)
    bonus = soft_optimum(WeightedSum([(wanted, 1), (potential, 0.7)]), gamma, beta)
    assert any(abs(bonus[state] - plain[state]).max() > 0.1 for state in plain)


def test_a_potential_leaves_the_score_as_it_is_and_pays_on_the_way() -> None:
    env = TextEnvironment(**arguments(PotentialShaping(wanted, potential, 0.5)))
    _, info = finish(env, [0, 1, EOS])
    assert info["score"] == pytest.approx(wanted([">"], ["ab"])[0])
    before = np.array(potential([">"] * 3, ["", "a", "ab"])) * 0.5
    steps = np.diff(np.append(before - before[0], 0.0))
    steps[-1] += info["score"]
    assert info["token_scores"] == pytest.approx(steps)


# -------------------------------------------------------------------------------- TokenPPO


def learner(env, **changes) -> TokenPPO:
    settings = {"n_steps": 4, "batch_size": 64, "n_epochs": 1, "seed": 0, "kl_coef": 0.0}
    lm = tiny_gpt2(5)
    return TokenPPO(
        "CausalLMPolicy", env, 1e-3, **{**settings, **changes}, policy_kwargs={"lm": lm},
        device="cpu",
    )  # fmt: skip


def test_each_token_is_paid_its_own_score() -> None:
    env = TextVecEnv(6, autoreset=False, **arguments(missing_eos_penalty=2.0))
    model = learner(env, whole_episodes=True)
    model.learn(24)
    buffer, ends = model.rollout_buffer, set()
    for episode in model.finished_episodes:
        row, n = episode["row"], episode["n_tokens"]
        paid = buffer.rewards[:n, row].copy()
        paid[-1] += 2.0 * (episode["finish_reason"] == "length")
        assert paid == pytest.approx(episode["token_scores"], abs=1e-6)
        ends.add(episode["finish_reason"])
    assert ends == {"eos", "length"} and len(model.finished_episodes) == 6


def test_what_an_earlier_rollout_earned_is_paid_at_the_first_token_of_this() -> None:
    scored = WeightedSum([(of_tokens, 1.0), (lambda completions, **_: [0.5] * len(completions), 1)])
    model = learner(TextVecEnv(4, **arguments(scored)), n_steps=3)
    n_cut = 0
    for tokens in (12, 24, 36):
        model.learn(tokens, reset_num_timesteps=tokens == 12)
        starts = {(s.row, s.end - 1): s.start for s in model.rollout_buffer.segments}
        for episode in model.finished_episodes:
            row, last = episode["row"], episode["step"]
            paid = model.rollout_buffer.rewards[starts[row, last] : last + 1, row]
            scores = episode.get("token_scores", [episode["score"]])  # of a single token
            n_before = len(scores) - len(paid)
            assert paid.sum() == pytest.approx(episode["score"], abs=1e-6)
            assert paid[1:] == pytest.approx(scores[n_before + 1 :], abs=1e-6)
            n_cut += n_before > 0
    assert n_cut >= 2


# ------------------------------------------------------------------------------- schedules


def scheduled(weights: list[float], points=((8, 0.0), (40, 1.0))):
    """A learner whose length penalty rises, and its callback, which notes the weights too."""
    reward = WeightedSum([(of_tokens, 1.0), (LengthReward(high=0, width=1.0), 0.0)])
    env = TextVecEnv(4, **arguments(reward))

    def set_weight(weight: float) -> None:
        weights.append(weight)
        reward.set_weight(1, weight)

    return env, WeightScheduleCallback(set_weight, points, "length_weight")


def test_a_weight_follows_the_tokens() -> None:
    weights: list[float] = []
    env, callback = scheduled(weights)
    model = learner(env)
    model.learn(64, callback)
    assert weights == pytest.approx([0.0, 0.25, 0.75, 1.0])
    with pytest.raises(ValueError, match="rising tokens"):
        WeightScheduleCallback(weights.append, [(8, 0.0), (8, 1.0)])


def test_a_rollout_that_goes_on_keeps_its_weight(tmp_path) -> None:
    """Saved in the middle of the third rollout: weights and policy are those never stopped."""
    whole: list[float] = []
    env, callback = scheduled(whole)

    class Save(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 10:
                self.model.save(tmp_path / "model")
            return True

    never_stopped = learner(env)
    never_stopped.learn(64, [callback, Save()])

    parts: list[float] = []
    env, callback = scheduled(parts)
    model = TokenPPO.load(tmp_path / "model", env, "cpu")
    model.learn(64, callback, reset_num_timesteps=False)
    assert parts == whole[2:] and len(set(whole)) == 4
    for a, b in zip(model.policy.parameters(), never_stopped.policy.parameters(), strict=True):
        assert th.equal(a, b)

    env, other = scheduled([], ((8, 0.0), (40, 2.0)))
    model = TokenPPO.load(tmp_path / "model", env, "cpu")
    with pytest.raises(ValueError, match="length_weight: expected the checkpoint's schedule"):
        model.learn(64, other, reset_num_timesteps=False)


def test_the_recipe_runs() -> None:
    """The Python of docs/recipes.md, section Shaping, with a tiny model and few tokens."""
    text = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
    section = text.split("## Shaping\n")[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    code = code.replace("20_000", "200").replace("n_steps=64", "n_steps=8").replace("_000,", ",")
    names: dict = {"tokenizer": gpt2_tokenizer(), "prompts": ["a film"], "lm": tiny_gpt2(320)}
    exec(code, names)  # noqa: S102  # it is our own
    assert names["total"].terms[1][1] == 0.3
    shaped = names["reward"](
        prompts=["a "], completions=["good one"], completion_pieces=[["good", " one", ""]]
    )
    assert shaped == [[0.5, 0.0, -0.5]]  # a promise that was not kept


def test_scores_of_tokens_are_learned_where_their_sum_at_the_end_is_not() -> None:
    """With λ = 0 and no value learned, a score at the end reaches the last token only.

    One point for each a, 12 tokens of 6 letters: a random policy has 2.0 on average. In the sixth
    rollout three seeds had 10.9 to 11.6, and of the sum 1.2 to 3.0.
    """

    def summed(prompts, completions, completion_ids, **columns):
        return [sum(scores) for scores in of_tokens(prompts, completions, completion_ids)]

    reached = []
    for reward_fn in (of_tokens, summed):
        env = TextVecEnv(
            16,
            tokenizer=letter_tokenizer("abcdef"),
            prompts=[">"],
            reward_fn=reward_fn,
            max_new_tokens=12,
            min_new_tokens=12,
        )
        model = TokenPPO(
            "CausalLMPolicy", env, 2e-3, n_steps=12, batch_size=96, n_epochs=4, seed=0,
            gae_lambda=0.0, vf_coef=0.0, kl_coef=0.0, device="cpu",
            policy_kwargs={"lm": tiny_gpt2(9)},
        )  # fmt: skip
        model.learn(6 * 16 * 12)
        reached.append(np.mean([e["completion"].count("a") for e in model.finished_episodes]))
    assert reached[0] > 8.0 and reached[1] < 4.0, reached
