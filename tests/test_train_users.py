"""The command line where a function speaks for the user, and chats before people."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import letter_tokenizer, tiny_llama
from test_train import own  # noqa: F401
from test_train_chat import TEMPLATE, chat
from test_train_people import loop_line
from transformers import AutoModelForCausalLM, AutoTokenizer

import reward_models
import train
from reward_models.feedback import FeedbackStore, Message, read_feedback
from stages import compare
from stages.writing import Samples

USERS = """
def echo(conversations, **columns):
    assert "letter" in columns
    return [None if c[-1]["content"] == "" else c[0]["content"] for c in conversations]

def fails(conversations, **columns):
    raise KeyError("who")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model with a chat template, prompts, whole conversations, and a module of users."""
    folder = tmp_path_factory.mktemp("users")
    tokenizer = letter_tokenizer("abcdefu")
    tokenizer.chat_template = TEMPLATE
    tiny_llama(len(tokenizer)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    prompts = [
        {"prompt": [{"role": "user", "content": x + y}], "letter": x} for x in "abcd" for y in "ef"
    ]
    for name, rows in (("prompts", prompts), ("chats", [chat(x, x + x, x) for x in "abcd"])):
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "users_of_a_test.py").write_text(USERS)
    return folder


def ppo_line(made: Path, run: Path, **changes) -> list[str]:
    settings = {
        "policy": made / "lm",
        "prompts": made / "prompts.jsonl",
        "reward": "length",
        "user_fn": "users_of_a_test:echo",
        "max_turns": 3,
        "max_user_tokens": 6,  # <eos>uab<eos>>
        "total_timesteps": 64,
        "n_envs": 4,
        "batch_size": 64,
        "trainable_layers": "null",
        "max_new_tokens": 4,
        "min_new_tokens": 1,
        "checkpoint_every": 1,
        **changes,
    }
    flags = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    return ["ppo", "--run", str(run), "--device", "cpu", "--dtype", "float32", *flags]


@pytest.fixture(scope="module")
def run(made, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)  # where the module is
        assert train.main(ppo_line(made, run)) == 0
    return run


def test_a_function_speaks_for_the_user_in_training_and_evaluation(made, run) -> None:
    samples = [json.loads(line) for line in (run / "samples.jsonl").open(encoding="utf-8")]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert rows[0]["rollout/completion_tokens"] > 4  # of several turns
    line = f"evaluate --run {run} --device cpu --prompts {made}/prompts.jsonl --best_of 1"
    assert train.main([*line.split(), "--reference", str(made / "lm")]) == 0
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for episode in (*samples, *found["episodes"]["policy"]):
        said = [m["content"] for m in episode["messages"] if m["role"] == "user"]
        assert len(set(said)) == 1 and 1 <= len(said) <= 3
    assert max(len(e["messages"]) for e in found["episodes"]["policy"]) == 6
    assert "perplexity" not in found["measures"]["policy"]
    assert found["prompts"] == f"{made}/prompts.jsonl"
    assert set(found["measures"]) == {"reference", "policy", "reference, greedy"}
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "KL to the reference" in report and "warm start" not in report
    card = (run / "policy" / "README.md").read_text(encoding="utf-8")
    assert "`users_of_a_test:echo`, 3 answers at most" in card


def test_the_policy_is_evaluated_on_conversations_whose_user_is_the_data_too(
    made, run, tmp_path, capsys
) -> None:
    line = f"evaluate --run {tmp_path} --policy {run}/policy --reference {made}/lm --best_of 1"
    (tmp_path / "stages").mkdir()
    shutil.copy(run / "stages" / "ppo.json", tmp_path / "stages")
    assert train.main([*line.split(), "--device", "cpu", "--prompts", f"{made}/chats.jsonl"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    for episode, x in zip(found["episodes"]["policy"], "abcd", strict=True):
        assert [m["content"] for m in episode["messages"] if m["role"] == "user"] == [x, x]
    assert train.main(["chat", str(run), "--user_fn", "users_of_a_test:echo"]) == 1
    assert "you are the user" in capsys.readouterr().err


def test_a_training_goes_on_with_the_user_that_it_began_with(made, run, capsys) -> None:
    line = ["ppo", "--resume", str(run), "--total_timesteps", "240"]
    assert train.main([*line, "--user_fn", "users_of_a_test:fails"]) == 1
    said = "began with, where user_fn is users_of_a_test:echo, not users_of_a_test:fails"
    assert said in capsys.readouterr().err
    settings = run / "checkpoints" / "settings.json"
    began = settings.read_text()
    settings.write_text(began.replace(":echo", ":fails"))  # by hand
    assert train.main(line) == 1
    said = "user function: 'users_of_a_test:echo' there, 'users_of_a_test:fails' here"
    assert said in capsys.readouterr().err
    for place in ("checkpoints", "ppo.unfinished/checkpoints"):
        (run / place / "settings.json").write_text(began)
    before = len((run / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    assert train.main(line) == 0
    samples = [json.loads(row) for row in (run / "samples.jsonl").open(encoding="utf-8")]
    assert len(samples) > before
    for sample in samples[before:]:
        said = [m["content"] for m in sample["messages"] if m["role"] == "user"]
        assert len(set(said)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"user_fn": "users_of_a_test:nobody"},
            'user_fn: expected a callable or "module:name", got .users_of_a_test:nobody.',
        ),
        ({"user_fn": "no_such_module:f"}, "got .no_such_module:f. .No module named"),
        ({"user_fn": "users_of_a_test:fails"}, "user_fn: fails raised KeyError: 'who'"),
        ({"max_turns": None}, "max_turns: expected a number with user_fn, got None"),
        ({"max_user_tokens": None}, "max_user_tokens: expected a number with user_fn, got None"),
        ({"max_user_tokens": 3}, "expected at most 3 tokens .* raise max_user_tokens"),
        ({"user_fn": None}, "expected user_fn, or prompts with the column"),
        ({"prompts": "chats.jsonl"}, "expected user_fn or the column 'turns', got both"),
    ],
)
def test_what_is_wrong_with_a_user_is_said(made, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(made)
    assert train.main(ppo_line(made, tmp_path / "a", **changes)) == 1
    assert re.search(message, capsys.readouterr().err)


def keys(monkeypatch, *lines: str) -> None:
    left = iter(lines)
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(left, "q"))


def asked_in(store: Path) -> list:
    with FeedbackStore(store) as found:
        return found.unanswered()


def test_people_are_asked_about_whole_conversations(made, run, monkeypatch, capsys) -> None:
    keys(monkeypatch, "1")
    line = f"annotate --terminal true --run {run} --device cpu"  # of the prompts of the training
    assert train.main(line.split()) == 0
    screen = capsys.readouterr().out
    assert re.search("│ user: [abcd][ef] ", screen) and "<eos>" not in screen
    tasks = asked_in(run / "feedback.sqlite")
    assert len(tasks) >= 4
    for task in tasks:
        (asked,) = task.chat.prompt
        assert task.prompt == f"{asked.content}\n"  # as the reward is given it, without a template
        for text, messages in zip(task.completions, task.chat.completions, strict=True):
            assert "\n".join(m.content for m in messages) == text
            assert set(messages[1::2]) <= {asked}
    assert any(task.chat.is_of_turns for task in tasks)
    assert train.main(f"feedback export {run}/answers.jsonl --run {run}".split()) == 0
    (answer,) = map(json.loads, (run / "answers.jsonl").open(encoding="utf-8"))
    said = ["\n".join(m["content"] for m in c) for c in answer["chat"]["completions"]]
    assert said == [answer["chosen"], answer["rejected"]]


def test_policies_are_compared_by_answers_as_messages(made, tmp_path) -> None:
    (tmp_path / "other").symlink_to(made / "lm")
    (tmp_path / "stages").mkdir()
    evaluated_on = json.dumps({"prompts": f"{made}/prompts.jsonl"})
    (tmp_path / "stages" / "evaluate.json").write_text(evaluated_on)
    line = f"compare {tmp_path}/other {made}/lm --run {tmp_path}"
    how = "--ask true --max_new_tokens 4 --device cpu --dtype float32"
    assert train.main([*line.split(), *how.split()]) == 1  # no judge, and nobody has answered yet
    tasks = asked_in(tmp_path / "compare.sqlite")
    assert len(tasks) >= 4
    for task in tasks:
        assert [m.role for m in task.chat.prompt] == ["user"]
        assert task.chat.completions == tuple((Message("assistant", t),) for t in task.completions)
    with FeedbackStore(tmp_path / "compare.sqlite") as store:
        given = store.next_task("ann")
        store.answer(given.id, "ann", "left")
    assert train.main([*line.split(), *how.split()]) == 0
    found = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    for row in found["samples"]:
        assert [m["content"] for (m,) in row["chat"]["completions"]] == [
            row["first"],
            row["second"],
        ]
        assert f"u{row['chat']['prompt'][0]['content']}<eos>>" == row["prompt"]


def test_compare_scores_each_answer_of_a_conversation(made, tmp_path, monkeypatch) -> None:
    """By its length a conversation's text would win against one long answer, its answers lose."""

    def samples(common, settings, lm, prompts, n) -> Samples:
        said = ["a", "b", "a"] if lm == "first" else ["aaa"]
        episodes = []
        for row in prompts:
            roles = ["assistant", "user", "assistant"]
            turns = [{"role": r, "content": x} for r, x in zip(roles, said, strict=False)]
            messages, n_turns = [*row["prompt"], *turns], len(said[::2])
            episode = {"prompt": "t", "completion": "t", "messages": messages, "n_turns": n_turns}
            episodes.append(episode)
        return Samples(episodes, {})

    class Length:
        def score(self, prompts, completions) -> np.ndarray:
            return np.array([float(len(text)) for text in completions])

    monkeypatch.setattr(compare, "samples_of", samples)
    monkeypatch.setattr(reward_models, "load_reward_model", lambda *_: Length())
    (tmp_path / "judge").mkdir()
    line = f"compare first second --run {tmp_path} --prompts {made}/prompts.jsonl --device cpu"
    assert train.main(line.split()) == 0
    found = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert found["win_rate"]["judge"][0] == 0 and found["equal"] == 0
    assert {(row["first"], row["second"]) for row in found["samples"]} == {("a\nb\na", "aaa")}


@pytest.mark.slow
def test_a_loop_asks_learns_and_is_paid_by_whole_conversations(own, tmp_path, monkeypatch) -> None:  # noqa: F811
    (tmp_path / "users_of_a_loop.py").write_text(
        "def user(conversations, **columns):\n    return ['a film' for _ in conversations]\n"
    )
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(own / "lm")
    tokenizer.chat_template = TEMPLATE
    AutoModelForCausalLM.from_pretrained(own / "lm").save_pretrained("lm")
    tokenizer.save_pretrained("lm")
    rows = [{"prompt": [{"role": "user", "content": f"film {x}"}]} for x in "abcdefgh"]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = loop_line(own, 1, "simulated").replace(f"{own}/prompts.txt", "prompts.jsonl")
    line = line.replace(f"{own}/lm", "lm") + " --run loop --device cpu --dtype float32"
    users = "--ppo.user_fn users_of_a_loop:user --ppo.max_turns 2 --ppo.max_user_tokens 24"
    assert train.main([*line.split(), *users.split()]) == 0
    records = read_feedback("loop/round-1/feedback.jsonl")
    for record in records:
        before, *said = record.chat.prompt[0].content, *record.chat.completions
        assert record.prompt == f"{before}\n"
        for text, messages in zip((record.chosen, record.rejected), said, strict=True):
            assert text == "\n".join(m.content for m in messages)
            assert [m.content for m in messages[1::2]] == ["a film"]
    assert train.main(["loop", "--run", "loop", "--ppo.max_turns", "3"]) == 1
