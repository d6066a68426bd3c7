"""Ten thousand bad lines into each reader of JSON lines: each refused by number, good ones kept."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reward_models import read_feedback
from reward_models.feedback import tasks_from_jsonl
from text_env.prompts import load_examples, load_prompts

N_LINES = 10_000

READERS: dict[str, tuple[Callable, str]] = {
    "prompts": (load_prompts, '{"prompt": "The film %d", "reference": "good"}'),
    "texts": (load_examples, '{"text": "The film %d is good"}'),
    "feedback": (read_feedback, '{"prompt": "a", "completion": "b %d", "label": true}'),
    "comparison": (read_feedback, '{"prompt": "a", "chosen": "b %d", "rejected": "c"}'),
    "rating": (read_feedback, '{"completion": "b %d", "rating": 2, "scale": [1, 5]}'),
    "tasks": (
        lambda path, refused=None: tasks_from_jsonl(path, "comparison", refused),
        '{"prompt": "a", "completions": ["b %d", "c"], "gold": "first"}',
    ),
    "rating tasks": (
        lambda path, refused=None: tasks_from_jsonl(path, "rating", refused),
        '{"prompt": "a", "completion": "b %d", "scale": [1, 5], "gold": 3}',
    ),
}

VALUES = [
    "null", "true", "NaN", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "9" * 5000, "1e400",
    "0", "-0.0", '""', '" "', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\u2028"',
    '"\U0001f600"',
    "[]", "{}", "[[1]]", '["a"]', '["a", "a"]', '["a", 1]', '["b", "\\udfff"]',
    '"' + "x" * 5000 + '"',
    "[" * 400 + "]" * 400, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900,
    "[1, 5]", "[5, 1]", "[1, 1e999]", "[NaN, 5]", "[1, 1" + "0" * 400 + "]", "[1, 2, 3]",
    "[true, 5]",
]  # fmt: skip

WHOLE = [
    b"[" * 100_000, b'{"prompt":' * 50_000, b"{", b"}", b"null", b"NaN", b"1e999", b'"', b"\x00",
    b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"prompt": "\xed\xa0\x80"}', b"\xc3(", b"[]", b'""',
    b"1" * 5000, b"-", b"{'prompt': 'a'}", b'{"prompt": "a"} {"prompt": "b"}', b"\r{}", b"//",
    b"<html>",
]  # fmt: skip


def bad_line(good: str, rng: random.Random) -> bytes:
    """A line near a good one, or nothing like one; now and then it is good after all."""
    kind = rng.random()
    if kind < 0.15:
        return rng.choice(WHOLE)
    if kind < 0.6:  # another value for one of the keys, or one more key
        values = json.loads(good)
        key = rng.choice([*values, "time", "tie", "origins", "uncertainty", "label", "k\ud800"])
        items = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items() if k != key]
        items.insert(rng.randrange(len(items) + 1), f"{json.dumps(key)}: {rng.choice(VALUES)}")
        return ("{" + ", ".join(items) + "}").encode("utf-8", "surrogatepass")
    if kind < 0.7:  # a key twice
        key = rng.choice(list(json.loads(good)))
        return f'{good[:-1]}, "{key}": {rng.choice(VALUES)}}}'.encode()
    line = bytearray(good.encode())
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(line))
        if rng.random() < 0.5:
            line[place] = rng.choice([b for b in range(256) if b != 10])
        else:
            del line[place]
    return bytes(line)


@pytest.mark.parametrize("name", READERS)
def test_fuzzed_lines(name: str, tmp_path: Path) -> None:
    read, good = READERS[name]
    rng = random.Random(name)
    lines = [(good % 0).encode()]
    is_good = {1}
    for number in range(2, N_LINES + 2):
        if rng.random() < 0.1:
            lines.append((good % number).encode() + rng.choice([b"", b"\r", b"  "]))
            is_good.add(number)
        else:
            lines.append(bad_line(good % number, rng))
    file = tmp_path / "fuzzed.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    start = time.monotonic()
    refused: list[str] = []
    kept = read(file, refused=refused)
    assert time.monotonic() - start < 120
    numbers = []
    for message in refused:
        place, _, reason = message.removeprefix(f"{file}, line ").partition(": ")
        assert reason.strip() and len(message) < 1000
        numbers.append(int(place))
    assert numbers == sorted(set(numbers)) and not is_good & set(numbers)
    assert len(numbers) > N_LINES // 3
    assert len(kept) >= len(is_good)
    text = repr(kept)
    for number in is_good - {1}:
        assert f" {number}" in text
    text.encode()  # nothing kept has half a character in it
    with pytest.raises(ValueError, match="line") as raised:
        read(file)
    assert str(raised.value).startswith(f"{file}, line {numbers[0]}: ")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "prompt": "b"}', "each key once, got 'prompt' twice"),
        (b'{"prompt": "a\\ud83d"}', "half a character"),
        (b'{"prompt": "a\xff"}', "utf-8|UTF-8"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "4300"),
        (b'{"prompt": "a', "JSON object"),
        (b'{"prompt": "a\x00"}', "JSON object"),
    ],
)
def test_what_is_said_about_a_line(name: str, line: bytes, reason: str, tmp_path: Path) -> None:
    read, good = READERS[name]
    file = tmp_path / "f.jsonl"
    file.write_bytes((good % 1).encode() + b"\r\n\r\n" + line + b"\n" + (good % 2).encode())
    with pytest.raises(ValueError, match=rf"f\.jsonl, line 3: .*({reason})"):
        read(file)
    refused: list[str] = []
    assert len(read(file, refused=refused)) == 2 and len(refused) == 1


def test_u2028_ends_no_line_and_nan_beside_what_is_read_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(
        '{"prompt": "a\u2028b", "chosen": "c", "rejected": "d", "margin": NaN}\n', encoding="utf-8"
    )
    assert read_feedback(file)[0].prompt == "a\u2028b"


def test_refused_prompts_of_a_list_and_a_text_file(tmp_path: Path) -> None:
    refused: list[str] = []
    assert load_prompts(["a", 3, {"prompt": "b", "x": 1}, "c"], refused) == [
        {"prompt": "a"},
        {"prompt": "c"},
    ]
    assert [message.split(":")[0] for message in refused] == ["prompt 1", "prompt 2"]
    file = tmp_path / "p.txt"
    file.write_bytes(b"a\n\xff\nb\n")
    refused.clear()
    assert [p["prompt"] for p in load_prompts(file, refused)] == ["a", "b"]
    assert "line 2: expected UTF-8" in refused[0]
    with pytest.raises(ValueError, match="expected at least one prompt"):
        load_prompts([3], refused)


MEASURE = """
import resource, sys
from pathlib import Path
{imports}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
before, refused = peak(), []
kept = read(Path(sys.argv[1]), refused=refused)
print(len(kept), peak() - before, *refused)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "from text_env.prompts import load_prompts as read",
        "from reward_models.feedback.records import read_feedback as read",
    ],
)
def test_memory_is_bounded_on_a_line_of_100_mb(imports: str, tmp_path: Path) -> None:
    """The line alone would take 100 MiB, and twice that as text; the bound is 64 MiB."""
    good = b'{"prompt": "a", "completion": "b", "label": true}\n'
    file = tmp_path / "long.jsonl"
    with file.open("wb") as f:
        f.write(good + b'{"prompt": "')
        for _ in range(100):
            f.write(b"x" * 2**20)
        f.write(b'"}\n' + good)
    code = MEASURE.format(imports=imports)
    run = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    kept, grown, message = run.stdout.split(" ", 2)
    assert kept == "2" and "line 2: expected" in message and "16777216 bytes" in message
    assert float(grown) < 64
