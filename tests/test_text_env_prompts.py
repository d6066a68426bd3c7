"""Prompts: sources, errors with their place, tokens, draw order, and the split by hash."""

import json
from collections import Counter

import numpy as np
import pytest
from text_env_fixtures import arguments, character_tokenizer, llama_tokenizer

from text_env import PromptSet, TextEnvironment, load_prompts, split_by_hash
from text_env.prompts import (
    RESERVED_COLUMNS,
    FixedOrder,
    ShuffledOrder,
    beginning,
    load_examples,
    whole_text,
)

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}\n{% endfor %}a"


def test_list_of_texts_and_of_dicts():
    assert load_prompts(["ab", "cd"]) == [{"prompt": "ab"}, {"prompt": "cd"}]
    rows = [{"prompt": "ab", "reference": "x"}, {"prompt": "cd", "reference": "y"}]
    assert load_prompts(iter(rows)) == rows


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "ab\n\n c d \n", [{"prompt": "ab"}, {"prompt": " c d "}]),
        ("p.txt", "ab\r\ncd", [{"prompt": "ab"}, {"prompt": "cd"}]),
        (
            "p.jsonl",
            '{"prompt": "ab", "k": 1}\n\n{"prompt": "c\u2028d", "k": 2}\n',
            [{"prompt": "ab", "k": 1}, {"prompt": "c\u2028d", "k": 2}],
        ),
        ("p.jsonl", '"ab"\n"cd"', [{"prompt": "ab"}, {"prompt": "cd"}]),
        (
            "p.csv",
            '\ufeffprompt,k\n"a,\nb",1\ncd,2\n',
            [{"prompt": "a,\nb", "k": "1"}, {"prompt": "cd", "k": "2"}],
        ),
    ],
)
def test_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert load_prompts(path) == expected
    assert load_prompts(str(path)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"p\.jsonl, line 3: expected a JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}', r'line 2: expected the key "prompt", got'),
        ("p.jsonl", b'{"prompt": "a"}\n[1]', r"line 2: expected a text, chat messages"),
        ("p.jsonl", b'{"prompt": "a", "k": 1}\n{"prompt": "b"}', r"line 2: expected the columns"),
        ("p.jsonl", b'{"prompt": 3}', r"line 1: expected a text or chat messages .* got int"),
        ("p.jsonl", b'"a"\n"\xff"', r"line 2: expected UTF-8"),
        ("p.jsonl", b"\n \n", r"at least one prompt, got none from the file .*p\.jsonl"),
        ("p.txt", b"", r"at least one prompt, got none from the file"),
        ("p.csv", b"text\na\n", r'line 2: expected the key "prompt"'),
        ("p.csv", b"prompt,k\na,1\nb\n", r"line 3: expected 2 fields"),
        ("p.csv", b'prompt,k\na,1\n"b,2\n', r"line \d: expected CSV"),
        ("p.parquet", b"", r"expected a file that ends in .jsonl, .csv, .txt"),
    ],
)
def test_file_errors_name_their_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt.*does not exist"):
        load_prompts(tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "at least one prompt, got none from an empty set"),
        ({"prompt": ["a"]}, "expected a path or an iterable of prompts, got dict"),
        (3, "expected a path or an iterable of prompts, got int"),
        ([3], "prompt 0: expected a text"),
        ([{"role": "user", "content": "a"}], r"pass one conversation as \[\[\.\.\.messages"),
    ],
)
def test_source_errors(source, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(source)


@pytest.mark.parametrize("name", sorted(RESERVED_COLUMNS - {"prompt"}))
def test_columns_that_the_environment_uses_itself(name):
    with pytest.raises(ValueError, match="column names that the environment does not use"):
        PromptSet([{"prompt": "a", name: 1}], character_tokenizer())


def test_columns_must_be_the_same_in_each_row():
    rows = [{"prompt": "a", "k": 1}, {"prompt": "b"}]
    with pytest.raises(ValueError, match=r"prompt 1: expected the columns \['k'\].*got \[\]"):
        PromptSet(rows, character_tokenizer())


def test_ids_and_lengths():
    prompts = PromptSet(["ab", "efg"], character_tokenizer())
    assert (len(prompts), prompts.max_tokens) == (2, 3)
    assert prompts[1].ids.tolist() == [8, 9, 10]
    assert prompts[1].text == "efg"


def test_too_long():
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match=r"prompt 1 \('efg'\): expected at most 2 tokens, got 3"):
        PromptSet(["ab", "efg"], tokenizer, max_tokens=2)
    cut = PromptSet(["ab", "efg"], tokenizer, max_tokens=2, too_long="truncate_left")
    assert cut[1].ids.tolist() == [9, 10]
    assert cut[1].text == "efg"
    with pytest.raises(ValueError, match="prompt_too_long: expected"):
        PromptSet(["ab"], tokenizer, too_long="truncate")


def test_truncation_keeps_bos():
    tokenizer = llama_tokenizer()
    ids = tokenizer("hello world")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    cut = PromptSet(["hello world"], tokenizer, max_tokens=2, too_long="truncate_left")
    assert cut[0].ids.tolist() == [ids[0], ids[-1]]


def test_empty_prompt_needs_bos():
    with pytest.raises(ValueError, match=r"prompt 1 \(''\): expected at least one token, got none"):
        PromptSet(["a", ""], character_tokenizer())
    tokenizer = llama_tokenizer()
    assert PromptSet([""], tokenizer)[0].ids[0] == tokenizer.bos_token_id


def test_chat_messages(tmp_path):
    tokenizer = llama_tokenizer()
    chat = [{"role": "user", "content": "hello"}]
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        PromptSet([chat], tokenizer)
    tokenizer.chat_template = TEMPLATE
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": chat}))
    for source in ([chat], [{"prompt": chat}], path):
        prompt = PromptSet(source, tokenizer)[0]
        assert prompt.text == "uhello\na"
        # the template brings its own special tokens, so none are added
        assert prompt.ids.tolist() == tokenizer("uhello\na", add_special_tokens=False)["input_ids"]
    mixed = PromptSet(["hello", chat], tokenizer)
    assert [mixed[i].text for i in range(2)] == ["hello", "uhello\na"]
    assert mixed[0].ids[0] == tokenizer.bos_token_id


def test_shuffled_order_is_without_replacement_and_uniform():
    order = ShuffledOrder(7, np.random.default_rng(0))
    passes = [[order.draw() for _ in range(7)] for _ in range(3)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1]
    counts = Counter()
    for seed in range(3000):
        order = ShuffledOrder(3, np.random.default_rng(seed))
        counts[tuple(order.draw() for _ in range(3))] += 1
    # six permutations, 500 each, standard deviation 20
    assert len(counts) == 6 and all(400 < n < 600 for n in counts.values())


def test_fingerprint_is_of_texts_tokens_and_columns():
    def fingerprint(rows):
        return PromptSet(rows, character_tokenizer()).fingerprint()

    rows = [{"prompt": "ab", "k": 1, "of": {(1, 2): object()}}, {"prompt": "cd", "k": 2, "of": 3}]
    same = [{"of": {(1, 2): object()}, "k": 1, "prompt": "ab"}, rows[1]]
    assert fingerprint(rows) == fingerprint(same)
    others = [rows[::-1], [{**rows[0], "prompt": "abb"}, rows[1]], [{**rows[0], "k": 3}, rows[1]]]
    assert len({fingerprint(other) for other in [rows, *others]}) == 4


@pytest.mark.parametrize("drawn", [0, 1, 4, 5, 8])
def test_shuffled_order_state(drawn):
    generator = np.random.default_rng(1)
    order = ShuffledOrder(5, generator)
    for _ in range(drawn):
        order.draw()
    state = json.loads(json.dumps(order.get_state()))
    other_generator = np.random.default_rng(99)
    other = ShuffledOrder(5, other_generator)
    other.set_state(state)
    other_generator.bit_generator.state = generator.bit_generator.state
    assert [order.draw() for _ in range(12)] == [other.draw() for _ in range(12)]


def test_fixed_order_shares_the_prompts_out():
    rows = [FixedOrder(5, row, 2) for row in range(2)]
    drawn = [[order.draw() for _ in range(3)] for order in rows]
    assert drawn == [[0, 2, 4], [1, 3, 0]]


def test_split_by_hash():
    texts = [f"text {i}" for i in range(4000)]
    fractions = {"train": 0.7, "empty": 0.0, "test": 0.3}
    parts = split_by_hash(texts, fractions)
    assert list(parts) == ["train", "empty", "test"] and parts["empty"] == []
    assert sorted(parts["train"] + parts["test"]) == sorted(texts)
    assert abs(len(parts["train"]) / 4000 - 0.7) < 0.03  # 4 standard deviations
    # depends on the text alone: order and company do not matter
    again = split_by_hash(reversed(texts[:100]), fractions)
    assert set(again["test"]) == set(parts["test"]) & set(texts[:100])


@pytest.mark.parametrize("twin", ["A  Film", " a film\n", "\uff41 film", "a film"])
def test_split_by_hash_keeps_equal_texts_together(twin):
    for share in np.linspace(0.05, 0.95, 19):
        parts = split_by_hash(["a film", twin], {"one": share, "two": 1 - share})
        assert sorted(map(len, parts.values())) == [0, 2]


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}])
def test_split_by_hash_errors(fractions):
    with pytest.raises(ValueError, match="expected shares that sum to 1"):
        split_by_hash(["a"], fractions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four five six seven eight nine", "one two three four"),
        ("one two three", "one"),
        ("one", "o"),
        ("这部电影很好看", "这部电"),
        ("x", "x"),
    ],
)
def test_beginning(text, expected):
    assert beginning(text) == expected


def test_texts_and_rewards():
    seen = {}

    def fit(texts, rewards):
        seen["texts"], seen["rewards"] = texts, rewards
        return lambda prompts, completions, **columns: [2.5] * len(prompts)

    changes = {"prompts": None, "reward_fn": None, "max_new_tokens": 1}
    env = TextEnvironment(
        **arguments(**changes, texts=["ab cd ef gh", "ab cd"], rewards=[1, -1], fit_reward=fit)
    )
    assert seen == {"texts": ["ab cd ef gh", "ab cd"], "rewards": [1.0, -1.0]}
    env.reset(seed=0)
    _, reward, _, _, info = env.step(4)
    assert reward == 2.5 and info["prompt"] in ("ab cd", "ab")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ["a"], "rewards": [1.0]}, "fit_reward.*got not all three"),
        ({"texts": ["a"], "rewards": [], "fit_reward": len}, "rewards: expected 1, one per text"),
        ({"texts": [" "], "rewards": [1.0], "fit_reward": len}, "non-empty texts"),
        ({"texts": ["a"], "rewards": [float("nan")], "fit_reward": len}, "finite numbers"),
        ({"texts": ["a"], "prompts": ["b"]}, "got both"),
        ({}, "prompts: expected a value"),
        ({"prompts": ["a"]}, "reward_fn: expected a value"),
    ],
)
def test_texts_and_rewards_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        TextEnvironment(**arguments(**{"prompts": None, "reward_fn": None, **changes}))


def test_examples_are_texts_or_pairs(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text(
        '"ab"\n{"text": "cd", "label": 1}\n{"prompt": "e", "completion": " f", "reference": "x"}\n'
        '{"completion": "g"}\n{"prompt": "h", "reference": ["i", "j"]}\n'
        '{"prompt": "k", "reference": "l"}\n'
    )
    pairs = [("e", " f"), ("", "g"), ("h", "i"), ("k", "l")]
    assert load_examples(path) == ["ab", "cd", *pairs]
    assert [whole_text(example) for example in load_examples(path)] == [
        "ab",
        "cd",
        "e f",
        "g",
        "hi",
        "kl",
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a"}',
        '{"reference": "a"}',
        '{"prompt": "a", "reference": []}',
        '{"prompt": "a", "reference": [3]}',
        '{"prompt": "a", "completion": ["b"]}',
        '{"prompt": " ", "completion": ""}',
        '{"text": 3}',
        "3",
    ],
)
def test_examples_errors(tmp_path, line):
    path = tmp_path / "e.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r'e\.jsonl, line 1: expected a text, or the key "text"'):
        load_examples(path)
