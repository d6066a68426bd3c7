"""What the command line refuses before it begins, and leaves nothing of."""

import json
from typing import get_args

import pytest

import train
from agents.findings import CHECKS
from configs.settings import FindingName
from reward_models.feedback import FeedbackStore


@pytest.mark.parametrize("line", ["ppo --stop_on", "run --ppo.stop_on", "loop --ppo.stop_on"])
def test_a_misspelt_finding_is_refused_before_the_start(line, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        train.main([*line.split(), "[kl_runaway, klrunaway]", "--run", str(tmp_path / "a")])
    said = capsys.readouterr().err
    assert "stop_on" in said and "'kl_runaway'" in said and "Got value: klrunaway" in said
    assert not (tmp_path / "a").exists()


def test_the_findings_that_can_be_named_are_the_doctors() -> None:
    assert get_args(FindingName) == tuple(CHECKS)


def test_nobody_is_asked_about_a_run_that_is_not_there(tmp_path, capsys) -> None:
    run = tmp_path / "runs" / "mistyped"
    assert train.main(["annotate", "--terminal", "true", "--run", str(run)]) == 1
    assert f"expected {run}/sft" in capsys.readouterr().err
    (tmp_path / "same.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}')
    line = ["annotate", "--terminal", "true", "--tasks", str(tmp_path / "same.jsonl")]
    assert train.main([*line, "--run", str(run)]) == 1
    assert "expected tasks, or samples that differ, to ask about" in capsys.readouterr().err
    assert not run.parent.exists()


def test_tasks_of_a_file_need_no_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: "q")
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "p", "completions": ["a", "b"]}))
    line = ["annotate", "--terminal", "true", "--tasks", str(tmp_path / "t.jsonl")]
    assert train.main([*line, "--run", str(tmp_path / "new" / "run")]) == 0
    with FeedbackStore(tmp_path / "new" / "run" / "feedback.sqlite") as store:
        assert store.count_tasks() == 1
