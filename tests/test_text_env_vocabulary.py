"""Tokens: masks, end tokens, stop texts across tokens, and text from ids."""

import pytest
from text_env_fixtures import character_tokenizer, gpt2_tokenizer, llama_tokenizer

from text_env import TextEnvironment
from text_env.vocabulary import Vocabulary, load_tokenizer

TOKENIZERS = {"gpt2": gpt2_tokenizer, "llama": llama_tokenizer}


def play(tokenizer, prompt, completion_ids, **changes):
    """Step one environment through these ids; its last info, and whether it ended."""
    arguments = {
        "tokenizer": tokenizer,
        "prompts": [prompt],
        "reward_fn": lambda prompts, completions, **columns: [0.0] * len(prompts),
        "max_new_tokens": 40,
        **changes,
    }
    env = TextEnvironment(**arguments)
    env.reset(seed=0)
    for place, token in enumerate(completion_ids):
        _, _, terminated, _, info = env.step(int(token))
        if terminated:
            assert info["n_tokens"] == place + 1
            return info
    return None


def continuation_ids(tokenizer, prompt, completion):
    """Ids that a text adds to a prompt's."""
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + completion)["input_ids"]
    assert whole[: len(before)] == before, "this text's tokens do not begin with the prompt's"
    return whole[len(before) :]


def test_special_tokens_are_off_and_eos_is_on():
    allowed = Vocabulary(character_tokenizer()).allowed_tokens
    assert allowed.tolist() == [False, False, True, False] + [True] * 10
    assert not allowed.flags.writeable


def test_pad_that_is_eos_stays_on():
    tokenizer = character_tokenizer(pad_token="<eos>")
    assert Vocabulary(tokenizer).allowed_tokens[2]
    vocabulary = Vocabulary(gpt2_tokenizer())  # one token for BOS, EOS, unknown and padding
    assert vocabulary.allowed_tokens.all() and vocabulary.is_eos.sum() == 1


def test_padded_embedding_and_holes():
    vocabulary = Vocabulary(character_tokenizer(), size=20)
    assert vocabulary.size == 20 and not vocabulary.allowed_tokens[14:].any()
    with pytest.raises(
        ValueError, match="vocab_size: expected at least 14, the tokenizer's, got 5"
    ):
        Vocabulary(character_tokenizer(), size=5)


@pytest.mark.parametrize(("given", "expected"), [(None, [2]), (4, [4]), ([2, 13], [2, 13])])
def test_end_tokens(given, expected):
    vocabulary = Vocabulary(character_tokenizer(), eos_token_ids=given)
    assert vocabulary.is_eos.nonzero()[0].tolist() == expected
    assert vocabulary.allowed_tokens[expected].all()


def test_no_end_token():
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    vocabulary = Vocabulary(tokenizer)
    assert not vocabulary.is_eos.any() and vocabulary.allowed_tokens.any()


def test_restriction():
    vocabulary = Vocabulary(character_tokenizer(), allowed_token_ids=[4, 5, 0])
    assert vocabulary.allowed_tokens.nonzero()[0].tolist() == [2, 4, 5]
    assert vocabulary.allowed_before_eos.nonzero()[0].tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"allowed_token_ids: expected ids in \[0, 14\), got 14"):
        Vocabulary(character_tokenizer(), allowed_token_ids=[14])
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="at least one ordinary token, got none"):
        Vocabulary(tokenizer, allowed_token_ids=[0])


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "completion", [" world and people", "s", " 中文字", "é!\n", " a  b ", "\n中"]
)
def test_completion_keeps_leading_space_and_characters(name, completion):
    tokenizer = TOKENIZERS[name]()
    ids = continuation_ids(tokenizer, "hello", completion)
    info = play(tokenizer, "hello", [*ids, tokenizer.eos_token_id])
    assert (info["completion"], info["finish_reason"]) == (completion, "eos")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_chinese_characters_over_several_tokens(name):
    tokenizer = TOKENIZERS[name]()
    ids = continuation_ids(tokenizer, "hello", "中文")
    assert len(ids) == 6  # three bytes each
    whole = play(tokenizer, "hello", ids, max_new_tokens=6)
    assert whole["completion"] == "中文"
    cut = play(tokenizer, "hello", ids, max_new_tokens=5)
    assert "\N{REPLACEMENT CHARACTER}" in cut["completion"]  # the fifth byte ends no character


def test_bytes_that_join_the_prompts_bytes():
    """A byte-fallback decoder spoils a run of bytes for one that is wrong, prompt and all."""
    tokenizer = llama_tokenizer()
    first_byte = tokenizer.convert_tokens_to_ids("<0xE4>")
    info = play(tokenizer, "hello中", [first_byte, tokenizer.eos_token_id])
    assert info["completion"] == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (" hello world", "lo wo", " hel"),
        (" a film. Yes", ". ", " a film"),
        (" the people", " ", ""),
        (" 中文字", "文", " 中"),
        (" a\n\nb", "\n\n", " a"),
        (" the world", ("zzz", "orl", "wor"), " the "),
    ],
)
def test_stop_texts_across_tokens(name, text, stop, expected):
    tokenizer = TOKENIZERS[name]()
    info = play(tokenizer, "hello", continuation_ids(tokenizer, "hello", text), stop=stop)
    assert (info["completion"], info["finish_reason"]) == (expected, "stop")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_is_found_as_soon_as_it_is_there(name):
    """Against the slow way: decode and look after every token, whatever the token is."""
    tokenizer = TOKENIZERS[name]()
    text = " hello to the people of this great world, 中文 and a film\n"
    ids = continuation_ids(tokenizer, "hello", text)
    for stop in ("th", " th", "e ", "文", ", ", "f", "\n", "ld, 中"):
        info = play(tokenizer, "hello", ids, stop=stop, max_new_tokens=len(ids))
        before = tokenizer.decode(tokenizer("hello")["input_ids"], skip_special_tokens=True)
        for n in range(1, len(ids) + 1):
            whole = tokenizer("hello")["input_ids"] + ids[:n]
            if stop in tokenizer.decode(whole, skip_special_tokens=True)[len(before) :]:
                break
        assert (info["n_tokens"], info["finish_reason"]) == (n, "stop"), stop
        assert stop not in info["completion"]


def test_stop_does_not_match_in_the_prompt():
    tokenizer = character_tokenizer()
    assert play(tokenizer, "ab", [5, 4], stop="bb") is None  # "ab" + "ba"
    assert play(tokenizer, "ab", [5, 5], stop="bb")["completion"] == ""


def test_end_token_comes_before_stop_and_stop_before_length():
    tokenizer = character_tokenizer()
    assert play(tokenizer, "a", [4, 2], max_new_tokens=2, stop="b")["finish_reason"] == "eos"
    assert play(tokenizer, "a", [4, 5], max_new_tokens=2, stop="b")["finish_reason"] == "stop"
    assert play(tokenizer, "a", [4, 4], max_new_tokens=2, stop="b")["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["", ("a", ""), (3,)])
def test_stop_must_be_texts(stop):
    with pytest.raises(ValueError, match="stop: expected non-empty texts"):
        Vocabulary(character_tokenizer(), stop=stop)


def test_stop_that_is_a_special_token():
    with pytest.raises(ValueError, match=r"'<eos>' is a special token.*eos_token_ids"):
        Vocabulary(character_tokenizer(), stop="<eos>")
    Vocabulary(character_tokenizer(), stop="<eos>", skip_special_tokens=False)


@pytest.mark.parametrize(("skip", "expected"), [(True, "ab"), (False, "a<pad>b")])
def test_special_tokens_in_completions(skip, expected):
    info = play(character_tokenizer(), "a", [4, 0, 5, 2], skip_special_tokens=skip)
    assert info["completion"] == expected


def test_tokenizer_from_a_folder(tmp_path):
    gpt2_tokenizer().save_pretrained(tmp_path / "tok")
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert tokenizer("hello film")["input_ids"] == gpt2_tokenizer()("hello film")["input_ids"]
    with pytest.raises(ValueError, match="tokenizer: expected the folder or hub id of one, got"):
        load_tokenizer(tmp_path)
