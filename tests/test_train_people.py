"""The commands that bring people in: annotate, feedback, compare, loop; with tiny local models."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console
from test_train import finished, own  # noqa: F401
from test_train_resume import stop_in

import train
from reward_models import read_feedback
from reward_models.feedback import Accounts, FeedbackStore

ROOT = Path(train.__file__).parent


@pytest.fixture
def run(finished, tmp_path) -> Path:  # noqa: F811
    """A run folder with what is needed of a finished one."""
    for name in ("sft", "policy", "reward_model", "judge", "stages"):
        (tmp_path / name).symlink_to(finished / name)
    return tmp_path


def command(line: str, run: Path) -> int:
    return train.main([*line.split(), "--run", str(run), "--device", "cpu", "--dtype", "float32"])


def keys(monkeypatch, *typed: str) -> None:
    """Type these at the terminal, then Ctrl-D."""
    waiting = iter(typed)

    def read(self, *args, **kwargs) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Console, "input", read)


def test_from_samples_to_answers_to_a_file_and_away(run, own, monkeypatch, capsys) -> None:  # noqa: F811
    keys(monkeypatch, "1", "2", "t")
    line = f"annotate --terminal true --annotator Ann --prompts {own}/prompts.txt --n_prompts 6"
    assert command(line, run) == 0
    assert "6 new tasks" in capsys.readouterr().out
    assert command(f"feedback export {run}/answers.jsonl", run) == 0
    records = read_feedback(run / "answers.jsonl")
    assert [record.tie for record in records] == [False, False, True]
    assert {record.origin for record in records} == {f"{run}/policy"}
    assert "Ann" not in (run / "answers.jsonl").read_text()
    keys(monkeypatch, "1")  # what is asked already is not sampled anew
    assert command("annotate --terminal true --annotator Ann", run) == 0
    assert command(f"feedback export {run}/answers.jsonl", run) == 1
    assert "pass --overwrite true" in capsys.readouterr().err
    line = f"feedback export {run}/answers.jsonl --ties false --overwrite true"
    assert command(line, run) == 0
    assert len(read_feedback(run / "answers.jsonl")) == 3
    assert command("feedback forget Ann", run) == 0
    assert "4 answers erased" in capsys.readouterr().out
    assert command("feedback forget Ann", run) == 1
    assert command(f"feedback import {run}/answers.jsonl", run) == 0
    assert "3 new answers of 3" in capsys.readouterr().out


@pytest.mark.slow
def test_two_policies_side_by_side_the_disputed_first(run, own, monkeypatch, capsys) -> None:  # noqa: F811
    line = f"reward --members 2 --model {own}/encoder --feedback {own}/feedback.jsonl --epochs 1"
    assert command(line, run / "more") == 0
    keys(monkeypatch)
    line = f"annotate --terminal true --prompts {own}/prompts.txt --against {run}/sft --samples 1 "
    assert command(line + f"--ensemble {run}/more/reward_model", run) == 0
    with FeedbackStore(run / "feedback.sqlite") as store:
        tasks = [store.next_task("somebody").task]
    assert set(tasks[0].origins) == {f"{run}/policy", f"{run}/sft"}
    assert 0 < tasks[0].uncertainty <= 0.5
    assert command(f"annotate --terminal true --ensemble {run}/more/reward_model", run) == 1
    assert "expected tasks, policy or prompts beside ensemble" in capsys.readouterr().err


def test_two_policies_are_compared_and_not_rated(run, capsys) -> None:
    assert command(f"annotate --terminal true --kind rating --against {run}/sft", run) == 1
    assert "expected kind comparison with against, got rating" in capsys.readouterr().err


def test_ratings_as_a_table(run, capsys) -> None:
    (run / "given.csv").write_text("prompt,completion,rating\nThe film, is good,5\nIt, drags,1\n")
    assert command(f"feedback import {run}/given.csv", run) == 0
    assert command(f"feedback export {run}/out.csv", run) == 0
    assert " is good" in (run / "out.csv").read_text()
    assert command(f"feedback export {run}/none.csv --store {run}/no.sqlite", run) == 1
    assert "`python train.py annotate` or `feedback import` makes" in capsys.readouterr().err


def test_the_page_is_served_and_ends_with_ctrl_c(run, own) -> None:  # noqa: F811
    pytest.importorskip("fastapi")
    (run / "tasks.jsonl").write_text('{"prompt": "It", "completions": [" is good", " is bad"]}\n')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = f"train.py annotate --run {run} --tasks {run}/tasks.jsonl --port {port}"
    server = subprocess.Popen(
        [sys.executable, *line.split()], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    server.stdin.write("ann\na long password\na long password\n")
    server.stdin.close()
    page = ""
    for _ in range(300):
        try:
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/sign-in").read().decode()
            break
        except urllib.error.URLError:
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.1)
    server.send_signal(2)
    out = server.stdout.read()
    assert server.wait(20) in (0, 130)
    assert "assword" in page and f"http://127.0.0.1:{port}/" in out
    with Accounts(run / "feedback.sqlite") as accounts:
        assert accounts.verify("ann", "a long password") is not None


def test_compare_says_who_wins_and_asks_people_too(run, own, capsys) -> None:  # noqa: F811
    line = f"compare {run}/policy {run}/sft --prompts {own}/prompts.txt"
    assert command(line + " --ask true", run) == 0
    said = capsys.readouterr().out
    assert "judge: " in said and "reward_model: " in said and "new tasks" in said
    with FeedbackStore(run / "compare.sqlite") as store:
        while (asked := store.next_task("ann")) is not None:  # always for the first policy
            second = asked.task.origins.index(f"{run}/policy") == 1
            store.answer(asked.id, "ann", "right" if second != asked.swapped else "left")
    assert command(line, run) == 0
    found = json.loads((run / "compare.json").read_text())["win_rate"]
    assert found["people"][0] == 1
    assert 0 <= found["judge"][1] <= found["judge"][0] <= found["judge"][2] <= 1
    _, low, _, n = found["people"]
    line = f"compare {run}/sft {run}/policy --prompts {own}/prompts.txt"
    assert command(line, run) == 0
    found = json.loads((run / "compare.json").read_text())["win_rate"]
    assert found["people"][0] == 0 and found["people"][2:] == [pytest.approx(1 - low), n]


def loop_line(own: Path, rounds: int, people: str) -> str:  # noqa: F811
    return (
        f"loop --rounds {rounds} --comparisons 8 --people {people} "
        f"--sft.model {own}/lm --sft.texts {own}/texts.txt --sft.trainable_layers null "
        f"--judge.model {own}/encoder --judge.feedback {own}/feedback.jsonl "
        f"--judge.judge_feedback {own}/feedback.jsonl --reward.model {own}/encoder "
        f"--reward.held_out 0.3 --ppo.prompts {own}/prompts.txt --ppo.total_timesteps 128 "
        "--ppo.n_envs 8 --ppo.trainable_layers null --ppo.max_new_tokens 8 "
        f"--ppo.min_new_tokens 1 --evaluate.prompts {own}/prompts.txt --evaluate.best_of 1"
    )


def test_a_loop_with_simulated_people_goes_on_where_it_was(own, tmp_path) -> None:  # noqa: F811
    assert command(loop_line(own, 1, "simulated"), tmp_path) == 0
    weights = tmp_path / "round-1" / "policy" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    facts = tmp_path / "round-1" / "stages" / "evaluate.json"
    facts.unlink()  # as if it had been killed just before the end of the round
    assert command(loop_line(own, 2, "simulated"), tmp_path) == 0
    assert facts.exists()
    assert weights.stat().st_mtime_ns == written
    report = (tmp_path / "loop.md").read_text()
    assert "| 0 | 0 |" in report and "| 2 | " in report
    assert (tmp_path / "loop.png").stat().st_size > 5000
    one, two = (read_feedback(tmp_path / f"round-{i}" / "feedback.jsonl") for i in (1, 2))
    assert len(two) > len(one) >= 8 and two[: len(one)] == one
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        assert store.count_tasks() == 2 * 8  # nothing is left over for a later round
    config = json.loads((tmp_path / "round-2" / "stages" / "ppo.json").read_text())
    assert config["tokens"] >= 128


@pytest.mark.slow
def test_simulated_people_can_be_weighed_by_their_agreement(own, tmp_path) -> None:  # noqa: F811
    line = loop_line(own, 1, "simulated").replace("--comparisons 8", "--comparisons 12")
    assert command(line + " --reward.weigh_annotators true", tmp_path) == 0
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        assert all(store.next_task(f"simulated-{i}") is None for i in (1, 2, 3))


@pytest.mark.slow
def test_a_loop_waits_for_people_and_goes_on_in_mid_training(
    own,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
) -> None:
    line = loop_line(own, 1, "real")
    assert command(line, tmp_path) == 0
    assert "0 of 8 comparisons have an answer" in capsys.readouterr().out
    assert not (tmp_path / "round-1" / "reward_model").exists()
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        while (asked := store.next_task("ann")) is not None:
            store.answer(asked.id, "ann", "left")
    with monkeypatch.context() as patch:
        stop_in(patch, 1)
        assert command(line, tmp_path) == 143
    assert (
        "stopped by SIGTERM" in (said := capsys.readouterr().out) and ": the same command" in said
    )
    assert not (tmp_path / "round-1" / "policy").exists()
    assert command(line, tmp_path) == 0
    assert "from " in capsys.readouterr().out
    assert (tmp_path / "round-1" / "policy").exists() and (tmp_path / "loop.md").exists()
