"""Answers as records and back; ratings as CSV that a spreadsheet does not run."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models.feedback import (
    Comparison,
    Feedback,
    FeedbackStore,
    Label,
    Rating,
    Task,
    read_feedback,
    read_ratings_csv,
    write_feedback,
    write_ratings_csv,
)
from reward_models.feedback.agreement import krippendorff_alpha
from reward_models.human_ratings import SCALE, load_human_ratings

RECORDS: list[Feedback] = [
    Comparison("p", "b", "a", annotator="ann", time="2024-05-01T10:00:00+00:00", origin="x"),
    Comparison("p", "a", "b", annotator="bob", time="2024-05-02T10:00:00+00:00", origin="x"),
    Comparison("p", "a", "b", annotator="ann", origin="y"),
    Comparison("", "一", "二", tie=True),
    Rating("p", " fine", 1.25, (-4, 4), annotator="ann"),
    Rating("p", " fine", 2, (-4, 4)),
    Rating("p", " fine", 2, (-4, 4)),
    Rating("p", " fine", 2, (1, 5)),
    Label("p", "\x1b[31m", False, annotator="bob"),
]


def test_records_survive_the_store(tmp_path: Path) -> None:
    """Two nameless ratings of one text are two answers; a second import adds nothing."""
    with FeedbackStore(tmp_path / "f.db") as store:
        assert store.import_records(RECORDS) == len(RECORDS)
        assert store.import_records(RECORDS) == 0
        assert store.export() == RECORDS
        assert store.export("label") == RECORDS[-1:]
        assert store.next_task("cara") is None
        assert len({answer.task_id for answer in store.answers()}) == 6
        assert {answer.swapped for answer in store.answers()} == {None}


def test_answers_without_annotator_from_two_files(tmp_path: Path) -> None:
    """File 2 brings a second 2, and a 3; what it shares with file 1 is not taken up again."""
    one, two = [2, 4], [4, 2, 2, 3]
    files = [[Rating("p", "a", rating, (1, 5)) for rating in file] for file in (one, two)]
    with FeedbackStore(tmp_path / "f.db") as store:
        assert [store.import_records(file) for file in (*files, *files)] == [2, 2, 0, 0]
        assert [record.rating for record in store.export()] == [2, 4, 2, 3]
        assert store.forget("anonymous-1") == 1
        assert store.import_records(files[0]) == 0
        assert store.import_records(files[1]) == 1


def test_imported_answers_take_their_place_among_collected_ones(tmp_path: Path) -> None:
    """Either order is the same task, and nobody is asked what they answered elsewhere."""
    with FeedbackStore(tmp_path / "f.db") as store:
        store.add([Task("comparison", "p", ("b", "a"), ("B", "A"))], 1, 2)
        assert store.next_task("ann") is not None
        record = Comparison("p", "b", "a", annotator="ann", origin="A vs B")
        assert store.import_records([record]) == 1
        assert store.next_task("ann") is None
        (answer,) = store.answers()
        assert answer.task.completions == ("a", "b") and answer.answer == "second"
        assert answer.task.origins == ("A", "B")
        assert store.undo("ann") is None
        assert store.next_task("bob") is not None and store.next_task("cara") is None


def test_impossible_record_is_named_and_nothing_saved(tmp_path: Path) -> None:
    same = Comparison("p", "a", "a")
    with FeedbackStore(tmp_path / "f.db") as store:
        with pytest.raises(ValueError, match="record 2: expected different completions, got 'a'"):
            store.import_records([RECORDS[0], same])
        with pytest.raises(ValueError, match="record 1: expected a scale of whole numbers"):
            store.import_records([Rating("p", "a", 0.2, (0, 0.5))])
        with pytest.raises(ValueError, match="record 1: expected an annotator's pseudonym"):
            store.import_records([Label("p", "a", True, annotator=" ")])
        with pytest.raises(ValueError, match="record 1: expected an annotator's pseudonym"):
            store.import_records([Label("p", "a", True, annotator="\ud800")])
        assert store.export() == []


def test_export_is_trls_preference_format(tmp_path: Path) -> None:
    """Every line has TRL's three columns, and without ties none that its trainers would misread."""
    with FeedbackStore(tmp_path / "f.db") as store:
        store.add(Task("comparison", "p", (f"{i}a", f"{i}b"), ("A", "B")) for i in range(3))
        for choice in ("left", "right", "tie"):
            assignment = store.next_task("ann")
            store.answer(assignment.id, "ann", choice)
            if choice == "left":
                chosen, rejected = assignment.shown
        path = write_feedback(tmp_path / "f.jsonl", store.export("comparison", ties=False))
        everything = write_feedback(tmp_path / "all.jsonl", store.export())
        assert read_feedback(everything) == store.export()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 and len(read_feedback(everything)) == 3
    assert all(
        set(line) == {"prompt", "chosen", "rejected", "annotator", "time", "origin"}
        for line in lines
    )
    assert (lines[0]["chosen"], lines[0]["rejected"]) == (chosen, rejected)
    assert lines[0]["origin"] == "A vs B"


def test_gold_questions_can_be_left_out(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.db", gold_rate=1) as store:
        store.add([Task("label", "p", ("a",), gold=True), Task("label", "p", ("b",))])
        for _ in range(2):
            store.answer(store.next_task("ann").id, "ann", True)
        assert [record.completion for record in store.export()] == ["a", "b"]
        assert [record.completion for record in store.export(gold=False)] == ["b"]


@pytest.mark.network
def test_the_human_ratings_go_through_the_store(tmp_path: Path) -> None:
    """Their means survive; the single ratings' alpha is that of Krippendorff's formula.

    It is 0.80 for all movie sentences, as DESIGN has it, and 0.78 for every 20th, taken here.
    """
    rated = load_human_ratings()[::20]
    records: list[Feedback] = [item.as_feedback() for item in rated]
    single = [Rating("", item.text, rating, SCALE) for item in rated for rating in item.ratings]
    with FeedbackStore(tmp_path / "means.db") as store:
        assert store.import_records(records) == len(rated)
        assert store.export() == records
    with FeedbackStore(tmp_path / "single.db") as store:
        assert store.import_records(single) == len(single) > 5000
        alpha = krippendorff_alpha(store.answers(), "rating")
    values = np.concatenate([item.ratings for item in rated])
    observed = sum(len(item.ratings) * np.var(item.ratings, ddof=1) for item in rated)
    expected = len(values) * np.var(values, ddof=1)
    assert alpha == pytest.approx(1 - observed / expected) == pytest.approx(0.777, abs=5e-4)


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text("=+-@'\t\r\n一")
NAME = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(
    st.lists(
        st.builds(
            Rating,
            prompt=TEXT,
            completion=TEXT,
            rating=st.integers(-4, 4) | st.floats(-4, 4),
            scale=st.just((-4, 4)),
            annotator=NAME,
            time=NAME,
            origin=NAME,
        )
    )
)
def test_csv_survives_and_holds_no_formula(
    tmp_path_factory: pytest.TempPathFactory, records: list[Feedback]
) -> None:
    path = write_ratings_csv(tmp_path_factory.mktemp("csv") / "f.csv", records)
    assert read_ratings_csv(path) == records
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            texts = [row[name] for name in ("prompt", "completion", "annotator", "time", "origin")]
            assert not any(text.startswith(tuple("=+-@\t\r\n")) for text in texts)


def test_csv_as_a_spreadsheet_has_it(tmp_path: Path) -> None:
    path = write_ratings_csv(
        tmp_path / "f.csv", [Rating("p", "=1+1", 4, (1, 5), annotator="ann"), RECORDS[0]]
    )
    assert path.read_bytes().decode("utf-8").splitlines() == [
        "\ufeffprompt,completion,rating,lowest,highest,annotator,time,origin",
        "p,'=1+1,4,1,5,ann,,",
    ]


def test_foreign_csv(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text('who,completion,rating\nann,"two\nlines",4\n', encoding="utf-8")
    assert read_ratings_csv(path) == [Rating("", "two\nlines", 4, (1, 5))]
    assert read_ratings_csv(path, scale=(0, 10)) == [Rating("", "two\nlines", 4, (0, 10))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the column 'completion', got none"),
        ("text,rating\n", "line 1: expected the column 'completion', got"),
        ("completion,rating\na,good\n", "line 2: expected rating to be a number, got 'good'"),
        ("completion,rating\na,4\nb,9\n", "line 3: expected a rating from 1 to 5, got 9"),
        ("completion,rating\na\n", "line 2: expected 2 columns"),
        ("completion,rating\na,4,5\n", "line 2: expected 2 columns"),
        ('completion,rating\n"a,4\n', "line .: unexpected end of data"),
    ],
)
def test_malformed_csv_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"f.csv, {message}"):
        read_ratings_csv(path)
