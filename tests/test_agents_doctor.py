"""DoctorCallback in real runs: what it reads, says, writes and stops."""

import json
import logging

import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

import text_env
from agents import DoctorCallback, TokenPPO
from agents.doctor import kept, ratio_error, takes_several_steps
from agents.findings import CHECKS


def count_a(prompts, completions, **columns) -> list[float]:
    return [float(c.count("a")) for c in completions]


def make_model(algorithm=TokenPPO, num_envs=4, env=None, **changes):
    arguments = {"prompts": [">", ">>", ">a>", ">bb>"], "reward_fn": count_a, "max_new_tokens": 6}
    venv = text_env.TextVecEnv(
        num_envs=num_envs, tokenizer=letter_tokenizer("abcdef"), **{**arguments, **(env or {})}
    )
    settings = {"learning_rate": 1e-3, "n_steps": 16, "batch_size": 32, "seed": 0, "device": "cpu"}
    kwargs = {"lm": tiny_gpt2(9)}
    return algorithm("CausalLMPolicy", venv, policy_kwargs=kwargs, **{**settings, **changes})


class Kept(KVWriter):
    """Keeps what is dumped, and what is to be left out where."""

    def __init__(self):
        self.rows, self.excluded = [], {}

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))
        self.excluded.update(key_excluded)

    def close(self):
        pass


def logged_to(model) -> Kept:
    log = Kept()
    model.set_logger(Logger(None, [log]))
    return log


def test_a_healthy_run_raises_nothing(tmp_path, caplog) -> None:
    """The learning test of test_agents_token_ppo: from 0.8 to more than 4 of 6."""
    model = make_model(num_envs=16, kl_coef=0.0, n_epochs=4, batch_size=64)
    log, doctor = logged_to(model), DoctorCallback(tmp_path / "doctor.jsonl")
    with caplog.at_level(logging.WARNING, "agents.doctor"):
        model.learn(16 * 16 * 25, callback=doctor)
    assert np.mean([e["r"] for e in model.ep_info_buffer]) > 4
    assert doctor.findings == [] and caplog.records == []
    assert (tmp_path / "doctor.jsonl").read_text() == ""
    assert all(row[f"doctor/{name}"] == 0 for row in log.rows for name in CHECKS)
    assert len(doctor.seen.episodes) == len(doctor.seen.updates) == 25
    row = doctor.seen.episodes[-1]
    assert row["score"] == pytest.approx(log.rows[-1]["rollout/score_mean"])
    assert row["length"] == pytest.approx(log.rows[-1]["rollout/completion_tokens"])
    assert row["ran_out"] == pytest.approx(log.rows[-1]["rollout/finish_length"])
    update = doctor.seen.updates[-2]  # which the last line has
    assert update["entropy"] == pytest.approx(-log.rows[-1]["train/entropy_loss"])
    assert update["clip_fraction"] == pytest.approx(log.rows[-1]["train/clip_fraction"])


def test_a_run_that_cannot_end_or_learn_is_told_once_and_goes_on(tmp_path, caplog) -> None:
    model = make_model(num_envs=8, learning_rate=0.0, env={"min_new_tokens": 6})
    log, doctor = logged_to(model), DoctorCallback(tmp_path / "here" / "doctor.jsonl")
    with caplog.at_level(logging.WARNING, "agents.doctor"):
        model.learn(8 * 16 * 9, callback=doctor)
    assert [finding.name for finding in doctor.findings] == ["eos_gone", "clip_fraction_zero"]
    assert len(caplog.records) == 2 and "100% of the completions" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "here" / "doctor.jsonl").open()]
    assert [line["name"] for line in lines] == ["eos_gone", "clip_fraction_zero"]
    assert lines[0]["num_timesteps"] == doctor.findings[0].num_timesteps < model.num_timesteps
    held = [row["doctor/eos_gone"] for row in log.rows]
    assert held == sorted(held) and held[0] == 0 and sum(held) > 3  # in each rollout from then on
    texts = [row["doctor/findings"] for row in log.rows if "doctor/findings" in row]
    assert len(texts) == 2 and texts[0].startswith("**eos_gone** (look): 100%")
    assert "json" in log.excluded["doctor/findings"]
    assert "stdout" in log.excluded["doctor/judge_falls"]  # a column of zeros


def test_ignored_findings_are_not_looked_for() -> None:
    model = make_model(num_envs=8, learning_rate=0.0, env={"min_new_tokens": 6})
    log, doctor = logged_to(model), DoctorCallback(ignore=("eos_gone", "clip_fraction_zero"))
    model.learn(8 * 16 * 7, callback=doctor)
    assert doctor.findings == [] and "doctor/eos_gone" not in log.rows[-1]


def test_it_stops_the_run(caplog) -> None:
    model = make_model(env={"reward_fn": lambda prompts, completions, **_: [1.0] * len(prompts)})
    doctor = DoctorCallback(stop_on=("constant_score",), window=1, min_episodes=1)
    with caplog.at_level(logging.WARNING, "agents.doctor"):
        model.learn(4 * 16 * 10, callback=doctor)
    assert model.num_timesteps == 4 * 16 + 4  # at the first step after the update
    assert doctor.findings[0].name == "constant_score" and "training stops" in caplog.text


class Nudge(BaseCallback):
    """Changes the weights between rollout and update."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        with th.no_grad():
            for p in self.model.policy.lm.parameters():
                p.add_(0.02 * th.randn_like(p))


def test_weights_changed_before_the_update_are_named_before_it_fails(tmp_path) -> None:
    model, doctor = make_model(), DoctorCallback(tmp_path / "doctor.jsonl")
    with pytest.raises(FloatingPointError, match="rollout and update do not see the same policy"):
        model.learn(64, callback=[Nudge(), doctor])
    assert [finding.name for finding in doctor.findings] == ["first_ratio"]
    assert json.loads((tmp_path / "doctor.jsonl").read_text())["severity"] == "wrong"


def test_it_changes_nothing_in_the_run() -> None:
    def weights(callback) -> dict[str, th.Tensor]:
        model = make_model()
        model.learn(4 * 16 * 3, callback=callback)
        return model.policy.state_dict()

    without, watched = weights(None), weights(DoctorCallback())
    assert all(without[name].equal(watched[name]) for name in without)


def test_the_probe_is_silent_where_it_would_hang_or_cannot_ask() -> None:
    model = make_model()
    model.learn(64)
    error, tolerance = ratio_error(model)  # after the update
    assert error > tolerance == 1e-4
    model.policy.sharded = True
    assert ratio_error(model) is None
    assert takes_several_steps(model)
    model.n_epochs, model.batch_size = 1, 64
    assert not takes_several_steps(model)


def test_stock_ppo_is_watched_by_its_updates() -> None:
    model, doctor = make_model(PPO), DoctorCallback()
    model.learn(64 * 2, callback=doctor)
    assert doctor.seen.episodes == [] and len(doctor.seen.updates) == 2
    assert {"clip_fraction", "entropy", "approx_kl"} <= set(doctor.seen.updates[0])


class Judge(BaseCallback):
    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.logger.record("rollout/judge_mean", 2.5)


def test_the_judge_is_read_and_few_episodes_wait_for_more() -> None:
    model, doctor = make_model(num_envs=2, n_steps=8), DoctorCallback(min_episodes=8)
    model.learn(2 * 8 * 6, callback=[Judge(), doctor])
    rows = doctor.seen.episodes
    assert 0 < len(rows) < 6 and all(row["judge"] == 2.5 for row in rows)
    assert {"ref_kl", "kl_coef", "score_sd", "repetition"} <= set(rows[0])
    assert len(doctor._waiting) < 8
    episode = {"n_tokens": np.int64(3), "score": np.float32(0.5), "completion": "ab", "other": {}}
    assert json.dumps(kept(episode)) == '{"score": 0.5, "n_tokens": 3.0, "completion": "ab"}'


def test_its_state_is_json_and_a_new_run_begins_anew() -> None:
    model = make_model(num_envs=8, learning_rate=0.0, env={"min_new_tokens": 6})
    doctor = DoctorCallback()
    model.learn(8 * 16 * 4, callback=doctor)
    state = json.loads(json.dumps(doctor.get_state()))
    again = DoctorCallback()
    again.set_state(state)
    assert again.seen == doctor.seen and again.findings == doctor.findings != []
    model.learn(8 * 16 * 2, callback=again, reset_num_timesteps=False)
    assert len(again.seen.updates) == 6  # which is enough to see that none of them did anything
    assert [f.name for f in again.findings] == ["eos_gone", "clip_fraction_zero"]
    model.learn(8 * 16, callback=again)  # counts from 0
    assert len(again.seen.updates) == 1 and again.findings == []


@pytest.mark.parametrize("argument", ["stop_on", "ignore"])
@pytest.mark.parametrize("names", [("kl_run",), "kl_runaway"])
def test_unknown_names_are_refused(argument, names) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected a collection of first_ratio, "):
        DoctorCallback(**{argument: names})
