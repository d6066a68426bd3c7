"""The command line where parts meet: rewards of tokens, conversations, other families, tuning."""

import json
import re
from pathlib import Path

import pytest
import transformers as tf
from huggingface_hub import ModelCard
from test_train import own  # noqa: F401
from test_train_card import run_lines
from tokenizers import processors

import train
from reward_models import LearnedRewardModel
from stages.models import base_of
from stages.report import found_by
from stages.rewards import digest_of_reward, reward_function
from stages.tune import told_to_trials
from stages.writing import tokens_of

COMMON = "--device cpu --dtype float32"
SMALL = "--n_envs 4 --max_new_tokens 6 --min_new_tokens 1 --total_timesteps 32"
REWARDS = """
def no_e(prompts, completions, completion_pieces, **columns):
    return [[-piece.count("e") for piece in pieces] for pieces in completion_pieces]


def no_o(prompts, completions, completion_ids, completion_pieces, **columns):
    counts = [[-piece.count("o") for piece in pieces] for pieces in completion_pieces]
    assert [len(x) for x in counts] == [len(x) for x in completion_ids]
    return counts


def fragile(completions, **columns):
    return [float("nan") if "e" in text else 1.0 for text in completions]
"""
CHAT = (
    "{% for m in messages %}{{ 'U:' if m.role == 'user' else 'A:' }}{{ m.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def do(line: str, *further: str) -> None:
    assert train.main([*line.split(), *further]) == 0, line


@pytest.fixture
def task(own, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A folder with the policy's beginning as sft/, and rewards of one's own."""
    (tmp_path / "rewards_in_parts.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/sft").symlink_to(own / "lm")
    return tmp_path


def test_rewards_of_tokens_are_checked_paid_and_tabled_by_term(own, task) -> None:  # noqa: F811
    run, prompts = f"--run {task}/run {COMMON}", f"--prompts {own}/prompts.txt"
    found = task / "check.json"
    line = f"check {run} {prompts} --max_new_tokens 8 --json {found} --reward"
    do(line, "rewards_in_parts:no_o")
    levels = {v["name"]: v["level"] for v in json.loads(found.read_text())}
    assert levels["reward finite"] == levels["reward in batches"] == "ok"
    reward = {"rewards_in_parts:no_e": 2.0, "length": {"weight": 0.5, "high": 0, "width": 1}}
    do(f"ppo {run} {prompts} {SMALL} --trainable_layers null --reward", json.dumps(reward))
    metrics = "[rewards_in_parts:no_o, repetition]"
    do(f"evaluate {run} {prompts} --n_prompts 8 --best_of 2 --metrics", metrics)
    episodes = json.loads((task / "run/evaluation.json").read_text())["episodes"]
    for episode in (e for writer in episodes.values() for e in writer):
        terms = {letter: -episode["completion"].count(letter) for letter in "eo"}
        for letter, count in terms.items():
            assert episode[f"rewards_in_parts:no_{letter}"] == count
        assert episode["score"] == pytest.approx(2 * terms["e"] + 0.5 * episode["length"])


def test_a_term_without_a_number_leaves_its_episode_out(own, task) -> None:  # noqa: F811
    reward = '{"rewards_in_parts:fragile": 1, "length": 0.1}'
    line = f"ppo --run {task}/run {COMMON} --prompts {own}/prompts.txt {SMALL} --n_envs 16"
    do(f"{line} --trainable_layers null --on_nonfinite skip --reward", reward)
    rows = [json.loads(row) for row in (task / "run/metrics.jsonl").open()]
    assert 0 < rows[0]["rollout/episodes"] < 16
    facts = json.loads((task / "run/stages/ppo.json").read_text())
    assert facts["nonfinite_skipped"] >= rows[-1]["train/nonfinite_skipped"] > 0
    left_out = f"{facts['nonfinite_skipped']} sequences and minibatches left out, not finite"
    assert found_by(facts)[-1] == left_out


def test_the_words_of_conversations_may_be_the_vocabulary(own, task) -> None:  # noqa: F811
    tokenizer = tf.AutoTokenizer.from_pretrained(own / "lm")
    says = ["hello", "good", "why?", "a film"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(says)]
    (task / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    (task / "pairs.jsonl").write_text('{"prompt": "hello", "completion": "good"}')
    of_chat = tokens_of(task / "chats.jsonl", tokenizer)
    assert of_chat == sorted({i for text in says for i in tokenizer(text)["input_ids"]})
    assert set(tokens_of(task / "pairs.jsonl", tokenizer)) < set(of_chat)


def test_the_card_of_a_chat_s_policy_asks_it_as_a_chat(own, task) -> None:  # noqa: F811
    tokenizer = tf.AutoTokenizer.from_pretrained(own / "lm")
    tokenizer.chat_template = CHAT
    tf.AutoModelForCausalLM.from_pretrained(own / "lm").save_pretrained(task / "chat")
    tokenizer.save_pretrained(task / "chat")
    prompts = [{"prompt": [{"role": "user", "content": "a film?"}], "turns": ["why?"]}]
    (task / "chats.jsonl").write_text(json.dumps(prompts[0]))
    do(
        f"ppo --run {task}/run {COMMON} --policy {task}/chat --prompts {task}/chats.jsonl {SMALL} "
        "--trainable_layers null --reward length"
    )
    text = (task / "run/policy/README.md").read_text()
    assert "'content': 'a film?'" in text and "A:" not in text
    assert "film" not in run_lines(text, task / "run/policy")  # the answer alone


@pytest.mark.parametrize("lora", ["", "--lora_rank 2 --merge_lora false"])
def test_the_card_of_an_encoder_decoder_loads_it(own, task, lora) -> None:  # noqa: F811
    tokenizer = tf.AutoTokenizer.from_pretrained(own / "lm")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 0)]
    )
    config = tf.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        pad_token_id=1, decoder_start_token_id=1, eos_token_id=0,
    )  # fmt: skip
    tf.T5ForConditionalGeneration(config).save_pretrained(task / "t5")
    tokenizer.save_pretrained(task / "t5")
    do(
        f"ppo --run {task}/run {COMMON} --policy {task}/t5 --prompts {own}/prompts.txt {SMALL} "
        f"--trainable_layers null --reward length {lora}"
    )
    card = ModelCard.load(task / "run/policy/README.md")
    assert card.data.pipeline_tag is None and "encoder-decoder" in card.text
    assert isinstance(run_lines(card.content, task / "run/policy"), str)
    if lora:  # a training that goes on still knows whose adapters they are
        do(f"ppo --resume {task}/run --total_timesteps 80")
        assert isinstance(run_lines(card.content, task / "run/policy"), str)


def test_a_model_that_is_no_classifier_is_refused_in_a_sentence(task) -> None:
    config = tf.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2)
    tf.MambaForCausalLM(config).save_pretrained(task / "mamba")
    with pytest.raises(ValueError, match=r"Unrecognized configuration .*another backbone") as error:
        LearnedRewardModel.from_pretrained(task / "mamba")
    assert len(str(error.value)) < 400


def test_cards_name_what_a_model_was_made_from_through_the_warm_start(tmp_path) -> None:
    (tmp_path / "stages").mkdir()
    for folder in ("sft", "reward_model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "stages/sft.json").write_text('{"model": "configs/small-lm.json"}')
    (tmp_path / "stages/reward.json").write_text('{"model": "sft"}')
    assert base_of(str(tmp_path / "sft")) == "small-lm"
    assert base_of(str(tmp_path / "reward_model")) == "small-lm"


def test_likelihood_is_by_the_reference_where_one_is_named(own, tmp_path) -> None:  # noqa: F811
    """A loop's rounds have no warm start of their own."""
    common = train.Common(run=tmp_path, device="cpu", dtype="float32")
    with pytest.raises(FileNotFoundError, match=r"train\.py sft"):
        reward_function(common, "likelihood", None)
    reward = reward_function(common, {"likelihood": 1.0}, None, str(own / "lm"))
    assert reward(prompts=["The film"], completions=[" is good."])[0] < 0
    here, there = (
        digest_of_reward(common, train.PPO(reward="likelihood", reference=lm))
        for lm in (None, str(own / "lm"))
    )
    assert here != there


def test_tuning_by_metrics_needs_no_reward_model(tmp_path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    for reward, missing in (("length", False), ({"learned": 1.0}, True)):
        given = train.PPO(prompts=tmp_path / "prompts.txt", reward=reward)
        how = (train.Common(run=tmp_path), train.Tune(ppo=given, n_prompts=2), tmp_path / "tune")
        if missing:
            with pytest.raises(FileNotFoundError, match=re.escape("train.py reward")):
                told_to_trials(*how)
        else:
            (tmp_path / "tune").mkdir()
            assert told_to_trials(*how).reward_model is None
