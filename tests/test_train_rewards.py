"""The command line with named rewards, prompts with references, and models built from a config."""

import json
from pathlib import Path

import pytest

import train
from reward_models.chinese_reviews import load_chinese_reviews
from stages.data import SOURCES, data, first_characters, source_of
from stages.rewards import digest_of_reward, reward_function

COMMON = "--device cpu --dtype float32"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """Questions with answers, in two languages, and the config of a tiny model."""
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"prompt": f"{a} plus {b}?\n", "reference": [str(a + b), "many"]}
        for a in range(6)
        for b in range(6)
    ]
    rows += [{"prompt": f"{a}加一？\n", "reference": [f"{a + 1}，对"]} for a in range(9)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    small = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "small.json").write_text(json.dumps(small))
    (folder / "feedback.jsonl").write_text(
        "".join(
            json.dumps({"prompt": r["prompt"], "completion": c, "label": c == r["reference"][0]})
            + "\n"
            for r in rows
            for c in (r["reference"][0], "?")
        ),
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "a"
    line = (
        f"run --run {run} {COMMON} --sft.model {task}/small.json "
        f"--sft.texts {task}/questions.jsonl --sft.trainable_layers null "
        "--sft.max_steps 4 --sft.batch_size 8 "
        f"--ppo.prompts {task}/questions.jsonl --ppo.max_new_tokens 6 --ppo.min_new_tokens 0 "
        "--ppo.n_envs 8 --ppo.total_timesteps 96 --ppo.trainable_layers null "
        f"--evaluate.prompts {task}/questions.jsonl --evaluate.n_prompts 6 --evaluate.best_of 1"
    )
    reward = '{"rouge1": 1.0, "exact": 2.0, "length": {"weight": 0.1, "high": 3}}'
    metrics = ["--ppo.reward", reward, "--evaluate.metrics", "[chrf, exact]"]
    assert train.main([*line.split(), *metrics]) == 0
    return run


def test_a_task_of_metrics_alone_needs_no_reward_model(finished) -> None:
    made = {path.name for path in finished.iterdir()}
    assert "policy" in made and not made & {"reward_model", "judge", "data"}
    assert len(json.loads((finished / "sft/tokenizer.json").read_text())["model"]["vocab"]) <= 300


def test_the_report_has_every_term_and_metric(finished) -> None:
    report = (finished / "report.md").read_text(encoding="utf-8")
    assert "The score is made of 1 × rouge1 + 2 × exact + 0.1 × length (high 3);" in report
    for name in ("score (the reward)", "rouge1", "exact", "length", "chrf", "perplexity under"):
        assert f"| {name} " in report, name
    found = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    for episode in found["episodes"]["policy"]:
        parts = episode["rouge1"] + 2 * episode["exact"] + 0.1 * episode["length"]
        assert episode["score"] == pytest.approx(parts)
    assert found["reward"]["exact"] == 2.0


def test_learned_likelihood_and_own_functions_are_terms_too(finished, task) -> None:
    """The reward model is the warm start's own backbone."""
    common = f"--run {finished} {COMMON}"
    line = f"reward {common} --model sft --feedback {task}/feedback.jsonl --epochs 0.5"
    assert train.main(line.split()) == 0
    module = "def shouts(completions, **_):\n    return [float('!' in c) for c in completions]\n"
    (task / "terms_of_mine.py").write_text(module)
    reward = {"learned": 1.0, "likelihood": 0.1, "terms_of_mine:shouts": -1}
    evaluate = f"evaluate {common} --overwrite true --prompts {task}/questions.jsonl "
    evaluate += "--n_prompts 4 --best_of 1 --reward"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(task)
        assert train.main([*evaluate.split(), json.dumps(reward)]) == 0
    measures = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))["measures"]
    assert set(reward) <= set(measures["policy"])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("bleuu", "bleuu: expected one of bleu, chrf, rouge1, rouge2, rougeL, exact, length"),
        ({"exact": {"colum": "x"}}, "exact: expected its settings, got {'colum': 'x'}"),
        ({"learned": 1}, "expected .*reward_model, which `python train.py reward"),
    ],
)
def test_rewards_that_cannot_be_made_are_named(tmp_path, reward, message) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        reward_function(train.Common(run=tmp_path), reward, None)


def test_a_reward_of_terms_is_one_of_a_training_s_settings(task, finished) -> None:
    terms = {"exact": 1, "learned": 0.5}
    common = train.Common(run=finished)
    other = digest_of_reward(common, train.PPO(reward=terms))
    assert other != digest_of_reward(common, train.PPO(reward={**terms, "exact": 2}))
    assert digest_of_reward(common, train.PPO(reward="exact")) == '"exact"'


def test_chinese_reviews_are_labels_each_text_once(tmp_path, monkeypatch) -> None:
    good, bad = tmp_path / "pos.txt", tmp_path / "neg.txt"
    both = "说不上好也说不上坏的一家酒店，就这样吧。"
    good.write_text("\n".join(["房间很大，服务也很好，下次还来。"] * 2 + [both, "长" * 101, ""]))
    bad.write_text(f"{both}\n太差了\n")
    labels = load_chinese_reviews((good, bad))
    assert [(label.completion, label.label) for label in labels] == [
        ("房间很大，服务也很好，下次还来。", True),
        ("太差了", False),
    ]
    records = {f"{i}号{label.completion}": label for i in range(60) for label in labels}
    monkeypatch.setitem(SOURCES, "chinese-reviews", (lambda: records, "reviews", first_characters))
    folder = data(common := train.Common(run=tmp_path, data="chinese-reviews"))
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open()]
    assert prompts and all(len(prompt) == 4 and prompt[:1].isdigit() for prompt in prompts)
    assert source_of(train.Common(run=tmp_path)) == "chinese-reviews" == common.data
