"""RLOO, GRPO and A2C on tokens: advantages by hand, groups of the environment, learning."""

import numpy as np
import pytest
import torch as th
from conftest import tiny_gpt2
from stable_baselines3 import A2C
from test_agents_token_ppo import AtRolloutEnd, arguments, make_model

import text_env
from agents import TokenA2C, TokenGRPO, TokenPPO, TokenRLOO
from agents.critic_free import group_relative, leave_one_out


def grouped_env(num_envs: int = 8, group_size: int = 4, **changes) -> text_env.TextVecEnv:
    return text_env.TextVecEnv(
        num_envs=num_envs, group_size=group_size, autoreset=False, **arguments(**changes)
    )


def make(algorithm=TokenRLOO, env=None, **changes):
    return make_model(env=env or grouped_env(), algorithm=algorithm, **{"n_steps": 6, **changes})


def test_leave_one_out_by_hand() -> None:
    """Groups 0: 1, 3, 8 and 1: 2, 6, mixed."""
    returns, groups = np.array([1.0, 2.0, 3.0, 6.0, 8.0]), np.array([0, 1, 0, 1, 0])
    np.testing.assert_allclose(leave_one_out(returns, groups), [-4.5, -4.0, -1.5, 4.0, 6.0])


def test_group_relative_by_hand() -> None:
    """Group 0: 1, 2, 3 has mean 2 and unbiased SD 1; group 1 is constant."""
    returns, groups = np.array([1.0, 5.0, 2.0, 5.0, 3.0]), np.array([0, 1, 0, 1, 0])
    expected = np.array([-1, 0, 0, 0, 1]) / (1 + 1e-4)
    np.testing.assert_allclose(group_relative(returns, groups), expected)


@pytest.mark.parametrize("algorithm", [TokenRLOO, TokenGRPO])
def test_advantages_of_a_rollout_the_slow_way(algorithm) -> None:
    """From the infos alone: score less β·ref_kl, against the other rows with the same prompt."""
    model, checked = make(algorithm, kl_coef=0.3, learning_rate=1e-2), []

    def check(model) -> None:
        total = {e["row"]: e["score"] - 0.3 * e["ref_kl"] for e in model.finished_episodes}
        prompt = {e["row"]: e["prompt"] for e in model.finished_episodes}
        for row in range(8):
            mates = [total[r] for r in range(8) if prompt[r] == prompt[row]]
            assert len(mates) in (4, 8)  # both groups may have drawn one prompt
            if algorithm is TokenRLOO:
                expected = total[row] - (sum(mates) - total[row]) / (len(mates) - 1)
            else:
                expected = (total[row] - np.mean(mates)) / (np.std(mates, ddof=1) + 1e-4)
            buffer = model.rollout_buffer
            trained = buffer.lengths[:, row] > 0
            found = buffer.advantages[trained, row]
            np.testing.assert_allclose(found, np.full(trained.sum(), expected), atol=1e-5)
            np.testing.assert_allclose(buffer.returns[trained, row], total[row], atol=1e-5)
            checked.append(abs(model.finished_episodes[0]["ref_kl"]))

    model.learn(200, callback=AtRolloutEnd(check))
    assert len(checked) > 16 and max(checked) > 1e-3


def test_the_value_head_stays_and_its_figures_are_not_logged(tmp_path) -> None:
    model = make(learning_rate=1e-2)
    before = [p.detach().clone() for p in model.policy.lm.parameters()]
    model.learn(40)
    assert not model.policy.value_head.weight.any() and not model.policy.value_head.bias.any()
    assert any(not p.equal(b) for p, b in zip(model.policy.lm.parameters(), before, strict=True))
    assert "train/loss" in model.logger.name_to_value
    assert "train/explained_variance" not in model.logger.name_to_value
    model.save(tmp_path / "model.zip")
    again = TokenRLOO.load(tmp_path / "model.zip", env=grouped_env(), device="cpu")
    again.learn(40)


def test_all_of_sb3s_writers_take_what_is_logged(tmp_path, capsys) -> None:
    """They pair values with exclusions, strictly."""
    model = make(verbose=1, tensorboard_log=str(tmp_path))
    model.learn(150, log_interval=1)
    assert "policy_gradient_loss" in capsys.readouterr().out


def test_what_means_nothing_without_a_critic_is_refused() -> None:
    with pytest.raises(TypeError, match="expected group_size in TextVecEnv"):
        make(group_size=4)
    with pytest.raises(TypeError, match=r"TokenRLOO has no critic: expected no \['gamma'"):
        make(gamma=0.9, value_warmup=2)
    assert make(rollout_buffer_kwargs={}).rollout_buffer.baseline is leave_one_out


def test_what_groups_need() -> None:
    with pytest.raises(ValueError, match="two completions or more of each prompt in a rollout"):
        make(env=grouped_env(group_size=1)).learn(8)
    model = make(env=text_env.TextVecEnv(8, group_size=4, **arguments()), n_steps=4)
    with pytest.raises(ValueError, match=r"whole episodes, got \d of 8 rows cut"):
        model.learn(8)


@pytest.mark.parametrize("algorithm", [TokenRLOO, TokenGRPO, TokenA2C])
def test_learns_to_write_a(algorithm) -> None:
    """A random policy scores about 0.8 of 6."""
    if algorithm is TokenA2C:
        env = text_env.TextVecEnv(16, **arguments())
        model = make_a2c(env=env, n_steps=8, learning_rate=3e-3, kl_coef=0.0)
    else:
        model = make(algorithm, grouped_env(16), batch_size=64, n_epochs=2, kl_coef=0.0)
    model.learn(16 * 16 * 25)
    assert np.mean([e["r"] for e in model.ep_info_buffer]) > 4


def test_token_a2c_takes_stock_a2cs_step() -> None:
    """Same rollout, same gradient: with SGD, to float tolerance."""
    sgd = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {}}
    env = {"env": text_env.TextVecEnv(4, **arguments())}
    settings = {"n_steps": 8, "learning_rate": 0.1, "policy_kwargs": sgd, "max_grad_norm": 1e9}
    ours = make_a2c(kl_coef=0.0, **env, **settings)
    env = {"env": text_env.TextVecEnv(4, **arguments())}
    stock = make_model(algorithm=A2C, gamma=1.0, use_rms_prop=False, **env, **settings)
    stock.policy.load_state_dict(ours.policy.state_dict())
    for model in (ours, stock):
        model.set_random_seed(3)
        model.learn(4 * 8)
    for a, b in zip(ours.policy.parameters(), stock.policy.parameters(), strict=True):
        th.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)


def make_a2c(**changes):
    """TokenA2C: `make_model` would give it a batch size."""
    policy_kwargs = {"lm": tiny_gpt2(9), **changes.pop("policy_kwargs", {})}
    return TokenA2C(
        "CausalLMPolicy", changes.pop("env"), policy_kwargs=policy_kwargs, seed=0, device="cpu",
        **changes,
    )  # fmt: skip


def test_token_a2c_refuses_what_makes_it_ppo() -> None:
    assert issubclass(TokenA2C, TokenPPO)
    with pytest.raises(TypeError, match=r"one step on the whole rollout: expected no \['n_epochs'"):
        make_a2c(env=grouped_env(), n_epochs=2)
