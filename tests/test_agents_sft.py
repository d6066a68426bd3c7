"""The supervised warm start."""

import random

import pytest
import torch as th
from conftest import letter_tokenizer, tiny_gpt2, tiny_llama

from agents.sft import warm_start
from agents.whole_texts import TextModel, conversation_row, encode, whole_texts

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
    right = TextModel.log_probs
    monkeypatch.setattr(TextModel, "log_probs", lambda *given: right(*given) * float("nan"))
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


def test_of_a_pair_the_completion_alone_is_learned() -> None:
    """Prompts are noise that no model could learn; the answer is always "ab", then EOS."""
    tokenizer = letter_tokenizer("abc")
    rows = encode(tokenizer, [("cc", "ab"), "cab"])
    a, b, c, eos = (*tokenizer.convert_tokens_to_ids(list("abc")), tokenizer.eos_token_id)
    assert rows[0] == {"input_ids": [c, c, a, b, eos], "n_given": 2}
    assert rows[1] == {"input_ids": [c, a, b, eos], "n_given": 1}
    batch = whole_texts(rows)
    assert batch.ids[batch.row, batch.position + 1].tolist() == [a, b, eos, a, b, eos]
    rng = random.Random(0)
    pairs = [("".join(rng.choices("abc", k=6)), "ab") for _ in range(100)]
    lm = tiny_gpt2(len(tokenizer))
    report = warm_start(lm, tokenizer, pairs, epochs=8, batch_size=8, learning_rate=1e-2)
    assert report.loss_after < 0.05  # over the prompts too it would be above 0.6


def test_pairs_whose_completion_is_cut_off_whole_are_passed_over() -> None:
    tokenizer, lm = letter_tokenizer("abc"), tiny_llama(6)
    pairs = [("aaaa", "b"), ("a", "b"), ("a", "c")]
    report = warm_start(lm, tokenizer, pairs, max_tokens=4, max_steps=1)
    assert report.n_texts + report.n_held_out == 2
    with pytest.raises(ValueError, match="max_tokens=1 leaves something to learn, got 0 of 3"):
        warm_start(lm, tokenizer, pairs, max_tokens=1, max_steps=1)


def test_texts_that_cannot_end_are_refused() -> None:
    tokenizer = letter_tokenizer("abc")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS token"):
        warm_start(tiny_llama(6), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="at least two texts"):
        warm_start(tiny_llama(6), letter_tokenizer("abc"), ["a"])


def chat_tokenizer(template: str | None = None):
    """Roles are "u" and ">", and a turn ends with <eos> and a space's stand-in, "_"."""
    tokenizer = letter_tokenizer("abcdefu_")
    tokenizer.chat_template = template or (
        "{% for m in messages %}{{ 'u' if m.role == 'user' else '>' }}{{ m.content }}<eos>_"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    return tokenizer


CHAT = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]


def test_of_conversations_the_answers_and_their_ends_are_learned() -> None:
    tokenizer = chat_tokenizer()
    row = conversation_row(tokenizer, CHAT)
    assert tokenizer.decode(row["input_ids"]) == "uab<eos>_>cd<eos>_ue<eos>_>f<eos>_"
    batch = whole_texts([row])
    learned = batch.ids[batch.row, batch.position + 1]
    assert tokenizer.decode(learned) == "cd<eos>f<eos>"


def test_a_warm_start_on_conversations_answers_and_does_not_learn_the_users_part() -> None:
    tokenizer = chat_tokenizer()
    lm = tiny_gpt2(len(tokenizer))
    chats = [[{**CHAT[0], "content": x}, {**CHAT[1], "content": x + x}] for x in "abcd"] * 20
    report = warm_start(lm, tokenizer, chats, epochs=6, batch_size=8, learning_rate=1e-2)
    assert report.loss_after < 0.1 < report.loss_before
    with th.no_grad():
        ids = tokenizer("ub<eos>_>")["input_ids"]
        logits = lm(input_ids=th.tensor([ids])).logits[0]
        assert tokenizer.decode(logits[-1].argmax()) == "b"
        # behind the user's sign a, b, c and d are equally likely: log 4 nats, had it been learned
        assert float(-logits[0].log_softmax(0)[:4].mean()) > 1.5 * 1.386


def test_conversations_that_cannot_be_learned_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        conversation_row(letter_tokenizer("abc"), CHAT)
    for template in (
        "{% for m in messages %}{{ m.content }}{% endfor %}",  # no end
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}>",  # not behind its prompt
    ):
        with pytest.raises(ValueError, match="expected one that shows an answer behind"):
            conversation_row(chat_tokenizer(template), CHAT)
    with pytest.raises(ValueError, match="max_tokens=3 leaves something to learn, got 0 of 2"):
        warm_start(tiny_gpt2(11), chat_tokenizer(), [CHAT, CHAT], max_tokens=3)
