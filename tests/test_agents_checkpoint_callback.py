"""A run's own checkpoints: made between rollouts, at signals, and what is left of a killed run."""

import json
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
from checkpoint_fixtures import TIMES, Watch, decay, differences, make_env, make_model, result
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import JSONOutputFormat, Logger

from agents import (
    CheckpointFolderCallback,
    SampleTextCallback,
    StoppedBySignal,
    TokenPPO,
    newest_whole,
)
from agents.checkpoint import read_checkpoint, read_state
from agents.checkpoint_callback import cut_back
from agents.checkpoint_store import checkpoints_in


class Appending(JSONOutputFormat):
    def __init__(self, path: Path) -> None:
        self.file = path.open("a")


class At(BaseCallback):
    """Does something at a step, counted over all of the run."""

    def __init__(self, step: int, do) -> None:
        super().__init__()
        self.step, self.do = step, do

    def _on_step(self) -> bool:
        if self.n_calls == self.step:
            self.do()
        return True


def train(folder: Path, total: int, *further: BaseCallback, **settings) -> TokenPPO:
    """Train in a run folder: from its newest checkpoint, or from the start."""
    logs = [folder / "metrics.jsonl", folder / "samples.jsonl"]
    folder.mkdir(exist_ok=True)
    begun = bool(checkpoints_in(folder / "checkpoints"))
    if begun:
        newest = newest_whole(folder / "checkpoints")
        cut_back(newest, logs)
        model = TokenPPO.load(newest, make_env(), "cpu", learning_rate=decay)
    else:
        for log in logs:
            log.unlink(missing_ok=True)
        model = make_model(make_env())
    model.set_logger(Logger(None, [Appending(logs[0])]))
    saver = CheckpointFolderCallback(folder / "checkpoints", logs=logs, **settings)
    callbacks = [SampleTextCallback(logs[1]), *further, saver]
    if model.num_timesteps < total or model.rollout_under_way:  # not killed between end and exit
        with saver.stops_at_signals():
            model.learn(total, callback=callbacks, reset_num_timesteps=not begun)
    model.logger.close()
    return model


def logged(folder: Path) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_between_rollouts_a_save_changes_nothing_and_the_best_is_kept(tmp_path) -> None:
    never = train(tmp_path / "never", 144, every=None)
    saving = train(tmp_path / "saving", 144, keep=1)
    assert repr(logged(tmp_path / "never")) == repr(logged(tmp_path / "saving"))
    for a, b in zip(never.policy.parameters(), saving.policy.parameters(), strict=True):
        assert a.equal(b)
    assert [p.name for p in checkpoints_in(tmp_path / "never/checkpoints")] == ["step-00000144"]
    scores = {
        24 * (i + 1): r["rollout/score_mean"] for i, r in enumerate(logged(tmp_path / "never"))
    }
    best = json.loads((tmp_path / "saving/checkpoints/best.json").read_text())
    held = {tokens: scores[tokens + 24] for tokens in range(24, 144, 24)}
    assert best["value"] == max(held.values())
    assert held[int(best["checkpoint"][5:])] == best["value"]
    assert read_checkpoint(tmp_path / "saving/checkpoints" / best["checkpoint"])
    assert len(checkpoints_in(tmp_path / "saving/checkpoints")) == 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_token_and_nothing_is_lost(tmp_path, signum) -> None:
    """The never-stopped run saves where the other was stopped: `every_tokens` of 39 there."""
    before = signal.getsignal(signum)
    at = At(13, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(
        StoppedBySignal, match=f"stopped by {signal.Signals(signum).name}; "
    ) as stop:
        train(tmp_path / "a", 80, at, every=None)
    assert stop.value.signum == signum and stop.value.path.name == "step-00000039"
    assert signal.getsignal(signum) is before
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"half a li')  # what a crash later might have left
    stopped = train(tmp_path / "a", 80, every=None)
    never = train(tmp_path / "b", 80, every=None, every_tokens=39, keep=9)
    assert "step-00000039" in [p.name for p in checkpoints_in(tmp_path / "b/checkpoints")]
    assert repr(logged(tmp_path / "a")) == repr(logged(tmp_path / "b"))
    samples = [(tmp_path / run / "samples.jsonl").read_bytes() for run in "ab"]
    assert samples[0] == samples[1] and samples[0]
    assert stopped.num_timesteps == never.num_timesteps == 96


def test_logs_that_have_lost_lines_are_refused(tmp_path) -> None:
    train(tmp_path, 24)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected at least the \d+ bytes"):
        train(tmp_path, 48)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_fifty_random_moments(tmp_path) -> None:
    """kill -9: no torn checkpoint is taken, none that was reported is lost, the end is the same."""
    total, chance, kills = 24 * 40, random.Random(0), 0
    start = time.monotonic()
    train(tmp_path / "never", total)
    span = (time.monotonic() - start) / 4  # some kills come in the middle of things, some early
    round_ = 0
    while kills < 50:
        folder = tmp_path / f"run-{round_}"
        folder.mkdir(exist_ok=True)
        child = os.fork()
        if child == 0:
            reported(folder, total)
        deadline = time.monotonic() + chance.uniform(0, span)
        done = 0
        while not done and time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            assert repr(logged(folder)) == repr(logged(tmp_path / "never"))
            round_ += 1
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        acknowledged = (
            (folder / "reported").read_text().split() if (folder / "reported").exists() else []
        )
        if acknowledged:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a torn one would be warned of
                newest = newest_whole(folder / "checkpoints")
            assert int(newest.name[5:]) >= int(acknowledged[-1])
            assert read_state(newest)["progress"]["num_timesteps"] == int(newest.name[5:])
    train(tmp_path / f"run-{round_}", total)
    assert repr(logged(tmp_path / f"run-{round_}")) == repr(logged(tmp_path / "never"))


def reported(folder: Path, total: int) -> None:
    """Train in a forked process; write down each save that was reported."""
    code = 1
    try:
        saver_save = CheckpointFolderCallback.save

        def save(self) -> Path:
            path = saver_save(self)
            with (folder / "reported").open("a") as file:
                file.write(f"{int(path.name[5:])}\n")
            return path

        CheckpointFolderCallback.save = save
        train(folder, total)
        code = 0
    finally:
        os._exit(code)


def test_the_watched_run_is_the_same_with_signals_installed(tmp_path) -> None:
    """Installing handlers is no part of what is trained."""
    model = make_model(make_env())
    watch = Watch(tmp_path, [])
    saver = CheckpointFolderCallback(tmp_path / "checkpoints", every=None, best_key=None)
    with saver.stops_at_signals():
        model.learn(24, callback=[watch, saver])
    other = make_model(make_env())
    plain = Watch(tmp_path, [])
    other.learn(24, callback=[plain])
    assert watch.tokens == plain.tokens
    a, b = result(model, tmp_path / "a", [], watch), result(other, tmp_path / "b", [], plain)
    differing = [d for d in differences(a, b) if "callbacks" not in d and d != "rows"]
    assert differing == []
