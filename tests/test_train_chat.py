"""`train.py chat`: a conversation at the terminal, with what a model writes kept harmless."""

import io
import json

import pytest
from conftest import letter_tokenizer, tiny_llama
from rich.console import Console

import train
from agents.chat import converse
from reward_models.feedback.terminal import visible

TEMPLATE = "{% for m in messages %}>{{ m['content'] }}{% endfor %}>"


def talk(lines: list[str], write, templated: bool = True) -> str:
    """Type some lines, then Ctrl-D, and return what the terminal shows."""
    out, typed = io.StringIO(), iter(lines)

    def ask(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    converse(write, templated, visible, Console(file=out, force_terminal=False, width=40), ask)
    return out.getvalue()


def test_turns_are_kept_until_reset_and_a_block_is_one_text() -> None:
    seen = []

    def write(turns):
        seen.append([turn["content"] for turn in turns])
        yield "yes"

    talk(["one", '"""', "two", "  2", '"""', " ", "/reset", "three", "/quit", "four"], write)
    assert seen == [["one"], ["one", "yes", "two\n  2"], ["three"]]


def test_a_text_is_shown_as_it_grows_and_cannot_steer_the_terminal() -> None:
    grown = ["a\x1b", "a\x1b[2J", "a\x1b[2J [red]caf\ufffd", "a\x1b[2J [red]café\n\u202eb"]
    shown = talk(["x"], lambda turns: iter(grown))
    assert "a\\x1b[2J [red]café\n\\u202eb\n" in shown
    assert "\x1b" not in shown and "\ufffd" not in shown


def test_without_a_template_each_text_is_gone_on_from() -> None:
    seen = []

    def write(text):
        seen.append(text)
        yield " good"

    shown = talk(["The film is", "This story is"], write, templated=False)
    assert seen == ["The film is", "This story is"]
    assert "The film is good\n" in shown and "This story is good\n" in shown


def test_a_conversation_that_is_too_long_loses_its_oldest_turns() -> None:
    def write(turns):
        if sum(len(turn["content"]) for turn in turns) > 8:
            raise ValueError("expected at most 8 tokens")
        yield "yes"

    shown = talk(["aaaa", "bbbb", "ccccccccc", "dddd"], write)
    assert shown.count("the oldest turn is left out") == 3
    assert shown.count("expected at most 8 tokens") == 1 and shown.count("yes") == 3


@pytest.mark.parametrize("templated", [True, False])
def test_a_policy_writes_as_it_was_trained(tmp_path, monkeypatch, capsys, templated) -> None:
    """Of the letters in its vocabulary, as many as it may."""
    tokenizer = letter_tokenizer("abcdef")
    if templated:
        tokenizer.chat_template = TEMPLATE
    tiny_llama(9).save_pretrained(tmp_path / "run/policy")
    tokenizer.save_pretrained(tmp_path / "run/policy")
    (tmp_path / "vocabulary.txt").write_text("bd\n")
    (tmp_path / "run/stages").mkdir()
    writing = {"max_new_tokens": 5, "min_new_tokens": 5, "temperature": 1.0}
    writing["vocabulary"] = str(tmp_path / "vocabulary.txt")
    (tmp_path / "run/stages/ppo.json").write_text(json.dumps({"writing": writing}))
    typed = iter(["ace", "f" * 200, "fa", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    assert train.main(["chat", str(tmp_path / "run"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    beginnings = ("", "") if templated else ("ace", "fa")
    for beginning in beginnings:
        own = [x for x in lines if x.removeprefix("> ").startswith(beginning) and set(x) & {*"bd"}]
        assert any(set(x.removeprefix("> ")[len(beginning) :]) <= {*"bd"} for x in own), lines
    assert any("tokens" in line for line in lines)  # 200 are too many


def test_a_run_without_a_policy_is_one_clear_line(tmp_path, capsys) -> None:
    assert train.main(["chat", str(tmp_path)]) == 1
    assert "run that stage first" in capsys.readouterr().err
