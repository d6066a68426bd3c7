"""Tasks: checked when made, read from files in three forms, paired from samples."""

from pathlib import Path
from typing import Any

import pytest

from reward_models.feedback import (
    Assignment,
    Task,
    tasks_from_completions,
    tasks_from_jsonl,
    tasks_side_by_side,
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("poll", "p", ("a",)), "expected the kind comparison, rating or label, got 'poll'"),
        (("comparison", "p", ("a",)), "expected 2 completions for a comparison, got 1"),
        (("label", "p", ("a", "b")), "expected 1 completion for a label, got 2"),
        (("comparison", "p", ("a", "a")), "expected different completions, got 'a' twice"),
        (("comparison", "p", ("a", "b"), ("x",)), "expected one origin per completion"),
        (("label", "\ud800", ("a",)), "expected prompt to be text, got half a character"),
        (("label", "p", "a"), "expected completions to be text, got a"),
        (("rating", "p", ("a",), (), (5, 1)), "lowest first, got .5, 1."),
        (("rating", "p", ("a",), (), (0, 0.5)), "a scale of whole numbers, lowest first"),
        (("rating", "p", ("a",), (), (1, 5), 6), "expected a rating from 1 to 5, got 6"),
        (("label", "p", ("a",), (), (1, 5), 1), "expected true or false, got 1"),
        (("comparison", "p", ("a", "b"), (), (1, 5), "left"), "first, second or tie, got 'left'"),
        (("label", "p", ("a",), (), (1, 5), None, float("nan")), "expected a finite uncertainty"),
        (("label", "p", ("a",), (), (1, 5), None, 10**400), "expected a finite uncertainty"),
    ],
)
def test_impossible_tasks_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task(*arguments)


def test_swapping_turns_everything_round() -> None:
    task = Task("comparison", "p", ("a", "b"), ("A", "B"), gold="first", uncertainty=0.5)
    swapped = Task("comparison", "p", ("b", "a"), ("B", "A"), gold="second", uncertainty=0.5)
    assert task.swapped() == swapped and swapped.swapped() == task
    assert Assignment(1, task, "ann", swapped=True).shown == ("b", "a")
    assert Assignment(1, task, "ann", swapped=False).shown == ("a", "b")


def test_answers_as_units() -> None:
    comparison = Task("comparison", "p", ("a", "b"))
    assert [comparison.unit(answer) for answer in ("first", "tie", "second")] == [1, 0.5, 0]
    assert [Task("label", "p", ("a",)).unit(answer) for answer in (True, False)] == [1, 0]
    rating = Task("rating", "p", ("a",), scale=(-4, 4))
    assert [rating.unit(answer) for answer in (-4, 0, 1, 4)] == [0, 0.5, 0.625, 1]


def test_three_forms_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        '\ufeff{"prompt": "p", "completions": ["a", "b"], "origins": ["A", "B"]}\n\n'
        '{"prompt": "p", "chosen": "c", "rejected": "d", "gold": "first", "score": 9}\n'
        '{"completions": ["e", "f", "e", "g", "h", "i"], "uncertainty": 0.25}\n'
        '{"chosen": "same", "rejected": "same"}\n',
        encoding="utf-8",
    )
    assert tasks_from_jsonl(path, "comparison") == [
        Task("comparison", "p", ("a", "b"), ("A", "B")),
        Task("comparison", "p", ("c", "d"), gold="first"),
        Task("comparison", "", ("e", "f"), uncertainty=0.25),
        Task("comparison", "", ("g", "h"), uncertainty=0.25),
    ]
    path.write_text(
        '{"prompt": "p", "completion": "一", "gold": 2, "scale": [0, 2]}\n'
        '{"prompt": "p", "completions": ["a", "b"], "origins": ["A", "B"]}\n',
        encoding="utf-8",
    )
    assert tasks_from_jsonl(path, "rating") == [
        Task("rating", "p", ("一",), scale=(0, 2), gold=2),
        Task("rating", "p", ("a",), ("A",)),
        Task("rating", "p", ("b",), ("B",)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "expected a JSON object, got .1."),
        ('{"prompt": "p"}', "expected the key 'completions' or 'completion', or 'chosen' and"),
        ('{"completion": "a"}', "expected at least 2 completions to compare, got 1"),
        ('{"completions": ["a", 1]}', "expected completions to be text"),
        ('{"completions": ["a", "b"], "origins": ["A"]}', "expected one origin per completion"),
        ('{"completions": ["a", "b"], "gold": "a"}', "expected first, second or tie, got 'a'"),
        (
            '{"completions": ["a", "b", "c", "d"], "gold": "first"}',
            "expected one task for a gold answer, got 2",
        ),
        ('{"prompt": null, "completions": ["a", "b"]}', "expected prompt to be text"),
        ('{"completions": ["a", "b\\ud800"]}', "got half a character"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"completions": ["a", "b"]}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"tasks.jsonl, line 2: .*{message}"):
        tasks_from_jsonl(path, "comparison")


def test_samples_are_paired_once_each() -> None:
    samples = {"p": ["a", "b", "a", "c", "d", "e"], "q": ["f", "f"]}
    assert tasks_from_completions(samples, origin="runs/a") == [
        Task("comparison", "p", ("a", "b"), ("runs/a", "runs/a")),
        Task("comparison", "p", ("c", "d"), ("runs/a", "runs/a")),
    ]
    assert [task.completions for task in tasks_from_completions(samples, "label")] == [
        (sample,) for sample in "abcdef"
    ]


def test_two_policies_side_by_side() -> None:
    tasks = tasks_side_by_side({"p": ["a", "b"]}, {"p": ["c", "b"]}, ("A", "B"))
    assert tasks == [Task("comparison", "p", ("a", "c"), ("A", "B"))]
    with pytest.raises(ValueError, match="the same prompts from A and B, got 1 from one only, 'q'"):
        tasks_side_by_side({"p": ["a"]}, {"p": ["b"], "q": ["c"]}, ("A", "B"))
    with pytest.raises(ValueError, match="as many samples from A as from B, got 1 and 2 for 'p'"):
        tasks_side_by_side({"p": ["a"]}, {"p": ["b", "c"]}, ("A", "B"))
