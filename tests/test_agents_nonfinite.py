"""Numbers that are not finite never reach a parameter: each source, raised about or left out."""

import copy

import numpy as np
import pytest
import torch as th
from conftest import tiny_gpt2
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecEnvWrapper
from test_agents_token_ppo import AtRolloutEnd, count_a, make_env, make_model

from agents import TokenGRPO
from agents.nonfinite import NonFiniteError

NUMBERS = [float("nan"), float("inf"), -float("inf")]


class BadReward(VecEnvWrapper):
    """Gives row 1 a reward of its own at one step."""

    def __init__(self, venv, number: float, at: int = 5) -> None:
        super().__init__(venv)
        self.number, self.at, self.now = number, at, 0

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        if self.now == self.at:
            rewards[1] = self.number
        self.now += 1
        return obs, rewards, dones, infos


def in_reward(model, number: float) -> None:
    model.env = BadReward(model.env, number)


def in_logits(model, number: float) -> None:
    head = model.policy.lm.get_output_embeddings()
    bias = th.zeros(head.weight.shape[0])
    bias[2] = number
    head.bias = th.nn.Parameter(bias, requires_grad=False)


def in_value(model, number: float) -> None:
    with th.no_grad():
        model.policy.value_head.bias.fill_(number)


def in_loss(model, number: float) -> None:
    model.at_rollout_end = lambda: model.rollout_buffer.advantages.__setitem__((3, 1), number)


def in_returns(model, number: float) -> None:
    model.at_rollout_end = lambda: model.rollout_buffer.returns.__setitem__((3, 1), number)


def in_gradient(model, number: float) -> None:
    weight = next(p for p in model.policy.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * number)


SOURCES = {
    "reward": in_reward,
    "logits": in_logits,
    "value": in_value,
    "slope of the loss in log_prob": in_loss,
    "slope of the loss in value": in_returns,
    "gradient": in_gradient,
}


class Poison(BaseCallback):
    """Runs `model.at_rollout_end`, if there is such a thing."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        getattr(self.model, "at_rollout_end", lambda: None)()


def state_of(model) -> list[th.Tensor]:
    """Parameters and what the optimizer remembers."""
    moments = [v for s in model.policy.optimizer.state.values() for v in s.values()]
    return [p.detach().clone() for p in model.policy.parameters()] + copy.deepcopy(moments)


def same(a: list[th.Tensor], b: list[th.Tensor]) -> bool:
    """Bit for bit, NaN included."""
    pairs = zip(a, b, strict=True)
    return all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in pairs)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_number_that_is_not_finite_stops_the_run_before_any_parameter_changes(
    source: str, number: float
) -> None:
    model = make_model()
    SOURCES[source](model, number)
    before = state_of(model)
    with pytest.raises(NonFiniteError) as raised:
        model.learn(64, callback=Poison())
    assert same(before, state_of(model))
    message = str(raised.value)
    assert message.startswith(f"{source}: expected finite numbers")
    assert "at step " in message and "(tokens)" in message
    if source != "gradient":  # which is of the whole minibatch
        assert "in the text '>" in message
    if source == "reward":
        assert f"got {number} " in message


@pytest.mark.parametrize("number", [*NUMBERS, 1e16])
@pytest.mark.parametrize("algorithm", [None, TokenGRPO])
def test_skip_leaves_the_episode_with_a_bad_reward_out_and_learns_from_the_others(
    number: float, algorithm
) -> None:
    settings, changes = {}, {}
    if algorithm is not None:
        changes = {"group_size": 2, "autoreset": False}
        settings = {"algorithm": algorithm, "n_steps": 6}
    env = BadReward(make_env(8, **changes), number, at=2)
    model = make_model(env, on_nonfinite="skip", **settings)
    before = state_of(model)
    logged = {}

    def look(model) -> None:
        buffer = model.rollout_buffer
        for name in ("rewards", "values", "advantages", "returns", "log_probs"):
            assert np.isfinite(getattr(buffer, name)).all(), name
        logged.setdefault("left_out", buffer.lengths[2, 1] == 0)
        logged["episodes"] = len(model.finished_episodes)
        written = buffer.n_tokens + buffer.n_tokens_left_out
        logged["written"] = logged.get("written", 0) + written

    model.learn(48, callback=AtRolloutEnd(look))
    assert logged["left_out"] and logged["episodes"] > 0
    n_sequences = model.nonfinite_skipped
    assert n_sequences == 1 if algorithm is None else n_sequences >= 2  # with its whole group
    assert model.logger.name_to_value["train/nonfinite_skipped"] == n_sequences
    assert model.num_timesteps >= 48 and model.num_timesteps == logged["written"]
    after = state_of(model)
    assert not same(before, after[: len(before)])
    assert all(p.isfinite().all() for p in after)


class Rows(KVWriter):
    """Keeps what is logged, row by row."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def write(self, key_values: dict, key_excluded: dict, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("at", [2, 12])
def test_what_a_rollout_leaves_out_stands_in_its_own_row_the_last_one_too(at: int) -> None:
    """The first or the second, and last, of two rollouts of 8 steps has the bad reward."""
    model, kept = (
        make_model(BadReward(make_env(4), np.nan, at), on_nonfinite="skip", n_steps=8),
        Rows(),
    )
    model.set_logger(Logger(None, [kept]))
    model.learn(64)
    counts = [row["train/nonfinite_skipped"] for row in kept.rows]
    assert counts == ([1, 1] if at == 2 else [0, 1]) and model.nonfinite_skipped == 1


@pytest.mark.parametrize("source", ["slope of the loss in log_prob", "gradient"])
@pytest.mark.parametrize("number", NUMBERS)
def test_skip_leaves_a_minibatch_out_and_counts_it(source: str, number: float) -> None:
    model = make_model(on_nonfinite="skip", n_epochs=2)  # 64 tokens: 2 minibatches, twice
    SOURCES[source](model, number)
    before = state_of(model)
    model.learn(64, callback=Poison())
    skipped, taken = model.nonfinite_skipped, model.policy.guard.n_steps
    assert (skipped, taken) == ((4, 0) if source == "gradient" else (2, 2))
    assert same(before, state_of(model)) == (source == "gradient")
    assert all(p.isfinite().all() for p in state_of(model))


def test_skip_leaves_a_whole_rollout_out_where_nothing_is_finite() -> None:
    model = make_model(on_nonfinite="skip")
    in_value(model, float("nan"))
    before = state_of(model)
    model.learn(128)
    assert same(before, state_of(model)) and model.policy.guard.n_steps == 0
    assert model.nonfinite_skipped > 0 and model.num_timesteps == 128


def test_logits_that_are_not_finite_raise_even_with_skip_and_when_greedy() -> None:
    model = make_model(on_nonfinite="skip")
    in_logits(model, -float("inf"))
    with pytest.raises(NonFiniteError, match="logits: expected finite numbers"):
        model.learn(64)
    with pytest.raises(NonFiniteError, match="logits"):
        model.predict(model.env.reset(), deterministic=True)


def test_a_reference_that_is_not_finite_is_named() -> None:
    model = make_model(ref_lm=tiny_gpt2(9, seed=1))
    with th.no_grad():
        next(model.reference.parameters()).fill_(float("nan"))
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"reference: .* in the text '>"):
        model.learn(64)
    assert same(before, state_of(model))


def test_the_environments_bad_score_is_passed_on_if_asked_and_left_out() -> None:
    def broken(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        scores = count_a(prompts, completions)
        scores[0] = 10**400 if len(scores) == 1 else float("nan")
        return scores

    with pytest.raises(ValueError, match=r"expected a finite number, got (nan|1000)"):
        make_model(make_env(reward_fn=broken)).learn(64)
    model = make_model(make_env(reward_fn=broken, nonfinite_scores="pass"), on_nonfinite="skip")
    model.learn(64)
    assert model.nonfinite_skipped > 0
    assert all(p.isfinite().all() for p in state_of(model))


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match='on_nonfinite "raise" or "skip", got \'ignore\''):
        make_model(on_nonfinite="ignore")
    with pytest.raises(ValueError, match='nonfinite_scores: expected "error" or "pass"'):
        make_env(nonfinite_scores="skip")


# ------------------------------------------------------------------ degenerate batches


def test_one_token_in_all() -> None:
    """EOS is the only token allowed: an episode is one token, and so is the rollout."""
    env = make_env(1, allowed_token_ids=[], max_new_tokens=1)
    model = make_model(env, n_steps=2, batch_size=1)
    model.learn(2)
    assert model.policy.guard.n_steps == 2 * 2
    assert all(p.isfinite().all() for p in state_of(model))


@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_equal_scores(normalize_advantage: bool) -> None:
    env = make_env(reward_fn=lambda completions, **_: [3.0] * len(completions))
    model = make_model(env, normalize_advantage=normalize_advantage)
    model.learn(128)
    assert all(p.isfinite().all() for p in state_of(model))


def test_eos_first_and_all_actions_masked_but_one() -> None:
    """Each completion is empty: a single token of probability 1, whose gradient is 0."""
    env = make_env(allowed_token_ids=[], reward_fn=lambda prompts, **_: [1.0] * len(prompts))
    model = make_model(env)
    seen = []
    model.learn(64, callback=AtRolloutEnd(lambda m: seen.extend(m.finished_episodes)))
    assert len(seen) == 64
    assert all(e["completion"] == "" and e["n_tokens"] == 1 for e in seen)
    assert np.abs(model.rollout_buffer.log_probs).max() == 0
    assert all(p.isfinite().all() for p in state_of(model))
