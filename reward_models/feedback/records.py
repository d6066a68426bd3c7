"""What people said about texts: ratings, comparisons and labels, in memory and as JSON lines.

A line's keys tell its kind, so one file may hold all three. Comparisons are TRL's preference
format and labels its unpaired one, so their data sets can be read here and ours there. Collecting
feedback and storing it in a database are not done here.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from reward_models.atomic import atomic_file
from reward_models.feedback.chats import Chat, as_chat
from reward_models.feedback.json_lines import read_json_lines


@dataclass(frozen=True)
class Rating:
    """A text's place on a scale.

    Args:
        prompt: the text's beginning.
        completion: its continuation, the part that is judged.
        rating: the number given, within `scale`; a mean over several people is fine.
        scale: the lowest and the highest possible rating.
        annotator: pseudonym of who said so.
        time: when, ISO 8601.
        origin: the data set or tool that it comes from.
        chat: the messages that the texts are made of, if they are of a chat.
    """

    prompt: str
    completion: str
    rating: float
    scale: tuple[float, float]
    annotator: str | None = None
    time: str | None = None
    origin: str | None = None
    chat: Chat | None = None

    def __post_init__(self) -> None:
        _check_texts(self)
        if not isinstance(self.scale, list | tuple) or len(self.scale) != 2:
            raise ValueError(f"expected scale [lowest, highest], got {self.scale!r}")
        low, high = (_number("scale", end) for end in self.scale)
        object.__setattr__(self, "scale", (low, high))
        rating = _number("rating", self.rating)
        if not low < high:
            raise ValueError(f"expected scale [lowest, highest], got [{low:g}, {high:g}]")
        if not low <= rating <= high:
            raise ValueError(f"expected a rating from {low:g} to {high:g}, got {rating:g}")
        object.__setattr__(self, "rating", rating)

    @property
    def texts(self) -> tuple[str]:
        """The text that was judged, as its reader saw it."""
        return (self.prompt + self.completion,)


@dataclass(frozen=True)
class Comparison:
    """Of two completions of one prompt, the one that was preferred.

    Args:
        prompt: the beginning that both share.
        chosen: the better completion.
        rejected: the other one.
        tie: whether they were found equally good; the order then means nothing.
        annotator: pseudonym of who said so.
        time: when, ISO 8601.
        origin: the data set or tool that it comes from.
        chat: the messages that the texts are made of, if they are of a chat, chosen first.
    """

    prompt: str
    chosen: str
    rejected: str
    tie: bool = False
    annotator: str | None = None
    time: str | None = None
    origin: str | None = None
    chat: Chat | None = None

    def __post_init__(self) -> None:
        _check_texts(self)
        if not isinstance(self.tie, bool):
            raise ValueError(f"expected tie to be true or false, got {self.tie!r}")

    @property
    def texts(self) -> tuple[str, str]:
        """The two texts, chosen first, as their reader saw them."""
        return (self.prompt + self.chosen, self.prompt + self.rejected)


@dataclass(frozen=True)
class Label:
    """Whether a text is good.

    Args:
        prompt: the text's beginning.
        completion: its continuation, the part that is judged.
        label: true for good, false for bad.
        annotator: pseudonym of who said so.
        time: when, ISO 8601.
        origin: the data set or tool that it comes from.
        chat: the messages that the texts are made of, if they are of a chat.
    """

    prompt: str
    completion: str
    label: bool
    annotator: str | None = None
    time: str | None = None
    origin: str | None = None
    chat: Chat | None = None

    def __post_init__(self) -> None:
        _check_texts(self)
        if not isinstance(self.label, bool):
            raise ValueError(f"expected label to be true or false, got {self.label!r}")

    @property
    def texts(self) -> tuple[str]:
        """The text that was judged, as its reader saw it."""
        return (self.prompt + self.completion,)


Feedback = Rating | Comparison | Label

_KIND_BY_KEY: dict[str, type[Feedback]] = {
    "chosen": Comparison,
    "rating": Rating,
    "label": Label,
}


def read_feedback(path: str | os.PathLike[str], refused: list[str] | None = None) -> list[Feedback]:
    """Read records from a JSON lines file.

    Empty lines and unknown keys are passed over (preference data sets often have further
    columns); a missing `prompt` is the empty one.

    Args:
        path: the file.
        refused: a list that gets "file, line N: reason" for each bad line, which is then passed
            over; None raises at the first one.

    Raises:
        ValueError: if a line is not a record; the message begins with file and line number.
    """
    return list(read_json_lines(path, _record, refused))


def write_feedback(path: str | os.PathLike[str], records: Iterable[Feedback]) -> Path:
    """Write records as JSON lines, replacing the file at once or not at all.

    Fields that hold nothing are left out, so a comparison is a line that TRL reads as it is.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            filled = {key: value for key, value in asdict(record).items() if value is not None}
            if filled.get("tie") is False:
                del filled["tie"]
            file.write(json.dumps(filled, ensure_ascii=False) + "\n")
    return Path(path)


def _record(values: Any) -> Feedback:
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {_excerpt(str(values))}")
    kinds = [kind for key, kind in _KIND_BY_KEY.items() if key in values]
    if len(kinds) != 1:
        raise ValueError(
            "expected exactly one of the keys 'chosen', 'rating' and 'label', "
            f"got the keys {sorted(values)}"
        )
    return _build(kinds[0], values)


def _build(kind: type[Feedback], values: dict[str, Any]) -> Feedback:
    known = {field.name: field for field in fields(kind)}
    arguments = {"prompt": ""} | {key: values[key] for key in known if key in values}
    for name, field in known.items():
        if name not in arguments and field.default is MISSING:
            raise ValueError(f"expected the key {name!r}, got the keys {sorted(values)}")
    if kind is Label and type(arguments["label"]) is int and arguments["label"] in (0, 1):
        arguments["label"] = bool(arguments["label"])
    return kind(**arguments)


def _check_texts(record: Feedback) -> None:
    for name in ("prompt", "completion", "chosen", "rejected", "annotator", "time", "origin"):
        value = getattr(record, name, "")
        if isinstance(value, str):
            continue
        if value is None and name in ("annotator", "time", "origin"):
            continue
        raise ValueError(f"expected {name} to be a string, got {_excerpt(repr(value))}")
    object.__setattr__(record, "chat", as_chat(record.chat, len(record.texts)))


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"expected {name} to be a finite number, got {_excerpt(repr(value))}")
        return float(value)
    except OverflowError as error:  # a whole number of hundreds of digits
        raise ValueError(f"expected {name} to be a finite number, got a huge one") from error


def _excerpt(text: str, length: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= length else text[:length] + "…"
