"""Feedback records: checked when made, the same after a trip through a file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models import Comparison, Feedback, Label, Rating, read_feedback, write_feedback

RECORDS: list[Feedback] = [
    Rating("The film", " was fine.", 1.5, (-4, 4), annotator="a1", time="2024-05-01T10:00:00Z"),
    Comparison("The film", " shines.", " drags."),
    Comparison("", "一样好", "一样\u2028好\n", tie=True, origin="test"),
    Label("Is it", " good?", False),
]


def test_records_survive_a_file(tmp_path: Path) -> None:
    path = write_feedback(tmp_path / "new" / "feedback.jsonl", RECORDS)
    assert read_feedback(path) == RECORDS
    assert [file.name for file in path.parent.iterdir()] == ["feedback.jsonl"]


def test_comparison_is_a_line_of_trls_preference_format(tmp_path: Path) -> None:
    path = write_feedback(tmp_path / "feedback.jsonl", [RECORDS[1]])
    expected = {"prompt": "The film", "chosen": " shines.", "rejected": " drags."}
    assert json.loads(path.read_text(encoding="utf-8")) == expected


def test_foreign_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text(
        '\ufeff{"chosen": "a", "rejected": "b", "score_chosen": 9}\n'
        "\n"
        '{"prompt": "p", "completion": "c", "label": 1}\r\n',
        encoding="utf-8",
    )
    assert read_feedback(path) == [Comparison("", "a", "b"), Label("p", "c", True)]


@given(
    st.builds(
        Rating,
        prompt=st.text(),
        completion=st.text(),
        rating=st.integers(-4, 4) | st.floats(-4, 4),
        scale=st.just((-4.0, 4.0)),
        annotator=st.none() | st.text(),
    )
)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, record: Rating) -> None:
    try:
        record.prompt.encode(), record.completion.encode(), (record.annotator or "").encode()
    except UnicodeEncodeError:
        return
    path = write_feedback(tmp_path_factory.mktemp("any") / "f.jsonl", [record])
    assert read_feedback(path) == [record]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, got {"),
        ("[1]", r"expected a JSON object, got \[1\]"),
        ('{"prompt": "a"}', "expected exactly one of the keys 'chosen', 'rating' and 'label'"),
        ('{"chosen": "a", "label": true}', "expected exactly one of the keys"),
        ('{"prompt": "a", "chosen": "b"}', "expected the key 'rejected', got the keys"),
        ('{"prompt": "a", "chosen": [], "rejected": "b"}', r"expected chosen to be a string, got"),
        ('{"completion": "b", "label": "yes"}', "expected label to be true or false, got 'yes'"),
        ('{"completion": "b", "rating": 1}', "expected the key 'scale'"),
        ('{"completion": "b", "rating": 7, "scale": [1, 5]}', "a rating from 1 to 5, got 7"),
        ('{"completion": "b", "rating": 7, "scale": [5, 1]}', "expected scale .lowest, highest."),
        ('{"completion": "b", "rating": 7, "scale": 5}', "expected scale .lowest, highest., got 5"),
        ('{"completion": "b", "rating": NaN, "scale": [1, 5]}', "rating to be a finite number"),
        ('{"completion": "b", "rating": true, "scale": [1, 5]}', "rating to be a finite number"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text('{"completion": "fine", "label": true}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"feedback.jsonl, line 2: .*{message}"):
        read_feedback(path)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(b'{"completion": "caf\xe9", "label": true}\n')
    with pytest.raises(ValueError, match=r"line 1: .*utf-8"):
        read_feedback(path)


def test_interrupted_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = write_feedback(tmp_path / "feedback.jsonl", RECORDS)

    def broken() -> Any:
        yield RECORDS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_feedback(path, broken())
    assert read_feedback(path) == RECORDS
    assert list(tmp_path.iterdir()) == [path]
