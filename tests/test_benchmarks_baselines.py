"""The baseline benchmark: its statistics by hand, its tasks by simulation, its grid's life."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import baselines
from benchmarks.algorithms import LEARNERS, Budget, reference
from benchmarks.baselines import CONFIG, Job, candidates, choose, grid, run, take_over
from benchmarks.baselines_report import write_report
from benchmarks.small_runs import run_small
from benchmarks.small_tasks import CLASSES, LETTERS, PATTERN, Enumeration
from benchmarks.statistics import (
    bootstrap_interval,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)

# ------------------------------------------------------------------------------ statistics


def test_interquartile_mean_by_hand() -> None:
    """Of 8 values, the 2 lowest and the 2 highest go; of 10, 2 and 2 too (a quarter is 2.5)."""
    assert interquartile_mean(np.array([[7, 0], [1, 6], [2, 5], [4, 3]])) == 3.5
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, 7, 8, -50])) == 4.5


def test_bootstrap_draws_within_each_task() -> None:
    """Constant tasks leave nothing to chance; drawing over both would."""
    scores = np.tile([0.0, 1.0], (5, 1))
    assert bootstrap_interval(scores) == (0.5, 0.5)
    low, high = bootstrap_interval(np.random.default_rng(0).normal(size=(50, 1)), np.mean)
    assert (low, high) == pytest.approx((-1.96 / 50**0.5, 1.96 / 50**0.5), abs=0.15)


def test_probability_of_improvement_by_hand() -> None:
    """1, 2, 3 against 0, 2, 2, pair by pair: 1 + (1 + ½ + ½) + 3 of 9."""
    one, two = np.array([[1.0], [2.0], [3.0]]), np.array([[0.0], [2.0], [2.0]])
    assert probability_of_improvement(one, two) == pytest.approx(6 / 9)
    assert probability_of_improvement(two, one) == pytest.approx(3 / 9)


def test_performance_profile_by_hand() -> None:
    scores = np.array([[0.1, 0.5], [0.5, 0.9]])
    np.testing.assert_allclose(performance_profile(scores, np.array([0, 0.5, 0.9])), [1, 0.25, 0])


# ----------------------------------------------------------------------------------- tasks

REFERENCE = LETTERS.from_lm(reference(LETTERS))
ENUMERATION = Enumeration(LETTERS, REFERENCE)


def test_every_completion_is_there_once() -> None:
    assert len(set(ENUMERATION.completions)) == 1 + 6 + 36 + 216 + 6**4
    assert np.exp(ENUMERATION.log_ref).sum() == pytest.approx(1, abs=1e-6)
    assert ENUMERATION.gain(ENUMERATION.log_ref) == pytest.approx(0, abs=1e-9)


def test_the_optimum_is_reached_by_the_tilted_reference_and_by_nothing_else() -> None:
    best = ENUMERATION.log_ref + ENUMERATION.scores / LETTERS.beta
    best -= np.logaddexp.reduce(best)
    assert ENUMERATION.gain(best) == pytest.approx(1)
    generator = np.random.default_rng(0)
    for _ in range(20):
        other = best + generator.normal(scale=0.3, size=len(best))
        assert ENUMERATION.gain(other - np.logaddexp.reduce(other)) < 1


def test_expectations_agree_with_what_is_written() -> None:
    """20,000 completions of the reference: the standard error of the mean is about 0.007."""
    exact = ENUMERATION.mean_score(ENUMERATION.log_ref)
    assert LETTERS.mean_score(REFERENCE, 20_000) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("n", [1, 4])
def test_best_of_n_agrees_with_simulation(n: int) -> None:
    log_p = ENUMERATION.best_of(n)
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-6)
    rounds = [LETTERS.scores(LETTERS.write(REFERENCE, 4000, seed)) for seed in range(n)]
    mean = np.max(rounds, axis=0).mean()
    assert ENUMERATION.mean_score(log_p) == pytest.approx(mean, abs=0.06)
    assert ENUMERATION.kl(log_p) <= np.log(n) - (n - 1) / n + 1e-6  # Beirami et al. 2024


def test_a_policy_of_no_chance_at_all() -> None:
    always = np.eye(7)[3]
    log_p = ENUMERATION.log_probs(lambda obs: np.tile(always, (len(obs), 1)))
    assert ENUMERATION.completions[int(log_p.argmax())] == (3, 3, 3, 3)
    assert ENUMERATION.mean_score(log_p) == -2  # a 3 at the end, three twice in a row
    assert ENUMERATION.kl(log_p) == pytest.approx(-ENUMERATION.log_ref[int(log_p.argmax())])


def test_dense_rewards_sum_to_the_score() -> None:
    env = PATTERN.env(3)
    env.seed(0)
    env.reset()
    generator, total, ends = np.random.default_rng(0), np.zeros(3), 0
    for _ in range(40):
        _, rewards, dones, infos = env.step(generator.integers(0, 256, 3))
        total += rewards
        for row in np.flatnonzero(dones):
            assert infos[row]["score"] == pytest.approx(total[row], abs=1e-6)
            total[row], ends = 0, ends + 1
    assert ends == 6


def test_tasks_by_hand() -> None:
    assert CLASSES.score(1, [1, 5, 2, 0]) == 0.5
    assert PATTERN.score(0, [1, 2, 7, 7, 8]) == 0.8
    assert LETTERS.score(0, [2, 4, 2, 3]) == 3 and LETTERS.score(0, [0, 0]) == -2
    assert LETTERS.score(0, []) == 0


# ------------------------------------------------------------------------------ algorithms

CONFIGURED = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(CONFIGURED["algorithms"]))
def test_each_algorithm_runs_as_configured(name: str) -> None:
    """A tenth of a second or so each: it measures, moves away from the start, and stays sane."""
    algorithm = CONFIGURED["algorithms"][name]
    settings = algorithm["settings"] | algorithm["candidates"][1]
    points = run_small("letters", name, settings, 0, Budget(2500, 60))
    assert points[0]["tokens"] == 0 and points[-1]["tokens"] >= 2500 and len(points) >= 3
    assert all(p["gain"] <= 1 + 1e-6 and p["ref_kl"] >= -1e-6 for p in points)
    assert points[-1]["score"] != points[0]["score"]


@pytest.mark.parametrize("name", ["random", "reference", "greedy", "best of 4"])
@pytest.mark.parametrize("task", ["letters", "classes"])
def test_what_learns_nothing(name: str, task: str) -> None:
    (point,) = run_small(task, name, {}, 0, Budget(1, 1))
    assert point["tokens"] == 0 and np.isfinite(point["gain"])


def test_the_time_is_kept() -> None:
    algorithm = CONFIGURED["algorithms"]["A2C"]
    settings = algorithm["settings"] | algorithm["candidates"][0]
    points = run_small("letters", "A2C", settings, 0, Budget(10**7, 1.0))
    assert points[-1]["tokens"] < 10**6 and points[-1]["seconds"] < 3


# ------------------------------------------------------------------------------------ grid


def test_the_grid_is_what_the_issue_asks_for() -> None:
    assert set(CONFIGURED["algorithms"]) == set(LEARNERS) - {"random", "reference", "greedy"}
    assert all(len(a["candidates"]) == 4 for a in CONFIGURED["algorithms"].values())
    jobs = list(candidates(CONFIGURED))
    assert len({job.file for job in jobs}) == len(jobs) == 4 * (14 * 3 + 2) + 2 * 10
    chosen = {task: dict.fromkeys(CONFIGURED["algorithms"], 2) for task in CONFIGURED["budgets"]}
    jobs = list(grid(CONFIGURED, chosen, 5))
    assert len({job.file for job in jobs}) == len(jobs) and min(CONFIGURED["seeds"].values()) >= 3


def fake(job: Job) -> dict:
    """A result without the work."""
    if job.algorithm == "PPO":
        raise RuntimeError("no such luck")
    gain = job.candidate + 0.1 * job.seed
    points = [{"tokens": t, "seconds": 1.0, "score": gain, "gain": gain} for t in (0, 5)]
    return {**job.__dict__, "points": points}


class Inline:
    """A pool that works at once, in this process."""

    def __init__(self, *args) -> None:
        self.submit = partial(self._submit)

    def __enter__(self):
        return self

    def __exit__(self, *args) -> None:
        pass

    def _submit(self, function, job, movies):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(fake(job))
        except RuntimeError as error:
            future.set_exception(error)
        return future


def test_a_stopped_grid_goes_on_and_a_failed_run_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(baselines, "ProcessPoolExecutor", Inline)
    jobs = [
        Job("letters", name, 0, {"a": 1}, 10, 1.0, i) for name in ("A2C", "PPO") for i in (0, 1)
    ]
    first = run(jobs[:1], tmp_path, 1)
    file = tmp_path / jobs[0].file
    written = file.stat().st_mtime_ns
    found = run(jobs, tmp_path, 1)
    assert file.stat().st_mtime_ns == written and first[0] in found and len(found) == 2
    assert "PPO, seed 0: RuntimeError('no such luck')" in capsys.readouterr().out
    assert choose(found) == {"letters": {"A2C": 1}}
    changed = Job("letters", "A2C", 0, {"a": 2}, 10, 1.0)
    run([changed], tmp_path, 1)
    assert json.loads(file.read_text())["settings"] == {"a": 2}
    file.write_text("{")  # half a file is no result
    run([changed], tmp_path, 1)
    assert json.loads(file.read_text())["settings"] == {"a": 2}


def test_known_results_are_taken_over_if_they_are_the_same_runs(tmp_path) -> None:
    """Those behind the README's figures are all of the small tasks' grid as it is configured."""
    record = CONFIG.with_name("baselines-results.json")
    chosen = yaml.safe_load(CONFIG.with_name("baselines-chosen.yaml").read_text())
    budgets = {k: v for k, v in CONFIGURED["budgets"].items() if k != "movies"}
    jobs = list(grid(CONFIGURED | {"budgets": budgets}, chosen))
    changed = replace(jobs[0], tokens=1)
    take_over([changed, *jobs[1:]], record, tmp_path)
    assert not (tmp_path / changed.file).exists()
    assert all((tmp_path / job.file).exists() for job in jobs[1:])


def test_the_report_is_written(tmp_path) -> None:
    names = ["random", "TokenPPO", "DQN"]
    results = [
        fake(Job(task, name, seed, {}, 10, 1.0))
        for task in ("letters", "classes")
        for name in names
        for seed in range(3)
    ]
    text = write_report(results, tmp_path).read_text()
    assert "| TokenPPO | 0.10 [0.00, 0.20] | 1* |" in text and "| DQN |" in text
    assert "baselines-all.png" in text
    (one, *_) = results
    alone = write_report([one], tmp_path / ".").read_text()
    assert "baselines-all.png" not in alone  # a single run draws no summary, and that is all
    for name in ("baselines.png", "baselines-all.png", "baselines.csv", "baselines.json"):
        assert (tmp_path / name).stat().st_size > 100


def test_workers_end_with_a_parent_that_is_killed(tmp_path) -> None:
    """Else a killed benchmark's workers would go on to the end of their runs."""
    script = tmp_path / "parent.py"
    script.write_text(
        """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from benchmarks.baselines import end_with_parent
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 300).result()
"""
    )
    root = str(Path(baselines.__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")
