"""The search for settings: its space, its objective, and that nothing is lost or done twice."""

import gc
import multiprocessing
import os
import signal
import time
import weakref
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2
from optuna.trial import TrialState

from agents import TokenPPO, tuning, tuning_report
from agents.tuning import Measured, Objective, TrialCallback
from text_env import TextVecEnv

OBJECTIVE = Objective(kl_budget=4.0, kl_weight=0.5)
BASE = {"rate": 0.1, "epochs": 2, "whole": True, "limit": None}
SPACE = "rate: {low: 1e-3, high: 1.0, log: true}\nepochs: [1, 2, 4]\n"
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    return tuning.read_space(tmp_path / "space.yaml", BASE)


def pretend(trial: optuna.Trial, place) -> SimpleNamespace:
    """A training that does best with a rate of 0.1 and 4 epochs."""
    score = trial.params["epochs"] - abs(np.log10(trial.params["rate"]) + 1)
    return SimpleNamespace(pruned=False, measured=Measured(score, 0.1, 2.0), objective=OBJECTIVE)


def search(folder, space, trials, run_trial=pretend, seed=3, settings=None) -> optuna.Study:
    first = tuning.values_inside(space, BASE)
    study = tuning.open_study(folder, settings or {"a": 1}, first, 4)
    tuning.search(study, folder, space, run_trial, trials, seed, lambda trial: None)
    return study


def tried(study) -> list[dict]:
    return [trial.params for trial in tuning.trials_of(study)]


@pytest.mark.parametrize(("ref_kl", "value"), [(0.0, 2.0), (4.0, 2.0), (5.0, 1.5), (8.0, 0.0)])
def test_only_what_is_over_the_budget_costs(ref_kl, value) -> None:
    assert OBJECTIVE(Measured(2.0, 0.1, ref_kl)) == value


def test_a_space_is_lists_and_ranges(space) -> None:
    assert (space["rate"].low, space["rate"].high, space["rate"].log) == (1e-3, 1.0, True)
    assert space["epochs"].choices == (1, 2, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pace: [1]", "expected names of rate, epochs, whole, limit, got pace"),
        ("rate: 0.3", "rate: expected a list, or {low, high}"),
        ("rate: {low: 1.0, high: 0.1}", "rate: "),
        ("rate: {low: 0, high: 1, logs: true}", r"got \['logs'\]"),
        ("epochs: {low: 0.5, high: 2}", "epochs: expected whole numbers"),
        ("epochs: [1, 2.5]", r"epochs: expected whole numbers, got \[2.5\]"),
        ("rate: []", "rate: expected plain values"),
        ("[rate]", "expected settings with what to try"),
    ],
)
def test_a_wrong_space_is_refused_by_name(tmp_path, text, message) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        tuning.read_space(tmp_path / "space.yaml", BASE)


def test_the_settings_as_they_were_are_tried_first_if_they_can_be(tmp_path, space) -> None:
    study = search(tmp_path / "a", space, 2)
    assert tried(study)[0] == {"rate": 0.1, "epochs": 2}
    assert tuning.values_inside(space, BASE | {"epochs": 3}) == {}
    assert tuning.values_inside(space, BASE | {"rate": None}) == {}
    stepped = {"epochs": optuna.distributions.IntDistribution(1, 9, step=2)}
    assert tuning.values_inside(stepped, {"epochs": 5}) == {"epochs": 5}
    assert tuning.values_inside(stepped, {"epochs": 4}) == {}


def test_a_search_that_goes_on_is_the_one_that_never_stopped(tmp_path, space) -> None:
    whole = search(tmp_path / "a", space, 14)
    search(tmp_path / "b", space, 3)
    search(tmp_path / "b", space, 12)
    parts = search(tmp_path / "b", space, 14)
    assert tried(whole) == tried(parts)
    assert len({str(params) for params in tried(whole)}) == 14
    assert tried(search(tmp_path / "c", space, 3, seed=4)) != tried(whole)[:3]
    best = tuning_report.best_of(whole)
    assert best.params["epochs"] == 4 and best.value > 3.5  # a random one: 2.3 on average
    assert tuning_report.importances(whole).keys() == set(space)
    assert sum(tuning_report.importances(whole).values()) == pytest.approx(1)


def test_a_trial_is_gone_when_the_next_one_begins(tmp_path, space) -> None:
    before: list[weakref.ref] = []

    def run_trial(trial: optuna.Trial, place) -> SimpleNamespace:
        gc.collect()
        assert not any(model() for model in before)
        watched = pretend(trial, place)
        watched.model = th.nn.Linear(1, 1)
        before.append(weakref.ref(watched.model))
        return watched

    search(tmp_path, space, 3, run_trial)
    assert len(before) == 3


def test_other_settings_are_refused(tmp_path, space) -> None:
    search(tmp_path, space, 1)
    with pytest.raises(ValueError, match="where a was 1, not 2"):
        search(tmp_path, space, 2, settings={"a": 2})


def test_a_killed_trial_is_begun_again_with_the_same_values(tmp_path, space) -> None:
    def hang(trial, place):
        if trial.number < 2:
            return pretend(trial, place)
        (tmp_path / "hanging").touch()
        time.sleep(60)

    process = FORK.Process(target=search, args=(tmp_path / "b", space, 6, hang))
    process.start()
    while not (tmp_path / "hanging").exists():
        time.sleep(0.05)
    assert tuning.open_study(tmp_path / "b", {"a": 1}, {}, 4).trials[2].state is TrialState.RUNNING
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    study = search(tmp_path / "b", space, 6)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * 2 + [TrialState.FAIL] + [TrialState.COMPLETE] * 4
    assert study.trials[3].params == study.trials[2].params
    assert tried(study) == tried(search(tmp_path / "a", space, 6))


def test_two_processes_share_a_search(tmp_path, space) -> None:
    def slow(trial, place):
        (place / str(os.getpid())).touch()
        time.sleep(0.1)
        return pretend(trial, place)

    processes = [FORK.Process(target=search, args=(tmp_path, space, 7, slow)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    study = tuning.open_study(tmp_path, {"a": 1}, {}, 4)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 7
    assert len({str(params) for params in tried(study)}) == 7
    workers = [file.name for file in tmp_path.glob("trials/*/*")]
    assert len(workers) == 7 and len(set(workers)) == 2


def test_a_trial_that_ends_while_it_is_looked_at_is_not_run_again(
    tmp_path, space, monkeypatch
) -> None:
    study = tuning.open_study(tmp_path, {"a": 1}, {}, 4)
    other = study.ask(dict(space))
    let_go, locked = [], tuning.one_process

    def one_process(place):
        if not let_go:  # of the other process's trial, which has just ended
            let_go.append(place)
            study.tell(other, 0.5)
        return locked(place)

    monkeypatch.setattr(tuning, "one_process", one_process)
    tuning.search(study, tmp_path, space, pretend, 2, 0, lambda _: None)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2


def test_a_trial_that_fails_counts_and_the_first_is_an_error(tmp_path, space) -> None:
    def fail(trial, place):
        if trial.number in failing:
            raise FloatingPointError("expected finite\nlogits, got nan")
        return pretend(trial, place)

    failing = [0]
    with pytest.raises(FloatingPointError):
        search(tmp_path / "a", space, 3, fail)
    failing = [1]
    study = search(tmp_path / "b", space, 3, fail)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    report = tuning_report.as_markdown(study, OBJECTIVE, "10 tokens each")
    assert "expected finite logits, got nan" in report and "3 trials: 10 tokens each" in report
    assert "the settings as they were had" in report and "from 12 trials on" in report
    assert tuning_report.picture(study).get_axes()


def train(callback: list, total_timesteps: int = 96) -> TokenPPO:
    env = TextVecEnv(
        num_envs=4,
        tokenizer=letter_tokenizer("abcd"),
        prompts=[">"],
        reward_fn=lambda prompts, completions, **_: [c.count("a") / 4 for c in completions],
        max_new_tokens=6,
    )
    model = TokenPPO(
        "CausalLMPolicy", env, 1e-2, n_steps=6, batch_size=24, n_epochs=2, seed=0, device="cpu",
        policy_kwargs={"lm": tiny_gpt2(7)},
    )  # fmt: skip
    return model.learn(total_timesteps, callback=callback)


def test_measuring_leaves_the_training_as_it_is_and_pruning_stops_it() -> None:
    seen = []

    def measure(policy) -> Measured:
        seen.append(th.rand(7).tolist())  # as sampling would
        return Measured(-1.0, 0.0, 0.0)

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(-2.0))
    watched = TrialCallback(study.ask(), measure, OBJECTIVE, 96, 4)
    with_it, without = train([watched]), train([])
    for a, b in zip(with_it.policy.parameters(), without.policy.parameters(), strict=True):
        assert th.equal(a, b)
    assert len(seen) == 4 and all(numbers == seen[0] for numbers in seen)
    assert not watched.pruned
    assert watched.trial.user_attrs["share"] == 1.0

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(0.0))
    trial = study.ask()
    watched = TrialCallback(trial, measure, OBJECTIVE, 96, 4)
    model = train([watched])
    assert watched.pruned and 24 <= model.num_timesteps < 96
    reported = study._storage.get_trial(trial._trial_id).intermediate_values
    assert list(reported.values()) == [-1.0] and trial.user_attrs["share"] < 1
    with pytest.raises(FloatingPointError, match="finite measurement"):
        train([TrialCallback(study.ask(), lambda _: Measured(np.nan, 0, 0), OBJECTIVE, 96, 1)])
