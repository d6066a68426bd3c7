"""Perplexity of texts, a slow second way."""

import numpy as np
import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2

from agents.likelihood import LogLikelihood


def test_it_is_the_mean_over_a_completion_and_its_end(make_lm) -> None:
    tokenizer = letter_tokenizer("abc")
    lm = make_lm(len(tokenizer))
    prompts, completions = ["ab", "c", "cab", "a"], ["ca", "", "abcabc", "b"]
    scores = LogLikelihood(lm, tokenizer)(prompts=prompts, completions=completions, other=[1] * 4)
    for prompt, text, score in zip(prompts, completions, scores, strict=True):
        ids = th.tensor([[*tokenizer(prompt + text)["input_ids"], tokenizer.eos_token_id]])
        with th.no_grad():
            found = lm(input_ids=ids).logits.log_softmax(-1)[0]
        each = [float(found[i, ids[0, i + 1]]) for i in range(len(prompt) - 1, ids.shape[1] - 1)]
        assert score == pytest.approx(np.mean(each), abs=1e-5)


def test_long_texts_are_cut_and_texts_without_an_end_refused() -> None:
    tokenizer = letter_tokenizer("abc")
    likelihood = LogLikelihood(tiny_gpt2(len(tokenizer)), tokenizer)
    assert likelihood(prompts=[], completions=[]).shape == (0,)
    long = likelihood(prompts=["a"] * 2, completions=["b" * 127, "b" * 200])  # 128 positions
    assert long[0] == pytest.approx(long[1], abs=1e-5)
    assert likelihood(prompts=["a" * 128], completions=["b"]) == 0
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected a tokenizer with an EOS token"):
        LogLikelihood(tiny_gpt2(6), tokenizer)
