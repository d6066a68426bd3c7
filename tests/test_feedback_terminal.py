"""Annotating at a terminal: keys, undo, quitting, and texts that would steer the terminal."""

from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from reward_models.feedback import FeedbackStore, Task
from reward_models.feedback.terminal import annotate, visible


@pytest.fixture
def store(tmp_path: Path):
    with FeedbackStore(tmp_path / "feedback.db") as store:
        yield store


def run(store: FeedbackStore, *keys: str, annotator: str = "ann") -> tuple[int, str]:
    """Type these lines, then Ctrl-D; gives the count and everything on the screen."""
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=70, color_system="truecolor")
    lines: Iterator[str] = iter(keys)

    def ask(prompt: str) -> str:
        console.print(prompt, end="", markup=False)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return annotate(store, annotator, console, ask), screen.getvalue()


def test_every_kind_with_its_keys(store: FeedbackStore) -> None:
    store.add([Task("comparison", f"p{i}", ("a", "b"), uncertainty=9 - i) for i in range(3)])
    store.add([Task("rating", "p", ("a",), scale=(-4, 4), uncertainty=2)])
    store.add([Task("label", f"p{i}", ("a",), uncertainty=1 - i) for i in range(2)])
    count, screen = run(store, "1", "2", " T ", "-4", "g", "Ｂ")
    assert count == 6 and "Nothing is left" in screen
    answers = store.answers()
    left_right = [(answer.answer == "first") != answer.swapped for answer in answers[:2]]
    assert left_right == [True, False]
    assert [answer.answer for answer in answers[2:]] == ["tie", -4, True, False]
    assert all(0 <= answer.seconds < 5 for answer in answers)


def test_the_first_is_what_is_shown_first(store: FeedbackStore) -> None:
    """Over 20 tasks, whatever the order, key 1 chooses the text under 1."""
    store.add([Task("comparison", f"p{i}", ("aaa", "bbb")) for i in range(20)], overlap_share=0)
    for _ in range(20):
        _, screen = run(store, "1")
        above = "aaa" if screen.index("aaa") < screen.index("bbb") else "bbb"
        assert store.export()[-1].chosen == above
    assert {record.chosen for record in store.export()} == {"aaa", "bbb"}


def test_wrong_keys_are_explained_and_nothing_saved(store: FeedbackStore) -> None:
    store.add([Task("rating", "p", ("a",))])
    count, screen = run(store, "6", "0", "good", "", "--3", "3.0", "99999999999")
    assert count == 0 and store.answers() == []
    assert screen.count("Expected a rating from 1 to 5, s skip, u undo, q quit.") == 7
    assert run(store, "３")[0] == 1


def test_skip_undo_quit(store: FeedbackStore) -> None:
    store.add([Task("label", f"p{i}", ("a",), uncertainty=-i) for i in range(3)])
    count, screen = run(store, "u", "g", "u", "b", "s", "q", "g")
    assert "There is nothing to undo." in screen and count == 1
    assert [(answer.task.prompt, answer.answer) for answer in store.answers()] == [("p0", False)]
    progress = store.progress("ann")
    assert (progress.answered, progress.skipped, progress.left) == (1, 1, 1)


@pytest.mark.parametrize("stop", [EOFError, KeyboardInterrupt])
def test_what_was_answered_is_there_after_an_interruption(
    store: FeedbackStore, stop: type[BaseException]
) -> None:
    store.add([Task("label", f"p{i}", ("a",)) for i in range(3)])

    def ask(prompt: str, keys: Iterator[str] = iter("gb")) -> str:  # noqa: B008
        try:
            return next(keys)
        except StopIteration:
            raise stop from None

    assert annotate(store, "ann", Console(file=StringIO()), ask) == 2
    assert len(store.answers()) == 2


def test_an_answer_given_meanwhile_elsewhere_stands(store: FeedbackStore) -> None:
    store.add([Task("label", f"p{i}", ("a",)) for i in range(2)])

    def answered_elsewhere(keys: Iterator[str]) -> Callable[[str], str]:
        def ask(prompt: str) -> str:
            key = next(keys, "q")
            if key == "b":
                store.answer(store.next_task("ann").id, "ann", True)
            return key

        return ask

    screen = StringIO()
    count = annotate(store, "ann", Console(file=screen, width=200), answered_elsewhere(iter("bg")))
    assert "Not saved: expected an open task" in screen.getvalue()
    assert count == 2 and [answer.answer for answer in store.answers()] == [True, True]


def test_no_text_reaches_the_terminal_as_a_command(store: FeedbackStore) -> None:
    """Title changes, colours, cursor moves and C1 codes are written out; so is rich's markup."""
    hostile = "\x1b]0;owned\x07\x1b[31mred\x1b[2J\r\x9b5A\x08\u202eback\ttab\n[bold]b[/bold] [/]"
    store.add([Task("comparison", hostile, (hostile + "1", "中文 😀"))])
    _, screen = run(store, "1")
    assert "\x1b]" not in screen and "\x1b[31m" not in screen and "\x1b[2J" not in screen
    assert not set("\x07\r\x9b\x08\u202e") & set(screen)
    assert r"\x1b]0;owned\x07\x1b[31mred\x1b[2J\r\x9b5A\x08\u202eback" in screen.replace("│\n│", "")
    assert "[bold]b[/bold] [/]" in screen and "中文 😀" in screen


def test_visible_keeps_what_is_harmless() -> None:
    text = "Grüße,\n\t中文, עברית, 👩‍💻, \\x1b"
    assert visible(text) == text
    assert visible("\x00\x7f\u2066\ud800") == r"\x00\x7f\u2066\ud800"
    assert visible("a\u200bb\u2028\U000e0041") == r"a\u200bb\u2028\U000e0041"
