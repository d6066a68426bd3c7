"""Reading JSON lines from anywhere: what is wrong with a line is said, and with which.

`text_env.lines` does the same for prompts; the two packages do not import one another.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

LONGEST_LINE = 2**24
"""Bytes (16 MiB). Of a longer line no more than this is ever in memory."""

LONGEST_REASON = 300
"""Characters of what is said about a line."""

T = TypeVar("T")


def read_json_lines(
    path: str | os.PathLike[str], make: Callable[[Any], T], refused: list[str] | None = None
) -> Iterator[T]:
    """Read a file line by line and make something of each; empty lines are passed over.

    Args:
        path: the file, UTF-8, with or without byte order mark. Lines end at newlines only.
        make: makes something of a line's value, or raises ValueError.
        refused: a list that gets "file, line N: reason" for each bad line, which is then passed
            over; None raises at the first one.

    Raises:
        ValueError: if a line is bad; the message begins with file and line number.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            if line is not None and not line.strip():
                continue
            try:
                made = make(parse_line(line, first=number == 1))
            except (ValueError, RecursionError, OverflowError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                message = f"{path}, line {number}: {reason[:LONGEST_REASON]}"
                if refused is None:
                    raise ValueError(message) from error
                refused.append(message)
                continue
            yield made


def parse_line(line: bytes | None, first: bool = False) -> Any:
    """The value of a line, None standing for one that is too long.

    Raises:
        ValueError: if it is not UTF-8 or JSON, or has a key twice or half a character in it.
        RecursionError: if it is nested too deeply.
    """
    if line is None:
        raise ValueError(f"expected a line of at most {LONGEST_LINE} bytes, got a longer one")
    text = line.decode("utf-8-sig" if first else "utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got {_excerpt(text)} ({error})") from error
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("expected text, got half a character (a lone surrogate)") from error
    return value


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of a file, None in the place of one that is too long."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; which of two values for one key is meant nobody knows."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"expected each key once, got {_excerpt(repr(twice))} twice")
    return values


def _excerpt(text: str, length: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= length else text[:length] + "…"
