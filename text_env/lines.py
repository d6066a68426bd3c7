"""Lines of a file from anywhere: what is wrong with one is said, and with which.

`reward_models.feedback.json_lines` does the same for feedback; the two packages do not import one
another.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

LONGEST_LINE = 2**24
"""Bytes (16 MiB). Of a longer line no more than this is ever in memory."""

LONGEST_REASON = 300
"""Characters of what is said about a line."""


def refuse(message: str, refused: list[str] | None, error: Exception | None = None) -> None:
    """Put what is wrong into the list, or raise it where there is none.

    Raises:
        ValueError: There is no list.
    """
    message = message if len(message) <= LONGEST_REASON else message[:LONGEST_REASON] + "..."
    if refused is None:
        raise ValueError(message) from error
    refused.append(message)


def text_lines(path: Path, refused: list[str] | None = None) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their ends; splits at newlines only, not at U+2028.

    Args:
        path: A file, UTF-8, with or without byte order mark.
        refused: A list that gets "file, line N: reason" for each bad line, which is then passed
            over; None raises at the first one.

    Raises:
        ValueError: A line is too long, or not UTF-8.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(_lines(file), start=1):
            place = f"{path}, line {number}"
            if raw is None:
                refuse(f"{place}: expected at most {LONGEST_LINE} bytes, got more", refused)
                continue
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                refuse(f"{place}: expected UTF-8, got {error}", refused, error)
                continue
            yield number, line


def json_lines(path: Path, refused: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Places ("file, line N") and values of a JSON lines file; blank lines are passed over.

    Args:
        path: As for `text_lines`.
        refused: As for `text_lines`.

    Raises:
        ValueError: A line is no JSON, nested too deeply, or has a key twice or half a character
            in it.
    """
    for number, line in text_lines(path, refused):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = _parse(line)
        except json.JSONDecodeError as error:
            got = repr(line if len(line) <= 60 else line[:57] + "...")
            refuse(f"{place}: expected a JSON object, got {got} ({error.msg})", refused, error)
        except RecursionError as error:
            refuse(f"{place}: expected a JSON object, got one nested too deeply", refused, error)
        except ValueError as error:
            refuse(f"{place}: {error}", refused, error)
        else:
            yield place, value


def _parse(line: str) -> Any:
    value = json.loads(line, object_pairs_hook=_unique)
    if re.search(r"\\u[dD][89a-fA-F]", line):
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
        raise ValueError(f"expected each key once, got {twice[:60]!r} twice")
    return values
