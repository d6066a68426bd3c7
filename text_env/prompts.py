"""Prompts: where they come from, as text and as ids, and in which order a row draws them.

Leaves out everything that happens after the prompt (`episodes`) and the vocabulary (`vocabulary`).
"""

import csv
import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from text_env.lines import json_lines, refuse, text_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
"""A prompt as its source gives it: "prompt" (a text or chat messages) and further columns."""

Message = dict[str, Any]
"""A chat message: {"role", "content"}."""

Example = str | tuple[str, str] | list[Message]
"""What a warm start learns from: a text, prompt and completion, or a conversation."""

TURNS = "turns"
"""The column of what the user says after each of the assistant's answers, a list of texts."""

RESERVED_COLUMNS = frozenset(
    {
        *("prompt", "prompts", "completion", "completions", "score", "finish_reason", "n_tokens"),
        "token_scores",
        *("episode", "terminal_observation", "TimeLimit.truncated", "final_obs", "final_info"),
    }
)
"""Names that a column cannot have: keys of `info` and keywords of the reward function."""

RESERVED_IN_CONVERSATIONS = frozenset({"messages", "n_turns", "conversations"})
"""The same, where episodes have several turns."""


class Prompt(NamedTuple):
    """One prompt, ready to be put into an observation.

    Attributes:
        text: What the reward function is given. For chat messages, the filled-in chat template.
        ids: Token ids, shape (prompt tokens,), int64.
        columns: The further columns of its record.
        number: Its place in the prompt set, or None if it was given to `reset`.
        messages: The chat messages that it was made of, or None if it is a text.
    """

    text: str
    ids: np.ndarray
    columns: Record
    number: int | None
    messages: list[Message] | None = None


class PromptSet:
    """The prompts of one environment, tokenised once.

    Args:
        source: A path (see `load_prompts`) or an iterable whose items are texts, conversations
            (lists of `{"role", "content"}`), or dicts with the key "prompt" (either of the two) and
            further columns, the same in each item; or with the key "messages", a whole
            conversation, of which the part before the first answer is the prompt and what the user
            says later the column "turns". A `datasets` split is such an iterable.
        tokenizer: Applied as it is by default, special tokens included; conversations go through
            its chat template, with the generation prompt added.
        max_tokens: Longest prompt allowed, in tokens; None takes the longest one given.
        too_long: "error", or "truncate_left" to drop a long prompt's oldest tokens (a leading BOS
            stays). The reward function still gets the whole text.
        conversations: Require chat messages, as the column "turns" does too.

    Raises:
        ValueError: There is no prompt, or one of them is malformed, empty, or too long.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Any],
        tokenizer: "PreTrainedTokenizerBase",
        max_tokens: int | None = None,
        too_long: str = "error",
        conversations: bool = False,
    ) -> None:
        if too_long not in ("error", "truncate_left"):
            raise ValueError(
                f'prompt_too_long: expected "error" or "truncate_left", got {too_long!r}'
            )
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_prompt_tokens: expected at least 1, got {max_tokens}")
        self._tokenizer = tokenizer
        self._too_long = too_long
        records = load_prompts(source)
        self.column_names = _column_names(records[0])
        self.conversations = conversations or TURNS in self.column_names
        reserved = RESERVED_COLUMNS
        if self.conversations:
            reserved = reserved | RESERVED_IN_CONVERSATIONS
        taken = reserved.intersection(self.column_names)
        if taken:
            raise ValueError(
                "prompts: expected column names that the environment does not use itself, "
                f"got {sorted(taken)}; rename them"
            )
        self._columns = [_columns(record) for record in records]
        self._messages = [
            self._messages_of(record, f"prompt {i}") for i, record in enumerate(records)
        ]
        self._texts, ids = self._tokenise([record["prompt"] for record in records])
        self.max_tokens = max_tokens if max_tokens is not None else max(map(len, ids))
        self._ids = [self._fit(row, self._texts[i], f"prompt {i}") for i, row in enumerate(ids)]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._texts)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt at this place."""
        messages = self._messages[index]
        return Prompt(self._texts[index], self._ids[index], self._columns[index], index, messages)

    def encode(self, item: Any) -> Prompt:
        """Turn a prompt from outside the set into a `Prompt`, held to the same rules.

        Args:
            item: A text, a conversation, or a dict with the key "prompt" and the set's columns.
        """
        record = _record(item, "the given prompt")
        _check_columns(record, self.column_names, "the given prompt")
        messages = self._messages_of(record, "the given prompt")
        texts, ids = self._tokenise([record["prompt"]])
        row = self._fit(ids[0], texts[0], "the given prompt")
        return Prompt(texts[0], row, _columns(record), None, messages)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when a prompt, its tokens or columns change.

        Of a column's values only what JSON can hold counts.
        """
        digest = hashlib.sha256()
        for text, ids, columns in zip(self._texts, self._ids, self._columns, strict=True):
            further = json.dumps(sorted(columns.items()), skipkeys=True, default=lambda value: None)
            head = f"{len(text)}:{text}:{len(ids)}:{len(further)}:{further}"
            digest.update(head.encode("utf-8", "surrogatepass"))
            digest.update(ids.tobytes())
        if TURNS in self.column_names:
            turns = [columns[TURNS] for columns in self._columns]
            digest.update(repr(turns).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def _messages_of(self, record: Record, place: str) -> list[Message] | None:
        prompt = record["prompt"]
        messages = None if isinstance(prompt, str) else [dict(message) for message in prompt]
        if self.conversations:
            check_turns(messages, record, place)
        return messages

    def _tokenise(self, prompts: list[Any]) -> tuple[list[str], list[list[int]]]:
        """Texts and ids, tokenised in one call, many times faster than one by one."""
        texts = [p if isinstance(p, str) else self._fill_template(p) for p in prompts]
        ids: list[list[int]] = [[] for _ in texts]
        for is_chat in (False, True):
            rows = [i for i, p in enumerate(prompts) if isinstance(p, str) != is_chat]
            if rows:  # a filled-in template has its special tokens already
                encoded = self._tokenizer([texts[i] for i in rows], add_special_tokens=not is_chat)[
                    "input_ids"
                ]
                for i, row_ids in zip(rows, encoded, strict=True):
                    ids[i] = list(row_ids)
        return texts, ids

    def _fill_template(self, messages: list[Any]) -> str:
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise ValueError(
                "chat messages: expected a tokenizer with a chat template, got one without; "
                "set tokenizer.chat_template or pass texts"
            )
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(text)

    def _fit(self, ids: list[int], text: str, name: str) -> np.ndarray:
        if not ids:
            raise ValueError(
                f"{name} ({shorten(text)}): expected at least one token, got none; "
                "remove it or use a tokenizer that begins a text with BOS"
            )
        if len(ids) > self.max_tokens:
            if self._too_long == "error":
                raise ValueError(
                    f"{name} ({shorten(text)}): expected at most {self.max_tokens} tokens, "
                    f"got {len(ids)}; raise max_prompt_tokens or pass "
                    "prompt_too_long='truncate_left'"
                )
            bos = getattr(self._tokenizer, "bos_token_id", None)
            kept = ids[-self.max_tokens :]
            ids = [ids[0], *kept[1:]] if bos is not None and ids[0] == bos else kept
        return np.asarray(ids, dtype=np.int64)


class PromptOrder(Protocol):
    """The order in which one row goes through a prompt set."""

    def draw(self) -> int:
        """Index of the next prompt."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on from here, as JSON types."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where `get_state` was called."""
        ...


class ShuffledOrder:
    """Every prompt once in random order, then again in a new one.

    The shuffle is Fisher and Yates's, done one draw at a time, so that neither memory nor state
    grow with the prompt set: the state is the shuffle's seed and how far it has come.

    Args:
        size: Number of prompts.
        generator: The row's generator; gives one number for each pass.
    """

    def __init__(self, size: int, generator: np.random.Generator) -> None:
        self._size = size
        self._generator = generator
        self._position = size  # the first draw begins a pass
        self._seed: int | None = None

    def draw(self) -> int:
        """Index of the next prompt."""
        if self._position == self._size:
            self._begin(int(self._generator.integers(2**63)))
        here = self._position
        there = int(self._shuffle.integers(here, self._size))
        drawn = self._moved.get(there, there)
        self._moved[there] = self._moved.pop(here, here)
        self._position += 1
        return drawn

    def get_state(self) -> dict[str, Any]:
        """Seed of the pass under way, and the number of prompts it has given."""
        return {"seed": self._seed, "position": self._position}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Replay the pass up to the stored position."""
        if state["seed"] is None:
            return
        self._begin(state["seed"])
        for _ in range(state["position"]):
            self.draw()

    def _begin(self, seed: int) -> None:
        self._seed = seed
        self._shuffle = np.random.default_rng(seed)
        self._position = 0
        self._moved: dict[int, int] = {}  # place -> the index that a swap has put there


class FixedOrder:
    """The prompts as they were given, shared out: of B rows, row i takes i, i + B, i + 2B, ...

    Args:
        size: Number of prompts.
        row: This row's number.
        num_rows: Number of rows that share the prompts.
    """

    def __init__(self, size: int, row: int, num_rows: int) -> None:
        self._size = size
        self._stride = num_rows
        self._next = row

    def draw(self) -> int:
        """Index of the next prompt; after the last comes the first."""
        index = self._next % self._size
        self._next += self._stride
        return index

    def get_state(self) -> dict[str, Any]:
        """The next place."""
        return {"next": self._next}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from the stored place."""
        self._next = state["next"]


def load_prompts(
    source: str | Path | Iterable[Any], refused: list[str] | None = None
) -> list[Record]:
    """Read prompts from a file or an iterable.

    Args:
        source: A path that ends in `.jsonl` (one object with the key "prompt" or "messages", or
            one text, per line), `.csv` (a header with a column `prompt`), or `.txt` (one prompt per
            line), all UTF-8, blank lines skipped; or an iterable as in `PromptSet`.
        refused: A list that gets "file, line N: reason" for each bad prompt, which is then passed
            over; None raises at the first one. The first good prompt says which columns there are.
            (Bad CSV always raises: its lines hang together.)

    Returns:
        One dict per prompt: "prompt" and the further columns, the same ones in each.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No prompt, a malformed one (named by file and line), or an unknown file type.
    """
    if isinstance(source, str | Path):
        places_and_items = _read_file(Path(source), refused)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise ValueError(
            f"prompts: expected a path or an iterable of prompts, got {type(source).__name__}"
        )
    else:
        places_and_items = ((f"prompt {i}", item) for i, item in enumerate(source))
    records: list[Record] = []
    for place, item in places_and_items:
        try:
            record = _record(item, place)
            _check_columns(record, _column_names(records[0] if records else record), place)
        except ValueError as error:
            refuse(str(error), refused, error)
        else:
            records.append(record)
    if not records:
        name = f"the file {source}" if isinstance(source, str | Path) else "an empty set"
        raise ValueError(f"prompts: expected at least one prompt, got none from {name}")
    return records


def load_examples(path: str | Path, refused: list[str] | None = None) -> list[Example]:
    """Read what is to be learned: whole texts, completions of prompts, or conversations' answers.

    Args:
        path: A `.txt` (one text per line), or a `.jsonl` or `.csv` whose lines have the key `text`;
            or `prompt` and `completion`; or `prompt` and `reference`, a text or a list whose first
            one is taken. A completion stands right behind its prompt: blanks between are its own.
            A line of a `.jsonl` may have the key `messages`: a conversation with an answer.
        refused: As for `load_prompts`.

    Returns:
        Texts, pairs of prompt and completion, and lists of messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No text, or a malformed one (named by file and line).
    """
    examples: list[Example] = []
    for place, item in _read_file(Path(path), refused):
        if isinstance(item, Mapping) and "messages" in item:
            try:
                examples.append(_conversation(item, place))
            except ValueError as error:
                refuse(str(error), refused, error)
            continue
        example = _example(item)
        if example is None or not "".join(example).strip():
            refuse(
                f'{place}: expected a text, or the key "text", or "prompt" and "completion" or '
                f'"reference", got {_shown(item)}',
                refused,
            )
            continue
        examples.append(example)
    if not examples:
        raise ValueError(f"expected at least one text, got none from the file {path}")
    return examples


def parts_of(example: Example) -> list[str]:
    """Return the texts of an example that are tokenised one by one; of a chat, what is said."""
    if isinstance(example, str):
        return [example]
    return [part if isinstance(part, str) else str(part["content"]) for part in example]


def whole_text(example: Example) -> str:
    """Return prompt and completion joined, or what is said in a conversation, a line a message."""
    return ("\n" if isinstance(example, list) else "").join(parts_of(example))


def _conversation(item: Mapping[str, Any], place: str) -> list[Message]:
    _from_conversation(item, place)  # is it one?
    messages = [dict(message) for message in item["messages"]]
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{place}: expected an answer in the conversation, got none")
    return messages


def _example(item: Any) -> str | tuple[str, str] | None:
    if not isinstance(item, Mapping):
        return item if isinstance(item, str) else None
    if "text" in item:
        return item["text"] if isinstance(item["text"], str) else None
    completion = item.get("completion", item.get("reference"))
    if "completion" not in item and isinstance(completion, list) and completion:
        completion = completion[0]
    prompt = item.get("prompt", "" if "completion" in item else None)
    pair = (prompt, completion)
    return pair if isinstance(prompt, str) and isinstance(completion, str) else None


def split_by_hash(texts: Iterable[str], fractions: Mapping[str, float]) -> dict[str, list[str]]:
    """Split texts into parts by a hash of each text, so that equal texts always fall into one part.

    Texts that differ in case, spacing, or Unicode form only count as equal. A text's part depends
    on nothing but the text and the fractions: it stays when other texts come or go.

    Args:
        texts: The texts, order and duplicates are kept within each part.
        fractions: Name of each part and its expected share; the shares sum to 1.

    Returns:
        The texts of each part, in the order of `fractions`.

    Raises:
        ValueError: A share is negative, or they do not sum to 1.
    """
    shares = np.array(list(fractions.values()), dtype=np.float64)
    if not len(shares) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-9:
        raise ValueError(f"fractions: expected shares that sum to 1, got {dict(fractions)}")
    names = [name for name, share in fractions.items() if share > 0]
    bounds = np.cumsum(shares[shares > 0])[:-1]
    parts: dict[str, list[str]] = {name: [] for name in fractions}
    for text in texts:
        parts[names[int(np.searchsorted(bounds, _hash_to_unit(text), side="right"))]].append(text)
    return parts


def beginning(text: str, max_words: int = 4, max_characters: int = 8) -> str:
    """The first few words of a text, at most half of it, as a prompt for the rest.

    Args:
        text: Any text; of one without spaces (Chinese, say) the first characters are taken.
        max_words: Longest beginning, in words.
        max_characters: Longest beginning of a text without spaces, in characters.
    """
    words = text.split()
    if len(words) > 1:
        return " ".join(words[: min(max_words, len(words) // 2)])
    text = text.strip()
    return text[: min(max_characters, max(1, len(text) // 2))]


def shorten(text: str, width: int = 60) -> str:
    """A text quoted for an error message, cut to a width."""
    return repr(text if len(text) <= width else text[: width - 3] + "...")


def check_turns(messages: list[Message] | None, columns: Mapping[str, Any], place: str) -> None:
    """Require what an episode of several turns begins with.

    Raises:
        ValueError: The prompt is no conversation, or its column `turns` no list of texts.
    """
    if messages is None:
        raise ValueError(
            f"{place}: expected chat messages, as the episodes have several turns, got a text; "
            f"pass [{{'role': 'user', 'content': …}}], or rename the column {TURNS!r}"
        )
    turns = columns.get(TURNS, [])
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise ValueError(f"{place}: expected a list of texts as {TURNS}, got {shorten(str(turns))}")
    for text in turns:
        if not isinstance(text, str):
            raise ValueError(f"{place}: expected texts in {TURNS}, got {type(text).__name__}")


def _column_names(record: Record) -> tuple[str, ...]:
    return tuple(name for name in record if name != "prompt")


def _columns(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "prompt"}


def _check_columns(record: Record, names: Sequence[str], place: str) -> None:
    if set(_column_names(record)) != set(names):
        raise ValueError(
            f"{place}: expected the columns {sorted(names)} as in the first prompt, "
            f"got {sorted(_column_names(record))}"
        )


def _record(item: Any, place: str) -> Record:
    """Bring one item to `{"prompt": text or messages, **columns}`."""
    if isinstance(item, str) or _is_chat(item):
        return {"prompt": item}
    if not isinstance(item, Mapping):
        raise ValueError(
            f'{place}: expected a text, chat messages, or a dict with the key "prompt", '
            f"got {type(item).__name__}"
        )
    if "messages" in item and "prompt" not in item:
        return _from_conversation(item, place)
    if "prompt" not in item:
        hint = "; pass one conversation as [[...messages...]]" if "role" in item else ""
        raise ValueError(f'{place}: expected the key "prompt", got {sorted(map(str, item))}{hint}')
    if not isinstance(item["prompt"], str) and not _is_chat(item["prompt"]):
        raise ValueError(
            f'{place}: expected a text or chat messages under "prompt", '
            f"got {type(item['prompt']).__name__}"
        )
    return dict(item)


def _from_conversation(item: Mapping[str, Any], place: str) -> Record:
    """Bring a whole conversation to a prompt, and what the user says after each answer."""
    messages = item["messages"]
    if not _is_chat(messages):
        raise ValueError(
            f'{place}: expected chat messages under "messages", got {type(messages).__name__}'
        )
    roles = [message["role"] for message in messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    later = roles[first:]
    if first == 0 or later != [("assistant", "user")[i % 2] for i in range(len(later))]:
        raise ValueError(
            f"{place}: expected a conversation in which assistant and user take turns after the "
            f"prompt, got the roles {roles}"
        )
    turns = [message["content"] for message in messages[first + 1 :: 2]]
    further = {name: value for name, value in item.items() if name != "messages"}
    return {"prompt": messages[:first], TURNS: turns, **further}


def _is_chat(item: Any) -> bool:
    return (
        isinstance(item, Sequence)
        and not isinstance(item, str)
        and len(item) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in item)
    )


def _read_file(path: Path, refused: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Items of a file, each with its place for error messages."""
    readers: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
        ".jsonl": json_lines,
        ".csv": _read_csv,
        ".txt": _read_txt,
    }
    if path.suffix not in readers:
        raise ValueError(
            f"prompts: expected a file that ends in {', '.join(readers)}, got {str(path)!r}; "
            "pass a list if this is meant as a prompt"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts: expected a file, got {str(path)!r}, which does not exist"
        )
    yield from readers[path.suffix](path, refused)


def _read_csv(path: Path, _: list[str] | None) -> Iterator[tuple[str, Any]]:
    # newlines within quotes belong to the field, so the reader gets lines with their ends
    reader = csv.DictReader((line + "\n" for _, line in text_lines(path)), strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{place}: expected {len(reader.fieldnames or ())} fields, got others"
                )
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: expected CSV, got {error}") from None


def _shown(item: Any) -> str:
    """What an item is, for an error message, however large or deep it is."""
    if isinstance(item, Mapping):
        return f"the keys {sorted(map(str, item))}"
    return shorten(item) if isinstance(item, str) else type(item).__name__


def _read_txt(path: Path, refused: list[str] | None) -> Iterator[tuple[str, Any]]:
    for number, line in text_lines(path, refused):
        if line.strip():
            yield f"{path}, line {number}", line


def _hash_to_unit(text: str) -> float:
    """A number in [0, 1) from a text's normal form."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    digest = hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
