"""Exact resume: a training that is stopped and goes on is, bit for bit, one that never was."""

import copy
import pickle
import random
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
import torch as th
from checkpoint_fixtures import (
    Seen,
    Watch,
    count_a,
    decay,
    differences,
    leaves,
    make_env,
    make_model,
    perturbed,
    result,
    run,
)
from conftest import letter_tokenizer, tiny_gpt2
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecMonitor

from agents import DoctorCallback, TokenA2C, TokenGRPO, TokenPPO, TokenRLOO
from agents.checkpoint import read_checkpoint, write_checkpoint
from agents.nonfinite import NonFiniteError

TOTAL = 80
"""Tokens: four rollouts of 3 rows and 8 steps, the last of which goes beyond it."""


def never_stopped(folder: Path, stops: list[int], at: str = "token", env=make_env, **changes):
    """Train without stopping; but a checkpoint is made at each of `stops` (steps)."""
    model = make_model(env(), **changes)
    callback = Watch(folder, stops, at)
    rows = run(model, TOTAL, callback)
    return result(model, folder / "end", rows, callback)


def gone_on(folder: Path, stop: int | str, algorithm=TokenPPO, env=make_env):
    """Load the checkpoint of a step, and train on to the end, without a further save."""
    model = algorithm.load(folder / str(stop), env(), "cpu", learning_rate=decay)
    callback = Watch(folder / "again", [])
    rows = run(model, TOTAL, callback, go_on=True)
    return result(model, folder / "again" / str(stop), rows, callback)


# ------------------------------------------------------------------ identity


def test_a_run_goes_on_as_if_it_never_had_stopped(tmp_path) -> None:
    stops = [3, 8, 13, 31]  # in mid-rollout, at a rollout's start, and beyond the total
    never = never_stopped(tmp_path, stops)
    assert len(never["tokens"]) == 32 and len(never["rows"]) == 4
    assert differences(never_stopped(tmp_path, []), never) == []  # saves change nothing
    for stop in stops:
        assert differences(never, gone_on(tmp_path, stop)) == [], stop


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_random_stops(tmp_path) -> None:
    stops = sorted(random.Random(1).sample(range(32), 20))
    never = never_stopped(tmp_path, stops)
    for stop in stops:
        assert differences(never, gone_on(tmp_path, stop)) == [], stop


def test_stopped_three_times_in_a_row(tmp_path) -> None:
    stops = [5, 6, 20]
    never = never_stopped(tmp_path / "never", stops)
    model, rows, done = make_model(make_env()), [], False
    for stop in stops:
        callback = Watch(tmp_path, [stop])
        callback.stop_now = True
        rows += run(model, TOTAL, callback, go_on=done)
        model = TokenPPO.load(tmp_path / str(stop), make_env(), "cpu", learning_rate=decay)
        done = True
    callback = Watch(tmp_path, [])
    rows += run(model, TOTAL, callback, go_on=True)
    assert repr(rows) == repr(never["rows"])
    assert differences(never, result(model, tmp_path / "end", rows[-2:], callback)) == []


def test_a_save_within_a_callbacks_step_is_as_after_that_step(tmp_path) -> None:
    stops = [5, 16, 32]  # 16 and 32 are the last of a rollout, whose update is still to come
    never = never_stopped(tmp_path, stops, at="step")
    for stop in stops[:2]:
        assert differences(never, gone_on(tmp_path, stop)) == [], stop
    end = gone_on(tmp_path, 32)
    assert [d for d in differences(never, end) if d != "tokens"] == []  # no token was left


def held_env():
    return make_env(4, group_size=2, autoreset=False)


def monitored_env():
    return VecMonitor(make_vec_env(letters_env, n_envs=3))


def letters_env():
    return gym.make(
        "TextEnvironment-v0",
        tokenizer=letter_tokenizer("abcdef"),
        prompts=[">", ">>", ">a>", ">bb>"],
        reward_fn=count_a,
        max_new_tokens=6,
        min_new_tokens=2,
    )


def deep(**kwargs) -> dict:
    return {"policy_kwargs": {"lm": tiny_gpt2(9, width=16, layers=3), **kwargs}}


@pytest.mark.parametrize(
    ("algorithm", "env", "changes"),
    [
        (TokenRLOO, held_env, {}),
        (TokenGRPO, held_env, deep(trainable_layers=1)),
        (TokenA2C, make_env, {"batch_size": None, "ref_lm": "other"}),
        (TokenPPO, make_env, {"value_warmup": 2, **deep(lora={"r": 2}, value_lm="other")}),
        (TokenPPO, monitored_env, {"policy_kwargs": {"optimizer_class": th.optim.SGD}}),
        (TokenPPO, held_env, {"whole_episodes": True, **deep(trainable_layers=1)}),
    ],
    ids=["rloo", "grpo-frozen", "a2c-reference", "lora-value", "sgd-monitored", "whole-frozen"],
)
def test_all_relatives_go_on(tmp_path, algorithm, env, changes) -> None:
    changes = copy.copy(changes)
    if "batch_size" in changes:
        changes = {"n_steps": 8, "ref_lm": tiny_gpt2(9, width=16, seed=5)}
    model = make_model_of(algorithm, env(), changes)
    callback = Watch(tmp_path, [12])
    rows = run(model, TOTAL, callback)
    never = result(model, tmp_path / "end", rows, callback)
    assert differences(never, gone_on(tmp_path, 12, algorithm, env)) == []


def make_model_of(algorithm, env, changes):
    kwargs = dict(changes.pop("policy_kwargs", {}))
    if kwargs.get("value_lm") == "other":
        kwargs["value_lm"] = tiny_gpt2(9, width=16, seed=3)
    if algorithm is TokenA2C:
        kwargs = {"lm": tiny_gpt2(9, width=16), **kwargs}
        return TokenA2C(
            "CausalLMPolicy", env, learning_rate=decay, seed=0, device="cpu",
            policy_kwargs=kwargs, **changes,
        )  # fmt: skip
    return make_model(env, algorithm, policy_kwargs=kwargs, **changes)


def without_b(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    return [float("nan") if "b" in c else float(c.count("a")) for c in completions]


def bad_scores_env():
    return make_env(reward_fn=without_b, nonfinite_scores="pass")


def test_what_was_skipped_and_what_the_doctor_saw_go_on(tmp_path) -> None:
    limits = {"window": 1, "min_episodes": 2, "still": 1e9}
    stops = [3, 8, 13, 29]
    model = make_model(bad_scores_env(), on_nonfinite="skip")
    callback, doctor = Watch(tmp_path, stops), DoctorCallback(tmp_path / "doctor.jsonl", **limits)
    rows = run(model, TOTAL, callback, False, doctor)
    never = result(model, tmp_path / "end", rows, callback)
    assert model.nonfinite_skipped > 0 and model.policy.guard.n_steps > 0
    assert doctor.findings != []
    for stop in stops:
        model = TokenPPO.load(tmp_path / str(stop), bad_scores_env(), "cpu", learning_rate=decay)
        callback, again = Watch(tmp_path / "again", []), DoctorCallback(**limits)
        rows = run(model, TOTAL, callback, True, again)
        assert differences(never, result(model, tmp_path / "found", rows, callback)) == [], stop
        assert again.findings == doctor.findings and again.seen == doctor.seen


def test_a_rollout_that_is_loaded_at_its_last_step_names_what_is_not_finite(tmp_path) -> None:
    model = make_model(bad_scores_env(), on_nonfinite="skip")
    run(model, TOTAL, Watch(tmp_path, [8], at="step"))
    with pytest.warns(UserWarning, match="on_nonfinite: 'skip' in the checkpoint, 'raise' from"):
        model = TokenPPO.load(
            tmp_path / "8", bad_scores_env(), "cpu", learning_rate=decay, on_nonfinite="raise"
        )
    with pytest.raises(NonFiniteError, match=r"reward: .* in the text '.*', at step 24"):
        model.learn(TOTAL, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="expected on_nonfinite"):
        TokenPPO.load(tmp_path / "8", learning_rate=decay, on_nonfinite="ignore")


def test_a_run_that_the_doctor_stops_stops_at_the_same_token(tmp_path) -> None:
    def doctor() -> DoctorCallback:
        return DoctorCallback(stop_on=["constant_score"], window=1, min_episodes=1)

    def constant_env():
        return make_env(reward_fn=lambda prompts, completions, **_: [1.0] * len(prompts))

    model = make_model(constant_env())
    run(model, TOTAL, Watch(tmp_path, [8]), False, doctor())
    assert model.num_timesteps == 27  # at the first step after the update
    model.save(tmp_path / "end")
    model = TokenPPO.load(tmp_path / "8", constant_env(), "cpu", learning_rate=decay)
    run(model, TOTAL, Watch(tmp_path, []), True, doctor())
    assert model.num_timesteps == 27
    model = TokenPPO.load(tmp_path / "end", constant_env(), "cpu", learning_rate=decay)
    run(model, TOTAL, Watch(tmp_path, []), True, doctor())
    assert model.num_timesteps > 27  # another rollout, which shows the same


# ------------------------------------------------------------------ each item counts


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that never stopped, and its checkpoint three steps before its last update."""
    folder = tmp_path_factory.mktemp("stopped")
    never = never_stopped(folder, [29])
    state, tensors = read_checkpoint(folder / "29")
    return folder, never, state, tensors


CLOCK = ("seconds", "t")
"""Items that are of the clock: two runs differ in them anyway."""


def items(state, tensors) -> list[tuple]:
    """All that is stored: places in the state, and tensors."""
    found = [place for place, _ in leaves(state) if place[-1] not in CLOCK and place[0] != "facts"]
    return found + [("tensors", file, name) for file in tensors for name in tensors[file]]


def noticed(stopped, place: tuple) -> bool:
    """Change one stored item, go on from there, and say whether anything comes of it."""
    folder, never, state, tensors = stopped
    state, tensors = copy.deepcopy(state), {file: dict(part) for file, part in tensors.items()}
    inner = tensors if place[0] == "tensors" else state
    for key in place[1 if place[0] == "tensors" else 0 : -1]:
        inner = inner[key]
    inner[place[-1]] = perturbed(inner[place[-1]])
    write_checkpoint(folder / "changed", state, tensors)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return differences(never, gone_on(folder, "changed")) != []
    except Exception:  # refused: by us, or by what the value is given to
        return True


def test_the_unchanged_checkpoint_is_green(stopped) -> None:
    folder, never, state, tensors = stopped
    write_checkpoint(folder / "changed", state, tensors)
    assert differences(never, gone_on(folder, "changed")) == []


def test_a_change_in_each_part_turns_the_identity_red(stopped) -> None:
    """One item of each part here; the slow test takes every item there is."""
    _, _, state, tensors = stopped
    parts: dict[tuple, tuple] = {}
    for place in items(state, tensors):
        parts.setdefault(place[: 2 if place[0] in ("tensors", "progress") else 1], place)
    assert {"optimizer", "random", "environment", "rollout", "callbacks", "logger", "kl"} <= {
        part[0] for part in parts
    }
    assert [place for place in parts.values() if not noticed(stopped, place)] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_change_of_any_stored_item_turns_the_identity_red(stopped) -> None:
    _, _, state, tensors = stopped
    every = items(state, tensors)
    assert len(every) > 200
    idle = {("optimizer", "groups", 0, "decoupled_weight_decay")}  # of a weight decay that is 0
    assert {place for place in every if not noticed(stopped, place)} <= idle


# ------------------------------------------------------------------ SB3's names


def test_nothing_is_pickled(tmp_path, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("pickled")

    model = make_model(make_env())
    model.learn(24)
    for name in ("dumps", "dump", "loads", "load", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(th, "save", refuse)
    monkeypatch.setattr(th, "load", refuse)
    model.save(tmp_path / "model")
    loaded = TokenPPO.load(tmp_path / "model", make_env(), "cpu", learning_rate=decay)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {
        "manifest.json", "state.json", "policy.safetensors", "optimizer.safetensors",
        "reference.safetensors", "random.safetensors", "rollout.safetensors",
    }  # fmt: skip
    for part in ("policy", "reference"):
        a, b = getattr(model, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(a[name].equal(b[name]) for name in a), part


def test_a_zip_of_sb3s_is_only_loaded_when_asked_to(tmp_path) -> None:
    model = make_model(make_env(), learning_rate=1e-3)
    model.learn(24)
    PPO.save(model, tmp_path / "model")
    assert (tmp_path / "model.zip").exists()
    for load in (TokenPPO.load, model.set_parameters):
        with pytest.raises(ValueError, match=r"holds pickles: .* Set allow_pickle if"):
            load(tmp_path / "model.zip")
    loaded = TokenPPO.load(tmp_path / "model", allow_pickle=True, device="cpu")
    assert loaded.policy.value_head.weight.equal(model.policy.value_head.weight)
    model.set_parameters(tmp_path / "model", allow_pickle=True)


def test_set_parameters_takes_a_checkpoint(tmp_path) -> None:
    model, other = make_model(make_env()), make_model(make_env(), seed=4)
    model.learn(24)
    model.save(tmp_path / "model")
    other.set_parameters(tmp_path / "model")
    a, b = model.get_parameters(), other.get_parameters()
    assert all(a["policy"][name].equal(b["policy"][name]) for name in a["policy"])
    assert b["policy.optimizer"]["state"]


def test_sb3s_checkpoint_callback_makes_them(tmp_path) -> None:
    make_model(make_env()).learn(24, callback=CheckpointCallback(2, str(tmp_path)))
    saved = sorted(tmp_path.iterdir())
    assert len(saved) == 4
    for path in saved[:2]:
        loaded = TokenPPO.load(path, make_env(), "cpu", learning_rate=decay)
        assert f"_{loaded.num_timesteps}_steps" in path.name
        loaded.learn(48, reset_num_timesteps=False)
        assert loaded.num_timesteps == 48


def test_a_loaded_model_can_be_saved_again_unchanged(tmp_path) -> None:
    never_stopped(tmp_path, [13])
    for env in (make_env(), None):
        TokenPPO.load(tmp_path / "13", env, "cpu", learning_rate=decay).save(tmp_path / "again")
        assert (tmp_path / "again/state.json").read_bytes() == (
            tmp_path / "13/state.json"
        ).read_bytes()
        assert (tmp_path / "again/manifest.json").read_bytes() == (
            tmp_path / "13/manifest.json"
        ).read_bytes()


def test_after_a_finished_training_totals_mean_what_they_do_in_sb3(tmp_path) -> None:
    model = make_model(make_env(), learning_rate=LinearSchedule(1e-3, 0.0, 1.0), kl_coef=0.1)
    model.learn(24)
    model.save(tmp_path / "model")
    loaded = TokenPPO.load(tmp_path / "model", make_env(), "cpu")
    loaded.learn(24, reset_num_timesteps=False)
    assert loaded.num_timesteps == 48
    assert loaded.policy.optimizer.param_groups[0]["lr"] >= 0
    assert repr(loaded.learning_rate) == repr(model.learning_rate)
    again = TokenPPO.load(tmp_path / "model", make_env(2), "cpu", force_reset=True)
    again.learn(16)
    assert again.num_timesteps == 16


# ------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    never_stopped(folder, [13])
    return folder / "13"


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"learning_rate was a Python callable.*expected load\(…, learning_rate=", {}),
        ("learning_rate: .* 0.01 in the checkpoint, 0.5 given", {"learning_rate": lambda p: 0.5}),
        ("environment of 3 rows, as in the checkpoint, got 2", {"env": 2}),
        ("same prompts and tokenizer, got another's", {"env": {"prompts": [">a>>", ">b"]}}),
        ("same task, .*'missing_eos_penalty': 1", {"env": {"missing_eos_penalty": 1.0}}),
        ("same task, .*'allowed tokens'", {"env": {"allowed_token_ids": [0, 1]}}),
        ("same task, .*'nonfinite_scores': 'pass'", {"env": {"nonfinite_scores": "pass"}}),
        ("same task, .*'end tokens': ", {"env": {"eos_token_ids": [0]}}),
        ("same task, .*'skip_special_tokens': F", {"env": {"skip_special_tokens": False}}),
        ("one of autoreset=False, got True", {"env": {"autoreset": False}}),
        ("same task, .*'group_size': 3", {"env": {"group_size": 3}}),
        ("another run; reward: 'a' there, 'b' here", {"facts": {"reward": "b"}}),
    ],
)
def test_what_differs_is_refused_by_name(saved, tmp_path, message, changes) -> None:
    state, tensors = read_checkpoint(saved)
    write_checkpoint(tmp_path / "model", {**state, "facts": {"reward": "a"}}, tensors)
    env = changes.pop("env", {}) if isinstance(changes, dict) else {}
    env = make_env(env) if isinstance(env, int) else make_env(3, **{"prompts": PROMPTS, **env})
    given = {"learning_rate": decay} if "callable" not in message else {}
    with pytest.raises(ValueError, match=message):
        TokenPPO.load(tmp_path / "model", env, "cpu", **{**given, **changes})


PROMPTS = [">", ">>", ">a>", ">bb>"]


def test_other_algorithms_and_arguments_are_refused_by_name(saved, tmp_path) -> None:
    with pytest.raises(ValueError, match="a checkpoint of TokenA2C, got one of TokenPPO"):
        TokenA2C.load(saved, learning_rate=decay)
    with pytest.raises(TypeError, match=r"arguments of TokenPPO, got \['n_epoch'\]"):
        TokenPPO.load(saved, learning_rate=decay, n_epoch=3)
    with pytest.warns(UserWarning, match="n_epochs: 2 in the checkpoint, 3 from now on"):
        TokenPPO.load(saved, learning_rate=decay, n_epochs=3, device="cpu")
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        TokenPPO.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="expected no exclude and include"):
        make_model(make_env()).save(tmp_path / "model", exclude=["policy"])


def test_totals_that_leave_nothing_to_do_are_refused(saved) -> None:
    model = TokenPPO.load(saved, make_env(), "cpu", learning_rate=decay)
    with pytest.raises(ValueError, match="stopped at 39 of 80 tokens: expected total_timesteps"):
        model.learn(24, reset_num_timesteps=False)
    with pytest.warns(UserWarning, match="total_timesteps: 80 in the checkpoint, 60 from now on"):
        model.learn(60, reset_num_timesteps=False)
    assert model.num_timesteps == 72


def test_another_machine_is_named(saved, tmp_path) -> None:
    state, tensors = read_checkpoint(saved)
    state["machine"] = {**state["machine"], "threads": 7}
    write_checkpoint(tmp_path / "model", state, tensors)
    with pytest.warns(UserWarning, match=r"threads 7 \(now 1\): training goes on, but not"):
        TokenPPO.load(tmp_path / "model", learning_rate=decay, device="cpu")


@pytest.mark.parametrize(
    ("env", "changes"),
    [(make_env, {}), (held_env, {"whole_episodes": True})],
    ids=["cut", "held"],
)
def test_a_buffer_knows_what_was_seen_at_each_step(env, changes) -> None:
    model, seen = make_model_of(TokenPPO, env(), changes), Seen()
    model.learn(TOTAL, callback=seen)
    assert len(seen.pairs) >= 24 and all((obs == made).all() for obs, made in seen.pairs)
