"""`feedback forget`: a person is gone from all that the run has written."""

import json
from pathlib import Path

import pytest

import train
from reward_models import read_feedback
from reward_models.feedback import Accounts, Comparison, FeedbackStore, write_feedback
from stages import people
from stages.report import people_section

GROUP = {"choices": 9, "accuracy": [0.7, 0.4, 0.9], "ratings": 0, "pearson": None}
TABLE = "| prompt |\n|---|\n| {name} | a prompt that happens to be somebody's pseudonym |"


@pytest.fixture
def run(tmp_path) -> tuple[Path, str]:
    """A loop with a round, and the pseudonym of one of three people."""
    with Accounts(tmp_path / "feedback.sqlite") as accounts:
        name = accounts.create("Ann").pseudonym
    records = [Comparison("p", "a", f"b{i}", annotator=x) for i, x in enumerate(("bo", name, "ci"))]
    with FeedbackStore(tmp_path / "feedback.sqlite") as store:
        store.import_records(records)
    groups = {x: GROUP for x in ("bo", name, "ci")}
    report = {"held_out": {"annotators": groups}}
    facts = {"reward_model": {**report, "members": [report, report]}, "judge": {"held_out": None}}
    for folder in (tmp_path, tmp_path / "round-1"):
        (folder / "stages").mkdir(parents=True)
        (folder / "stages" / "reward.json").write_text(json.dumps(facts))
        text = "\n\n".join(["# What the run did", people_section(folder), TABLE.format(name=name)])
        (folder / "report.md").write_text(text + "\n")
    write_feedback(tmp_path / "round-1" / "feedback.jsonl", records)
    return tmp_path, name


def forget(run: Path) -> int:
    return train.main(["feedback", "forget", "Ann", "--run", str(run)])


def test_a_forgotten_person_is_gone_from_the_run(run, capsys) -> None:
    folder, name = run
    assert people_section(folder).count(name) == 1
    assert forget(folder) == 0
    said = capsys.readouterr().out
    assert "1 answers erased, and the account ann" in said and "Not touched: files that" in said
    for here in (folder, folder / "round-1"):
        for file in ("stages/reward.json", "report.md"):
            assert f"figures of {name} erased in {here / file}" in said
        facts = json.loads((here / "stages/reward.json").read_text())["reward_model"]
        for part in (facts, *facts["members"]):
            assert set(part["held_out"]["annotators"]) == {"bo", "ci"}
        report = (here / "report.md").read_text()
        assert report.count(name) == 1 and TABLE.format(name=name) in report
        assert people_section(here) in report and "| bo |" in report
    assert [r.annotator for r in read_feedback(folder / "round-1/feedback.jsonl")] == ["bo", "ci"]
    assert forget(folder) == 1  # nobody of that name


def test_what_was_cut_short_can_be_done_again(run, monkeypatch) -> None:
    folder, name = run
    with monkeypatch.context() as patch:
        patch.setattr(people, "write_text", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert forget(folder) == 1
    assert forget(folder) == 0
    assert name not in (folder / "stages/reward.json").read_text()


@pytest.mark.parametrize("by_pseudonym", [False, True])
def test_answers_under_the_name_are_erased_too(run, capsys, by_pseudonym) -> None:
    """They were imported; the store erases them, and so they have to go from the files."""
    folder, name = run
    records = [Comparison("q", "a", "b", annotator=x) for x in ("ann", "bo")]
    with FeedbackStore(folder / "feedback.sqlite") as store:
        store.import_records(records)
    file = folder / "round-1/feedback.jsonl"
    write_feedback(file, [*read_feedback(file), *records])
    asked = name if by_pseudonym else "Ann"
    assert train.main(["feedback", "forget", asked, "--run", str(folder)]) == 0
    assert "2 answers erased, and the account ann" in capsys.readouterr().out
    assert [record.annotator for record in read_feedback(file)] == ["bo", "ci", "bo"]
