"""The commands that bring people in: annotate, feedback, compare, loop; with tiny local models."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_train import finished, own  # noqa: F401
from test_train_resume import stop_in

import reward_models
import train
from reward_models import read_feedback
from reward_models.feedback import Accounts, FeedbackStore, Task
from stages import compare, people
from stages.report import people_section
from stages.writing import Samples

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
    assert "4 answers erased, and the account ann" in capsys.readouterr().out
    assert command("feedback forget Ann", run) == 1
    assert command(f"feedback import {run}/answers.jsonl", run) == 0
    assert "3 new answers of 3" in capsys.readouterr().out


def test_a_kind_that_the_store_has_no_task_of_is_sampled(run, own, monkeypatch, capsys) -> None:  # noqa: F811
    (run / "tasks.jsonl").write_text(json.dumps({"prompt": "A", "completions": ["b", "c"]}))
    keys(monkeypatch, "1")
    assert command(f"annotate --terminal true --tasks {run}/tasks.jsonl", run) == 0
    asked = "sampled and not comparisons again"
    monkeypatch.setattr(people, "tasks_to_ask", lambda *_: [Task("rating", "A", (asked,))])
    capsys.readouterr()
    keys(monkeypatch)
    assert command("annotate --terminal true --kind rating", run) == 0
    assert "1 new tasks" in capsys.readouterr().out
    for line in ("annotate --terminal true --kind rating", "annotate --terminal true"):
        assert command(line, run) == 0
        out = capsys.readouterr().out
        assert asked in out and "new tasks" not in out


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
        undisputed = [replace(task, uncertainty=0.0) for task in store.unanswered()]
        store.add([*undisputed, Task("rating", "The film", (" is good",))])
    capsys.readouterr()
    assert command(f"annotate --terminal true --ensemble {run}/more/reward_model", run) == 0
    assert f"{len(undisputed) + 1} tasks without all their answers put in order" in (
        capsys.readouterr().out
    )
    with FeedbackStore(run / "feedback.sqlite") as store:
        assert all(task.uncertainty > 0 for task in store.unanswered())


def test_two_policies_are_compared_and_not_rated(run, capsys) -> None:
    assert command(f"annotate --terminal true --kind rating --against {run}/sft", run) == 1
    assert "expected kind comparison with against, got rating" in capsys.readouterr().err


def test_ratings_as_a_table(run, capsys) -> None:
    (run / "given.csv").write_text("prompt,completion,rating\nThe film, is good,5\nIt, drags,1\n")
    assert command(f"feedback import {run}/given.csv", run) == 0
    assert command(f"feedback export {run}/out.csv", run) == 0
    assert " is good" in (run / "out.csv").read_text()
    assert command(f"feedback export {run}/other.csv --kind comparison", run) == 1
    assert "expected a .jsonl file for comparisons" in capsys.readouterr().err
    assert not (run / "other.csv").exists()
    assert command(f"feedback export {run}/none.csv --store {run}/no.sqlite", run) == 1
    assert "`python train.py annotate` or `feedback import` makes" in capsys.readouterr().err


def chosen(n: int) -> str:
    """Comparisons by two people of pairs that differ in one word, as JSON lines."""
    rows = (
        {
            "prompt": f"Film number {i}",
            "chosen": " is good",
            "rejected": " is bad",
            "annotator": ("ann", "ben")[i % 2],
            "origin": "us",
        }
        for i in range(n)
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_how_many_more_answers_are_worth_it(own, tmp_path, capsys) -> None:  # noqa: F811
    (tmp_path / "answers.jsonl").write_text(chosen(50))
    assert command(f"feedback import {tmp_path}/answers.jsonl", tmp_path) == 0
    line = f"feedback worth --model {own}/encoder --epochs 1 --repeats 1"
    assert command(line + " --held_out 0.5", tmp_path) == 1
    assert "expected 32 comparisons or more to learn from" in capsys.readouterr().err
    assert command(line, tmp_path) == 0
    said = capsys.readouterr().out
    assert "50 answers: accuracy" in said and "on 10 held-out comparisons" in said
    assert "worth it" in said
    found = json.loads((tmp_path / "learning-curve.json").read_text())
    assert [point["answers"] for point in found["points"]] == [5, 10, 20, 40]
    assert found["said"] in said
    assert (tmp_path / "learning-curve.png").stat().st_size > 5000


def test_the_reward_model_says_how_it_agrees_with_whom(own, tmp_path) -> None:  # noqa: F811
    (tmp_path / "answers.jsonl").write_text(chosen(40))
    line = f"reward --model {own}/encoder --held_out 0.4 --epochs 1 --feedback"
    assert command(f"{line} {tmp_path}/answers.jsonl", tmp_path) == 0
    assert (tmp_path / "calibration.png").stat().st_size > 5000
    facts = json.loads((tmp_path / "stages" / "reward.json").read_text())
    groups = facts["reward_model"]["held_out"]["annotators"]
    assert sum(group["choices"] for group in groups.values()) == 16
    said = people_section(tmp_path)
    assert said.startswith("## The reward model and people\n\n| annotator |")
    assert "| ann | " in said and "| ben | " in said and "calibration.png" in said
    assert "source" not in said  # there is one
    assert command(f"{line} {own}/feedback.jsonl --overwrite true", tmp_path) == 0
    assert not (tmp_path / "calibration.png").exists()  # of ratings there is none
    assert people_section(tmp_path) == ""


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


def test_equal_completions_are_half_a_win_for_each(run, monkeypatch, capsys) -> None:
    def samples(common, settings, lm, prompts, n) -> Samples:
        said = [" is it" if i < 2 else f" {Path(lm).name}" for i in range(len(prompts))]
        rows = zip(prompts, said, strict=True)
        return Samples([{"prompt": row["prompt"], "completion": text} for row, text in rows], {})

    class Uneven:  # as in batches of other lengths, equal texts differ by a rounding error
        def score(self, prompts, completions) -> np.ndarray:
            self.calls = getattr(self, "calls", 0) + 1
            return np.array([len(text) for text in completions]) - 1e-6 * self.calls

    monkeypatch.setattr(compare, "samples_of", samples)
    monkeypatch.setattr(reward_models, "load_reward_model", lambda *_: Uneven())
    (run / "prompts.txt").write_text("".join(f"Film {i}\n" for i in range(8)))
    line = f"compare {run}/policy {run}/sft --prompts {run}/prompts.txt --ask true"
    assert command(line, run) == 0
    assert "2 of the pairs are equal: half a win each" in capsys.readouterr().out
    with FeedbackStore(run / "compare.sqlite") as store:
        assert store.count_tasks() == 6
        for winner in (" policy", " sft", " policy"):
            asked = store.next_task("ann")
            store.answer(asked.id, "ann", "left" if asked.shown[0] == winner else "right")
    assert command(line, run) == 0
    found = json.loads((run / "compare.json").read_text())
    assert found["equal"] == 2
    assert found["win_rate"]["judge"][0] == pytest.approx((6 + 2 / 2) / 8)
    share, low, high, n = found["win_rate"]["people"]
    assert share == pytest.approx((6 * 2 / 3 + 2 / 2) / 8) and n == 3  # two of three answers
    assert 0.125 < low < share < high < 0.875


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


def answer_all(run: Path, *people: str) -> None:
    with FeedbackStore(run / "feedback.sqlite") as store:
        for person in people:
            while (asked := store.next_task(person)) is not None:
                store.answer(asked.id, person, "left")


@pytest.mark.slow
def test_a_loop_waits_for_people(own, tmp_path, capsys) -> None:  # noqa: F811
    line = loop_line(own, 1, "real") + " --overlap_share 0.25 --overlap_annotators 2"
    assert command(line, tmp_path) == 0
    assert "0 of 8 comparisons have all their answers" in capsys.readouterr().out
    answer_all(tmp_path, "ann")
    assert command(line, tmp_path) == 0
    assert "6 of 8 comparisons have all their answers" in capsys.readouterr().out
    assert not (tmp_path / "round-1" / "reward_model").exists()
    answer_all(tmp_path, "ben")
    assert command("loop --rounds 2", tmp_path) == 0  # the other settings are as they were
    assert len(read_feedback(tmp_path / "round-1" / "feedback.jsonl")) == 10
    assert (tmp_path / "round-1" / "policy").exists() and (tmp_path / "loop.md").exists()
    answer_all(tmp_path, "ann")
    assert command("loop --overlap_annotators 1", tmp_path) == 0  # nobody else is to be had
    assert (tmp_path / "round-2" / "policy").exists()


def test_a_loop_goes_on_with_the_settings_it_began_with(own, tmp_path, capsys, monkeypatch) -> None:  # noqa: F811
    done = []
    monkeypatch.setattr(train, "loop", lambda common, settings: done.append(settings))
    monkeypatch.setitem(train.STAGES, "loop", (train.loop, train.Loop))
    line = loop_line(own, 1, "simulated")
    assert command(line + " --ppo.kl_coef 0.1", tmp_path) == 0
    for made in ("sft", "round-1/asked.json", "round-1/stages/reward.json"):
        (tmp_path / made).mkdir(parents=True)
    assert command("loop --ppo.kl_coef 0.2", tmp_path) == 0  # no training has had it yet
    (tmp_path / "round-1" / "stages" / "ppo.json").touch()
    config = (tmp_path / "config-loop.yaml").read_text()
    line = "loop --ppo.kl_coef 0.3 --comparisons 9 --seed 1 --evaluate.n_prompts 9"
    assert command(line, tmp_path) == 1
    assert (
        "where seed is 0, not 1, comparisons is 8, not 9, ppo.kl_coef is 0.2, not 0.3: leave"
        in capsys.readouterr().err
    )
    assert (tmp_path / "config-loop.yaml").read_text() == config
    assert command("loop --rounds 3 --threads 1", tmp_path) == 0
    assert [settings.rounds for settings in done] == [1, 1, 3]
    assert done[2] == replace(done[0], rounds=3, ppo=replace(done[0].ppo, kl_coef=0.2))


@pytest.mark.slow
def test_a_loop_goes_on_in_mid_training(own, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    line = loop_line(own, 1, "simulated") + " --ppo.checkpoint_every 1"
    with monkeypatch.context() as patch:
        stop_in(patch, 1)
        assert command(line, tmp_path) == 143
    assert f"python train.py loop --run {tmp_path}" in capsys.readouterr().out
    fitted = tmp_path / "round-1" / "reward_model" / "model.safetensors"
    written = fitted.stat().st_mtime_ns
    assert command(line, tmp_path) == 0
    assert "checkpoints/step-" in capsys.readouterr().out
    assert fitted.stat().st_mtime_ns == written
    rows = [json.loads(row) for row in (tmp_path / "round-1" / "metrics.jsonl").open()]
    assert [row["time/iterations"] for row in rows] == list(range(1, len(rows) + 1))
    assert (tmp_path / "loop.md").exists()
