"""The supervised warm start."""

import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2, tiny_llama

from agents import sft
from agents.sft import warm_start, whole_texts

TEXTS = ["abc", "abcabc", "abcabcabc", "abcabcabcabc"] * 25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_a_pattern_and_its_end(dtype: str) -> None:
    """Uniform choice among 9 tokens costs 2.2 nats; the pattern's entropy is 0.35 at most."""
    tokenizer = letter_tokenizer("abc")
    lm = tiny_gpt2(len(tokenizer))
    report = warm_start(
        lm, tokenizer, TEXTS, epochs=8, batch_size=8, learning_rate=1e-2, dtype=dtype
    )
    assert report.loss_before > 1.5 and report.loss_after < 0.4
    assert report.n_held_out == 10 and report.n_texts == 90
    with th.no_grad():
        ids = th.tensor([tokenizer("abc" * 4)["input_ids"]])
        assert int(lm(input_ids=ids).logits[0, -1].argmax()) == tokenizer.eos_token_id


def test_the_loss_is_transformers_own() -> None:
    tokenizer, lm = letter_tokenizer("abc"), tiny_llama(6)
    report = warm_start(lm, tokenizer, TEXTS[:20], max_steps=1, learning_rate=0.0, held_out=2)
    texts = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in TEXTS[:20]]
    import random

    random.Random(0).shuffle(texts)
    total = tokens = 0.0
    with th.no_grad():
        for ids in texts[:2]:
            x = th.tensor([ids])
            total += float(lm(input_ids=x, labels=x).loss) * (len(ids) - 1)
            tokens += len(ids) - 1
    assert report.loss_after == pytest.approx(total / tokens, abs=1e-4)


def test_only_the_last_layers_learn() -> None:
    tokenizer, lm = letter_tokenizer("abc"), tiny_llama(6, layers=3)
    before = {name: p.clone() for name, p in lm.named_parameters()}
    warm_start(lm, tokenizer, TEXTS, max_steps=2, learning_rate=1e-2, trainable_layers=1)
    moved = {name for name, p in lm.named_parameters() if not p.equal(before[name])}
    assert moved and all(n.startswith(("model.layers.2.", "model.norm.")) for n in moved)
    with pytest.raises(ValueError, match="trainable_layers >= 0 of the 3 layers"):
        warm_start(lm, tokenizer, TEXTS, trainable_layers=-1)


def test_a_loss_that_is_not_finite_stops_before_any_parameter_changes(
    tokenizer, monkeypatch
) -> None:
    lm = tiny_gpt2(len(tokenizer))
    before = [p.clone() for p in lm.parameters()]
    right = sft._Learner.log_probs
    monkeypatch.setattr(sft._Learner, "log_probs", lambda *given: right(*given) * float("nan"))
    with pytest.raises(FloatingPointError, match="expected a finite loss, got nan at step 0"):
        warm_start(lm, tokenizer, TEXTS, max_steps=2)
    assert all(old.equal(new) for old, new in zip(before, lm.parameters(), strict=True))


def test_pad_is_eos_and_the_end_is_still_learned() -> None:
    eos = 5
    batch = whole_texts(
        [{"input_ids": [0, 1, eos], "n_given": 1}, {"input_ids": [2, eos], "n_given": 1}]
    )
    tokens = batch.ids[batch.row, batch.position + 1]
    assert tokens.tolist() == [1, eos, eos]


def test_texts_that_cannot_end_are_refused() -> None:
    tokenizer = letter_tokenizer("abc")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS token"):
        warm_start(tiny_llama(6), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="at least two texts"):
        warm_start(tiny_llama(6), letter_tokenizer("abc"), ["a"])
