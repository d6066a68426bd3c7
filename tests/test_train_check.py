"""`train.py check`: good parts pass, each broken one is named, and the exit code says so."""

import json
import sys

import pytest
from conftest import letter_tokenizer, tiny_gpt2, tiny_llama

import train

NAMES = [
    "vocabulary", "end token", "padding token", "chat template", "cache", "padding",
    "temperature", "ending", "speed", "memory", "reward finite", "reward in batches",
    "reward spread",
]  # fmt: skip


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a model, prompts, and a module of rewards; the current one."""
    tiny_llama(9).save_pretrained(tmp_path / "lm")
    letter_tokenizer("abcdef").save_pretrained(tmp_path / "lm")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": ">" * n, "wanted": "a"}) + "\n" for n in (1, 3, 2))
    )
    (tmp_path / "rewards_of_mine.py").write_text(
        "def count(completions, wanted, **_):\n"
        "    return [float(c.count(w)) for c, w in zip(completions, wanted)]\n"
        "def nan(completions, **_):\n"
        "    return [float('nan')] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("rewards_of_mine", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


LINE = "check --model lm --prompts prompts.jsonl --device cpu --dtype float32 --n_envs 8 "
SHORT = "--max_new_tokens 12 --min_new_tokens 1 --trainable_layers 1 --json found.json "


def found(own, line: str) -> tuple[int, dict[str, dict]]:
    code = train.main((LINE + SHORT + line).split())
    return code, {v["name"]: v for v in json.loads((own / "found.json").read_text())}


def test_good_parts_pass(own, capsys) -> None:
    code, verdicts = found(own, "--reward rewards_of_mine:count")
    out = capsys.readouterr().out
    assert code == 0 and list(verdicts) == NAMES
    assert {v["level"] for v in verdicts.values()} == {"ok"}, out
    assert "13 ok, 0 look, 0 wrong" in out
    assert all(len(line) <= 100 for line in out.splitlines())
    made = {path.name for path in own.iterdir()} - {"__pycache__"}
    assert made == {"lm", "prompts.jsonl", "rewards_of_mine.py", "found.json"}  # no run folder


def test_broken_parts_are_named_and_the_exit_code_is_1(own, capsys) -> None:
    code, verdicts = found(own, "--reward rewards_of_mine:nan --min_new_tokens 12")
    wrong = {name for name, v in verdicts.items() if v["level"] == "wrong"}
    assert code == 1 and wrong == {"reward finite", "ending"}
    tiny_gpt2(8).save_pretrained(own / "small")
    code, verdicts = found(own, "--model small --tokenizer lm")
    assert code == 1 and "has 9 tokens, the model 8" in verdicts["vocabulary"]["said"]
    assert verdicts["all else"]["level"] == "look"
    code, verdicts = found(own, "--max_new_tokens 200")
    assert code == 1 and "has positions for" in verdicts["set-up"]["said"]
    code, verdicts = found(own, "--reward rewards_of_mine:missing")
    assert code == 1 and "cannot be loaded" in verdicts["reward"]["said"]


def test_a_reward_may_be_left_out_a_model_may_not(own, capsys) -> None:
    code, verdicts = found(own, "")
    assert code == 0 and verdicts["reward"]["level"] == "look"
    assert train.main(["check"]) == 1
    assert "expected --model, or --run" in capsys.readouterr().err
    assert train.main(["check", "--model", "no/such"]) == 1
    assert "'no/such'" in capsys.readouterr().err
