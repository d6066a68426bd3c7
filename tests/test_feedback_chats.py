"""Chats before people: messages beside the texts, in tasks, records, store, terminal and page."""

import json
import re
import sqlite3
from dataclasses import replace
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reward_models.feedback import (
    Assignment,
    Chat,
    Comparison,
    FeedbackStore,
    Label,
    Message,
    Rating,
    Task,
    chats_of,
    database,
    read_feedback,
    tasks_from_completions,
    tasks_from_jsonl,
    with_chats,
    write_feedback,
)
from reward_models.feedback.terminal import annotate

BEFORE = (Message("system", "Be kind."), Message("user", "你好 <b>!</b>"))
ONE, TWO = (Message("assistant", "Hi."),), (Message("assistant", "你好。"),)
MORE = (*ONE, Message("user", "Bye?"), Message("assistant", "Bye."))
PROMPT = "<|im_start|>user\n你好 <b>!</b><|im_end|>\n<|im_start|>assistant\n"
ANSWERS = Task("comparison", PROMPT, ("Hi.", "你好。"), ("A", "B"), chat=Chat(BEFORE, (ONE, TWO)))
TURNS = Task("comparison", PROMPT, ("Hi.\nBye.", "你好。"), chat=Chat(BEFORE, (MORE, TWO)))


def as_json(chat: Chat) -> dict[str, Any]:
    def plain(messages: Any) -> list[dict[str, str]]:
        return [{"role": m.role, "content": m.content} for m in messages]

    return {"prompt": plain(chat.prompt), "completions": [*map(plain, chat.completions)]}


def test_a_chat_changes_places_with_its_completions() -> None:
    swapped = ANSWERS.swapped()
    assert swapped.completions == ("你好。", "Hi.") and swapped.chat == Chat(BEFORE, (TWO, ONE))
    assert swapped.swapped() == ANSWERS
    assert Assignment(1, ANSWERS, "ann", swapped=True).shown_chat == swapped.chat
    assert Assignment(1, ANSWERS, "ann", swapped=False).shown_chat == ANSWERS.chat
    assert Assignment(1, Task("label", "p", ("a",)), "ann", swapped=True).shown_chat is None


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "expected chat to have 'prompt' and 'completions', got .."),
        ({"prompt": []}, "expected chat to have 'completions', got .'prompt'."),
        ({"prompt": [], "completions": 2}, "a list of messages for each completion of chat, got 2"),
        ({"prompt": "p", "completions": [[], []]}, "expected a list of messages in chat, got 'p'"),
        ({"prompt": [], "completions": [[]]}, "each of 2 completions, got .0."),
        (Chat(BEFORE, (ONE, ())), "for each of 2 completions, got .1, 0."),
        ({"prompt": [{"role": "user"}], "completions": []}, "the texts 'role' and 'content', got"),
        ({"prompt": [3], "completions": []}, "the texts 'role' and 'content', got 3"),
        (
            {"prompt": [{"role": "user", "content": "\ud800"}], "completions": []},
            "expected messages to be text, got half a character",
        ),
    ],
)
def test_what_is_no_chat_is_refused(chat: Any, message: str) -> None:
    for make in (
        lambda: Task("comparison", "p", ("a", "b"), chat=chat),
        lambda: Comparison("p", "a", "b", chat=chat),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_records_with_chats_survive_a_file_and_others_look_as_before(tmp_path: Path) -> None:
    records = [
        Comparison("p", "b", "a", annotator="ann", chat=Chat(BEFORE, (TWO, ONE))),
        Rating("p", "a", 3, (1, 5), chat=Chat(BEFORE, (MORE,))),
        Label("p", "a", True, chat=Chat((), (ONE,))),
        Label("p", "a", True),
    ]
    file = write_feedback(tmp_path / "f.jsonl", records)
    assert read_feedback(file) == records
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines[0]["chat"] == as_json(Chat(BEFORE, (TWO, ONE)))
    assert lines[3] == {"prompt": "p", "completion": "a", "label": True}
    assert records[0].texts == ("pb", "pa")  # what is learned from is the texts


def test_tasks_of_a_file_have_their_chats(tmp_path: Path) -> None:
    """The second of three completions is the first again: its messages are passed over, too."""
    chat = as_json(Chat(BEFORE, (ONE, ONE, TWO)))
    line = {"prompt": "p", "completions": ["x", "x", "y"], "chat": chat}
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps(line), encoding="utf-8")
    (task,) = tasks_from_jsonl(file, "comparison")
    assert task == Task("comparison", "p", ("x", "y"), chat=Chat(BEFORE, (ONE, TWO)))
    assert [task.chat for task in tasks_from_jsonl(file, "label")] == [
        Chat(BEFORE, (ONE,)),
        Chat(BEFORE, (TWO,)),
    ]


def test_chats_are_found_behind_episodes() -> None:
    asked = [{"role": "user", "content": "Hi?"}]
    parts = {"type": "text", "text": "Hi?"}
    turns = [
        *asked,
        *({"role": role, "content": role[0]} for role in ("assistant", "user", "assistant")),
    ]
    short = [*asked, {"role": "assistant", "content": "b"}]
    episodes = [
        {"prompt": "<u>Hi?", "completion": "x"},
        {"prompt": "<u>Hi?", "completion": "y", "messages": "a column of this name"},
        {"prompt": "<u>Hi?", "completion": "a\na", "messages": turns, "n_turns": 2},
        {"prompt": "<u>Hi?", "completion": "b", "messages": short, "n_turns": 1},
        {"prompt": "text", "completion": "x"},
        {"prompt": "<u>parts", "completion": "x"},
    ]
    prompts = [asked, asked, asked, asked, "text", [{"role": "user", "content": [parts]}]]
    chats = chats_of(episodes, prompts)
    user, three = (Message("user", "Hi?"),), "aua"
    roles = {"a": "assistant", "u": "user"}
    assert chats == {
        ("<u>Hi?", "x"): Chat(user, ((Message("assistant", "x"),),)),
        ("<u>Hi?", "y"): Chat(user, ((Message("assistant", "y"),),)),
        ("Hi?\n", "a\nu\na"): Chat(user, (tuple(Message(roles[x], x) for x in three),)),
        ("Hi?\n", "b"): Chat(user, ((Message("assistant", "b"),),)),
    }
    several, one = ("Hi?\n", "a\nu\na"), ("Hi?\n", "b")
    samples = {"Hi?\n": [several[1], one[1], "x", "unknown"], "text": ["x", "y"]}
    tasks = tasks_from_completions(samples)
    found = with_chats(tasks, chats)
    assert [replace(task, chat=None) for task in found] == tasks
    wanted = (chats[several].completions[0], chats[one].completions[0])
    assert [task.chat for task in found] == [Chat(user, wanted), None, None]


def test_completions_of_different_prompts_are_not_shown_behind_one() -> None:
    task = Task("comparison", "Hi?\n", ("a", "b"))
    one, other = Chat(BEFORE[:1], (ONE,)), Chat(BEFORE, (TWO,))
    chats = {("Hi?\n", "a"): one, ("Hi?\n", "b"): other}
    assert with_chats([task], chats) == [task]
    chats["Hi?\n", "b"] = replace(other, prompt=one.prompt)
    assert with_chats([task], chats) == [replace(task, chat=Chat(one.prompt, (ONE, TWO)))]


def test_the_store_keeps_chats_and_exports_and_imports_them(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "a.db") as store, FeedbackStore(tmp_path / "b.db") as other:
        store.add([ANSWERS.swapped(), TURNS, Task("label", "p", ("a",))], overlap_share=0)
        while (given := store.next_task("ann")) is not None:
            store.answer(given.id, "ann", True if given.task.kind == "label" else "right")
            if given.task.kind == "comparison":
                said = ["\n".join(m.content for m in c[::2]) for c in given.shown_chat.completions]
                assert said == list(given.shown)
        records = store.export()
        by_prompt = [r for r in records if isinstance(r, Comparison)]
        for record in by_prompt:
            said = ["\n".join(m.content for m in c[::2]) for c in record.chat.completions]
            assert said == [record.chosen, record.rejected]
        assert len(by_prompt) == 2
        other.import_records([replace(record, chat=None) for record in records])
        other.import_records(records)  # the answers are there: their tasks are told their chats
        assert other.export() == records


def test_what_was_shown_stays(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.db") as store:
        plain = replace(ANSWERS, chat=None)
        for task, chat in (
            (plain, None),
            (ANSWERS, ANSWERS.chat),
            (replace(ANSWERS, chat=Chat((), (ONE, TWO))), ANSWERS.chat),
            (plain, ANSWERS.chat),
        ):
            store.add([task])
            assert [task.chat for task in store.unanswered()] == [chat]


def test_a_store_from_before_there_were_chats_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(database, "_STEPS", database._STEPS[:1])
        database.Database(tmp_path / "f.db").close()
    connection = sqlite3.connect(tmp_path / "f.db")
    connection.execute(
        "INSERT INTO tasks VALUES "
        "(1, 'd', '[]', 'label', 'p', '[\"a\"]', '[1, 5]', NULL, NULL, 1, 0)"
    )
    connection.commit()
    connection.close()
    with FeedbackStore(tmp_path / "f.db") as store:
        assert store.next_task("ann").task == Task("label", "p", ("a",))
        store.add([ANSWERS])
        assert ANSWERS.chat in [task.chat for task in store.unanswered()]


def screen_of(tmp_path: Path, task: Task) -> str:
    screen = StringIO()
    with FeedbackStore(tmp_path / "f.db") as store:
        store.add([task])
        annotate(store, "ann", Console(file=screen, width=60), lambda _: "q")
    return screen.getvalue()


def test_the_terminal_shows_who_said_what(tmp_path: Path) -> None:
    screen = screen_of(tmp_path, TURNS)
    assert "im_start" not in screen
    assert "system: Be kind." in screen and "user: 你好 <b>!</b>" in screen
    assert re.search(r"assistant: Hi\. .*\n.*user: Bye\?.*\n.*assistant: Bye\.", screen)
    assert "assistant: 你好。" not in screen and "│ 你好。" in screen  # one answer: no need to say


def test_no_message_steers_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b[2J[bold]x[/bold]"
    said = (Message(hostile, hostile), Message("user", hostile), Message("assistant", "a"))
    screen = screen_of(tmp_path, Task("label", "p", ("a",), chat=Chat(said[:1], (said,))))
    assert "\x1b" not in screen and screen.count(r"\x1b[2J[bold]x[/bold]") == 5


def test_the_page_shows_turns_and_escapes_them(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from reward_models.feedback.web.rendering import page

    script = "<script>alert(1)</script>"
    chat = Chat(
        (Message(script, script),),
        ((Message("assistant", script), Message("user", " "), Message("assistant", "\x1b")),),
    )
    html = page(
        "task.html",
        annotator="ann", token="t", page="task", done=0, total=1, steps=0, undone=False,
        kind="label", question="?", judged="conversation", prompt="im_start", completions=["a"],
        chat=chat, scale=range(1, 6), task_id=1,
    ).body.decode()  # fmt: skip
    assert "im_start" not in html and "<script>" not in html.replace("<script src=", "")
    assert unescape(html).count(script) == 3 and "⟨ESC⟩" in html
    assert html.count('class="turn own"') == 2 and "the message is empty" in html
