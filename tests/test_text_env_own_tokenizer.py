"""A tokenizer learned from texts, and a model built for it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch as th

from agents.language_model import build_lm, check_fit
from text_env import TextEnvironment
from text_env.own_tokenizer import learn_tokenizer

REVIEWS = [
    "这部电影很好看，演员也很好。",
    "这部电影不好看。",
    "a good film",
    "房间很好，服务很好",
] * 3


def test_texts_come_back_and_frequent_ones_are_short() -> None:
    tokenizer = learn_tokenizer(REVIEWS, 300)
    assert len(tokenizer) == 300
    for text in ("这部电影很好看", "  two  spaces\n", "ünknown 😀 字"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("很好")["input_ids"]) < 3 and len(tokenizer("😀")["input_ids"]) == 4
    assert learn_tokenizer(REVIEWS, 300).get_vocab() == tokenizer.get_vocab()
    assert tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 1
    with pytest.raises(ValueError, match="at least 258, the bytes and two special tokens, got 257"):
        learn_tokenizer(REVIEWS, 257)


def test_characters_of_several_tokens_reach_the_reward_whole() -> None:
    seen: list[str] = []

    def reward(prompts, completions, **_):
        seen.extend(completions)
        return [0.0] * len(completions)

    tokenizer = learn_tokenizer(["x"], 258)
    ids = [*tokenizer("好看")["input_ids"], tokenizer.eos_token_id]
    assert len(ids) == 7
    env = TextEnvironment(tokenizer=tokenizer, prompts=["很"], reward_fn=reward, max_new_tokens=9)
    env.reset(seed=0)
    for token in ids:
        *_, info = env.step(np.int64(token))
    assert seen == ["好看"] == [info["completion"]]


def test_a_model_is_built_for_the_tokenizer(tmp_path) -> None:
    tokenizer = learn_tokenizer(REVIEWS, 270)
    small = json.loads(Path("configs/small-lm.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps({**small, "hidden_size": 32}))
    th.manual_seed(0)
    lm = build_lm(tmp_path / "small.json", tokenizer)
    check_fit(lm, len(tokenizer))
    assert lm.get_output_embeddings().weight.shape == (270, 32)
    assert lm.config.eos_token_id == 0 and lm.config.pad_token_id == 1
    (tmp_path / "bad.json").write_text('{"model_type": "no such"}')
    for name, message in (("bad.json", "config of a causal LM"), ("x.json", "expected the JSON")):
        with pytest.raises(ValueError, match=message):
            build_lm(tmp_path / name, tokenizer)
