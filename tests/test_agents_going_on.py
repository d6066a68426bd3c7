"""What a training that goes on must leave behind, must refuse, and must say."""

import copy
import json
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from checkpoint_fixtures import count_a, decay, make_env, make_model
from conftest import letter_tokenizer, tiny_gpt2
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from transformers import AutoModelForCausalLM, PreTrainedModel

from agents import CheckpointFolderCallback, DoctorCallback, TokenPPO, newest_whole
from agents.checkpoint import read_checkpoint, write_checkpoint
from agents.checkpoint_store import CheckpointStore, checkpoints_in


class StopAt(BaseCallback):
    """Breaks a rollout off: by SB3's way, or by an error."""

    def __init__(self, step: int, error: bool = False) -> None:
        super().__init__()
        self.step, self.error = step, error

    def _on_step(self) -> bool:
        if self.n_calls == self.step and self.error:
            raise RuntimeError("broken off")
        return self.n_calls < self.step


@pytest.mark.parametrize("error", [False, True])
def test_what_an_ended_episode_cost_is_not_the_next_ones(error) -> None:
    """Completions have at most 6 tokens: after 7 steps each row has ended one, after one none."""
    for step, ended in ((1, False), (8, True)):
        model = make_model(make_env(min_new_tokens=6), n_steps=9)
        model.learn(27)  # in mid-episode at its end
        model._open_kl[:] = 100.0
        try:
            model.learn(27, callback=StopAt(step, error), reset_num_timesteps=False)
        except RuntimeError:
            assert error
        assert (model._open_kl == (0.0 if ended else 100.0)).all(), (step, model._open_kl)


def test_a_checkpoint_just_made_is_never_removed_for_damaged_later_ones(tmp_path) -> None:
    make_model().learn(144, callback=CheckpointFolderCallback(tmp_path, keep=4, best_key=None))
    first, *later = checkpoints_in(tmp_path)
    for path in later:
        (path / "policy.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match="is damaged.*the one before"):
        assert newest_whole(tmp_path) == first
    model = TokenPPO.load(first, make_env(), "cpu", learning_rate=decay)
    saver = CheckpointFolderCallback(tmp_path, keep=1, every_tokens=12, best_key=None)

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            if saver._saved_at > int(first.name[-8:]):
                assert newest_whole(tmp_path) == saver.store.path_of(saver._saved_at)
            return True

    model.learn(144, callback=[saver, Look()], reset_num_timesteps=False)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000144"]


def test_a_folder_with_later_checkpoints_is_refused(tmp_path) -> None:
    saver = CheckpointFolderCallback(tmp_path, keep=2)
    make_model().learn(72, callback=saver)
    older = checkpoints_in(tmp_path)[0]
    for model, reset in (
        (TokenPPO.load(older, make_env(), "cpu", learning_rate=decay), False),
        (make_model(), True),
    ):
        with pytest.raises(FileExistsError, match=r"step-00000072 is of a later step .* remove"):
            model.learn(72, callback=CheckpointFolderCallback(tmp_path), reset_num_timesteps=reset)
    saver.store.folder = tmp_path / "another"  # the same callback counts anew in another training
    make_model().learn(48, callback=saver)
    assert [p.name[-2:] for p in checkpoints_in(tmp_path / "another")] == ["24", "48"]


def test_a_best_is_a_number(tmp_path) -> None:
    class Judge(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            value = [1.0, float("nan"), 2.0, 0.0, 0.0][self.model.num_timesteps // 24 - 1]
            self.logger.record("rollout/judge_mean", value)

    saver = CheckpointFolderCallback(tmp_path, best_key="rollout/judge_mean")
    make_model().learn(120, callback=[Judge(), saver])
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 2.0


def test_the_store_keeps_what_is_whole(tmp_path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step in (10, 30, 20):
        store.put(step, lambda path: write_checkpoint(path, {}, {}))
    assert [path.name[-2:] for path in checkpoints_in(tmp_path)] == ["20", "30"]
    store.prune()
    assert [path.name[-2:] for path in checkpoints_in(tmp_path)] == ["30"]


def test_a_doctor_is_asked_anew_what_stops_a_run() -> None:
    doctor = DoctorCallback(stop_on=["kl_runaway", "eos_gone"])
    doctor._stopping = ["kl_runaway"]
    state = json.loads(json.dumps(doctor.get_state()))
    for stop_on, stops in ((["eos_gone", "kl_runaway"], True), (["eos_gone"], False), ([], False)):
        other = DoctorCallback(stop_on=stop_on)
        other.set_state(state)
        assert other._on_step() is not stops


class SaveAtRolloutEnd(BaseCallback):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.model.save(self.path)


def test_what_cannot_go_on_exactly_says_so(tmp_path) -> None:
    path = tmp_path / "model"
    make_model().learn(24, callback=SaveAtRolloutEnd(path))
    with pytest.warns(
        UserWarning, match="has no environments and no rollout in it: it was made by"
    ):
        TokenPPO.load(path, make_env(), "cpu", learning_rate=decay)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # but not where nothing is to go on
        TokenPPO.load(path, None, "cpu", learning_rate=decay)
        TokenPPO.load(path, make_env(), "cpu", force_reset=True, learning_rate=decay)
    state, tensors = read_checkpoint(path)
    state["machine"] |= {"processes": 2, "device": "cuda", "instructions": "AVX9"}
    write_checkpoint(tmp_path / "other", state, tensors)
    with pytest.warns(UserWarning, match=r"device cuda \(now cpu\), instructions.*processes 2 \("):
        TokenPPO.load(tmp_path / "other", None, "cpu", learning_rate=decay)


def one_row(limit: int | None = None) -> gym.Env:
    env = gym.make(
        "TextEnvironment-v0", tokenizer=letter_tokenizer("abcdef"), prompts=[">"],
        reward_fn=count_a, max_new_tokens=6,
    )  # fmt: skip
    return env if limit is None else gym.wrappers.TimeLimit(env, limit)


def test_wrappers_of_other_settings_are_refused(tmp_path) -> None:
    def normalised(limit: int = 20, **changes) -> VecNormalize:
        inner = DummyVecEnv([lambda: one_row(limit)])
        return VecNormalize(inner, norm_obs=False, **{"gamma": 1.0, **changes})

    model = make_model(normalised(), batch_size=8)
    model.learn(8)
    model.save(tmp_path / "model")
    loaded = TokenPPO.load(tmp_path / "model", normalised(), "cpu", learning_rate=decay)
    assert np.array_equal(loaded.env.ret_rms.mean, model.env.ret_rms.mean)
    for message, env in (
        ("VecNormalize with .*'gamma': 1.0.*, got .*'gamma': 0.9", normalised(gamma=0.9)),
        ("TimeLimit with .*20.*, got .*30", normalised(limit=30)),
    ):
        with pytest.raises(ValueError, match=message):
            TokenPPO.load(tmp_path / "model", env, "cpu", learning_rate=decay)


def relu() -> PreTrainedModel:
    config = copy.copy(tiny_gpt2(9, width=16).config)
    config.activation_function = "relu"
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("temperature: 1.0 in the checkpoint, 0.5 from", {"policy_kwargs": {"temperature": 0.5}}),
        ("whiten_advantages: True in the checkpoint, False", {"normalize_advantage": False}),
        (
            "whiten_advantages: True in the checkpoint, False",
            {"rollout_buffer_kwargs": {"whiten_advantages": False}},
        ),
        ("lm: another configuration, activation_function 'gelu_new' in the", relu),
    ],
)
def test_other_settings_than_the_checkpoints_are_listed(tmp_path, message, changes) -> None:
    make_model().save(tmp_path / "model")
    given = {"policy_kwargs": {"lm": relu()}} if changes is relu else changes
    with pytest.warns(UserWarning, match=message):
        TokenPPO.load(tmp_path / "model", make_env(), "cpu", learning_rate=decay, **given)


def test_the_same_settings_given_again_are_no_others(tmp_path) -> None:
    make_model().save(tmp_path / "model")
    tiny_gpt2(9, width=16).save_pretrained(tmp_path / "lm")
    given = {"policy_kwargs": {"lm": str(tmp_path / "lm"), "temperature": 1.0}, "n_steps": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TokenPPO.load(tmp_path / "model", make_env(), "cpu", learning_rate=decay, **given)
    given = {"policy_kwargs": {"optimizer_class": th.optim.SGD}}
    with pytest.raises(ValueError, match=r"with the checkpoint's Adam.*, got SGD"):
        TokenPPO.load(tmp_path / "model", make_env(), "cpu", learning_rate=decay, **given)
