"""The command line on conversations: warm start, PPO with the user's turns, evaluation, report."""

import json
from pathlib import Path

import pytest
from conftest import letter_tokenizer, tiny_llama

import train
from text_env.prompts import load_prompts

ROOT = Path(train.__file__).parent
TEMPLATE = (
    "{% for m in messages %}{{ 'u' if m.role == 'user' else '>' }}{{ m.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = letter_tokenizer("abcdefu")
    tokenizer.chat_template = TEMPLATE
    tiny_llama(len(tokenizer)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    chats = [chat(x, x + x, y, y + y) for x in "abcd" for y in "abcd"]
    for name, rows in (("train", chats[:12]), ("test", chats[12:])):
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    common = ["--run", str(folder / "run"), "--device", "cpu", "--dtype", "float32"]
    lines = [
        f"sft --model {folder}/lm --texts {folder}/train.jsonl --trainable_layers null --epochs 4 "
        "--batch_size 4 --learning_rate 3e-3",
        f"ppo --prompts {folder}/train.jsonl --reward length --total_timesteps 200 --n_envs 8 "
        "--batch_size 64 --trainable_layers null --max_new_tokens 4 --min_new_tokens 1",
        f"evaluate --prompts {folder}/test.jsonl --best_of 2 --metrics [repetition]",
    ]
    for line in lines:
        assert train.main([*line.split(), *common]) == 0, line
    return folder / "run"


def test_conversations_from_the_warm_start_to_the_report(run) -> None:
    facts = json.loads((run / "stages/sft.json").read_text())["sft"]
    assert facts["loss_after"] < facts["loss_before"]
    samples = [json.loads(line) for line in (run / "samples.jsonl").open(encoding="utf-8")]
    roles = [message["role"] for message in samples[0]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert rows[0]["rollout/completion_tokens"] > 4  # of two turns
    assert all(row["doctor/first_ratio"] == 0 for row in rows)
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert "perplexity" not in found["measures"]["policy"]
    assert {"score", "repetition", "ref_kl"} <= set(found["measures"]["policy"])
    assert len(found["episodes"]["policy"][0]["messages"]) == 4
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "**user:** a **assistant:**" in report and "<eos>" not in report


def test_the_presets_chats_are_whole_and_no_opening_is_in_two_parts() -> None:
    openings: list[str] = []
    for part, size in (("train", 36), ("prompts", 60), ("test", 40)):
        rows = load_prompts(ROOT / f"configs/chat/{part}.jsonl")
        assert len(rows) == size
        for row in rows:
            (asked,), turns = row["prompt"], row["turns"]
            assert asked["role"] == "user" and len(turns) == 1
            openings.append(asked["content"])
    assert len(set(openings)) == 36 + 60 + 40
    for line in (ROOT / "configs/chat/train.jsonl").read_text(encoding="utf-8").splitlines():
        said = json.loads(line)["messages"]
        assert [m["role"] for m in said] == ["user", "assistant"] * 2
