"""Rollouts of one whole episode per row: what held rows must not do to counts, logs and samples."""

import json

import numpy as np
import pytest
import torch as th
from conftest import tiny_gpt2
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, ConvertCallback
from stable_baselines3.common.utils import explained_variance
from test_agents_token_ppo import AtRolloutEnd, arguments, make_model

import text_env
from agents import SampleTextCallback, TokenPPO
from agents.callbacks import TokenProgressBar
from agents.heads import Head


def holding_env(num_envs: int = 6, **changes) -> text_env.TextVecEnv:
    return text_env.TextVecEnv(num_envs=num_envs, autoreset=False, **arguments(**changes))


def make(env=None, **changes):
    return make_model(env=env or holding_env(), **{"n_steps": 6, "whole_episodes": True, **changes})


def test_a_rollout_is_one_episode_per_row() -> None:
    model, ends = make(), []

    def check(model) -> None:
        assert sorted(e["row"] for e in model.finished_episodes) == list(range(6))
        assert len(model.rollout_buffer.segments) == 6
        ends.append(sum(e["n_tokens"] for e in model.finished_episodes))
        assert model.rollout_buffer.n_tokens == ends[-1]

    model.learn(150, callback=AtRolloutEnd(check))
    assert model.num_timesteps == sum(ends)


def test_callbacks_and_progress_bar_see_the_tokens_written() -> None:
    """At each step the count grows by the rows that wrote, and never falls."""
    model, seen = make(), []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            live = int((self.model._last_obs[:, 0] >= 0).sum())
            seen.append((self.num_timesteps, live))
            return True

    class Bar(TokenProgressBar):
        last = 0

        def _on_training_end(self) -> None:
            Bar.last = self.pbar.n
            super()._on_training_end()

    model.learn(100, callback=[Watch(), Bar()])
    counts = [count for count, _ in seen]
    assert np.diff([0, *counts]).tolist() == [live for _, live in seen]
    assert counts[-1] == model.num_timesteps == Bar.last
    assert {live for _, live in seen} != {6}


def test_progress_bar_of_learn_counts_tokens(monkeypatch) -> None:
    counted = []
    monkeypatch.setattr(
        TokenProgressBar, "_on_training_end", lambda self: counted.append(self.pbar.n)
    )
    model = make()
    model.learn(100, progress_bar=True, callback=lambda *_: True)
    model.learn(50, progress_bar=True, reset_num_timesteps=False)
    assert sum(counted) == model.num_timesteps


def test_explained_variance_counts_no_held_rows() -> None:
    model = make()
    model.learn(150)
    buffer = model.rollout_buffer
    live = buffer.lengths > 0
    assert not live.all()
    expected = explained_variance(buffer.values[live], buffer.returns[live])
    assert model.logger.name_to_value["train/explained_variance"] == pytest.approx(expected)
    assert expected != pytest.approx(
        explained_variance(buffer.values.flatten(), buffer.returns.flatten()), abs=1e-3
    )


def test_samples_are_not_the_shortest_episodes(tmp_path) -> None:
    model, lengths = make(holding_env(40)), []
    model.learn(
        1,
        callback=[
            AtRolloutEnd(lambda m: lengths.extend(e["n_tokens"] for e in m.finished_episodes)),
            SampleTextCallback(tmp_path / "samples.jsonl", n_samples=8),
        ],
    )
    shown = [len(json.loads(line)["completion"]) for line in (tmp_path / "samples.jsonl").open()]
    assert len(shown) == 8 and len(lengths) == 40
    assert sum(shown) > sum(sorted(lengths)[:8])


def test_n_steps_shorter_than_the_episodes_is_refused() -> None:
    env = holding_env(max_new_tokens=6, min_new_tokens=6)
    with pytest.raises(ValueError, match=r"n_steps of at least 6, .* got 4"):
        make(env, n_steps=4).learn(64)


def test_a_zip_saved_within_a_rollout_can_be_trained_on(tmp_path) -> None:
    make().learn(40, callback=CheckpointCallback(2, str(tmp_path)))
    saved = sorted(tmp_path.glob("*.zip"))
    assert saved
    for path in saved[:2]:
        loaded = TokenPPO.load(path, env=holding_env(), device="cpu")
        assert f"_{loaded.num_timesteps}_steps" in path.name
        loaded.learn(40)
        assert loaded.num_timesteps >= 40


def test_the_default_jobs_combination_trains() -> None:
    """bfloat16, frozen layers, held rows, masks by position and the KL penalty, together."""
    env = holding_env(12, max_new_tokens=10, min_new_tokens=3)
    model = make(
        env,
        lm=tiny_gpt2(9, layers=3),
        n_steps=10,
        kl_coef=0.2,
        policy_kwargs={"dtype": "bfloat16", "trainable_layers": 1, "temperature": 0.7},
    )
    before = [p.detach().clone() for p in model.policy.lm.parameters()]
    slots = []

    def watch(locals_: dict, globals_: dict) -> bool:
        slots.append(len(model.policy.decoder._rows))
        return True

    ref_kl = []
    ends = AtRolloutEnd(lambda m: ref_kl.append(m.finished_episodes[0]["ref_kl"]))
    model.learn(400, callback=[ConvertCallback(watch), ends])
    assert model.policy.n_frozen == model.reference.n_frozen == 2
    assert min(slots) < 12 == max(slots)
    moved = [not a.equal(b) for a, b in zip(before, model.policy.lm.parameters(), strict=True)]
    assert moved == [p.requires_grad for p in model.policy.lm.parameters()]
    assert len(ref_kl) > 2 and np.isfinite(ref_kl).all() and abs(ref_kl[-1]) > 1e-3
    assert model.rollout_buffer.action_masks.table().shape[0] == 2


def test_no_logits_are_computed_for_held_rows(monkeypatch) -> None:
    model = make(holding_env(8))
    obs = th.from_numpy(model.env.reset())
    obs[2:6] = -1
    rows, logits = [], Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, h: rows.append(len(h)) or logits(head, h))
    with th.no_grad():
        tokens, values, log_prob = model.policy(obs)
        model.policy.predict(obs.numpy())
        assert rows == [4, 4]
        assert tokens[2:6].eq(0).all() and values[2:6].eq(0).all() and log_prob[2:6].eq(0).all()
        assert log_prob[[0, 1, 6, 7]].lt(0).all()
        obs[:] = -1
        model.policy(obs)
        assert model.policy.predict(obs.numpy())[0].shape == (8,) and rows == [4, 4, 0, 0]
