"""Conversations for reward functions of texts: each answer, as a completion of what came before.

A conversation is a list of messages {"role", "content"}, as in TRL; its completion begins with the
assistant's first answer, and assistant and user take turns.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from reward_models.contract import asked_for, told

Messages = Sequence[Mapping[str, Any]]


class Answers(NamedTuple):
    """The answers of B conversations, one after another, N in all.

    Attributes:
        prompts: N texts: what was said before, a line for each message but the system's.
        completions: N texts.
        columns: By name, N values each.
        owner: Shape (N,), int: the conversation of each.
    """

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]
    owner: np.ndarray

    def mean(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the mean of each conversation's answers: (N,) scores to (B,).

        Raises:
            ValueError: If there are not as many scores as answers.
        """
        values = np.asarray(scores, dtype=np.float64)
        if values.shape != self.owner.shape:
            raise ValueError(
                f"expected {len(self.owner)} scores, one per answer, got shape {values.shape}"
            )
        return np.bincount(self.owner, weights=values) / np.bincount(self.owner)


class EachAnswer:
    """Makes a reward function of texts one of conversations: the mean over the answers' scores.

    Texts are handed on as they are.

    Args:
        reward_fn: Any reward function of texts.
        also: What else is asked for of `TOKENS`, for the episodes' information: whoever scores them
            later may need it.
    """

    def __init__(self, reward_fn: Callable[..., Any], also: Iterable[str] = ()) -> None:
        self.reward_fn, self.also = reward_fn, set(also)
        self.__name__ = getattr(reward_fn, "__name__", type(reward_fn).__name__)

    @property
    def asks_for(self) -> set[str]:
        """What the reward function asks for, and what else is asked for."""
        return asked_for(self.reward_fn) | self.also

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Any:
        """Score B completions, texts or lists of messages; see `RewardFunction`."""
        columns = told(self.reward_fn, columns)
        if completions and isinstance(completions[0], str):
            return self.reward_fn(prompts=prompts, completions=completions, **columns)
        found = _apart(zip(prompts, completions, strict=True), columns)
        scores = self.reward_fn(
            prompts=found.prompts, completions=found.completions, **found.columns
        )
        return found.mean(scores)


def answers_of(episodes: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> Answers:
    """Take finished episodes apart into their answers; one of one turn is its own answer.

    Args:
        episodes: `prompt` and `completion`, or, of several turns, `messages` and `n_turns` (the
            environment's final info).
        columns: Names of further values.
    """
    given = {name: [episode[name] for episode in episodes] for name in columns}
    return _apart(map(parts, episodes), given)


def readable(episode: Mapping[str, Any], given: str | Messages = "") -> dict[str, Any]:
    """Return an episode whose `prompt` and `completion` can be read, without a template's marks.

    Args:
        episode: A finished one.
        given: Its prompt as the source has it, which of a chat is its messages.
    """
    if not _has_turns(episode):
        asked = episode["prompt"] if isinstance(given, str) else _said(given).removesuffix("\n")
        return {**episode, "prompt": asked}
    before, messages = parts(episode)
    said = [f"**{m['role']}:** {m['content']}" for m in messages[1:]]
    completion = "\n".join([messages[0]["content"], *said])
    return {**episode, "prompt": _said(before).removesuffix("\n"), "completion": completion}


def parts(episode: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a finished episode's prompt and completion: texts, or, of several turns, messages."""
    if not _has_turns(episode):
        return episode["prompt"], episode["completion"]
    start = len(episode["messages"]) - 2 * episode["n_turns"] + 1
    return episode["messages"][:start], episode["messages"][start:]


def as_texts(episode: Mapping[str, Any]) -> tuple[str, str]:
    """Return a finished episode's prompt and completion as texts, to learn a reward from.

    Of several turns the completion is all that was said after the prompt, without a template's
    marks: one text with the prompt, it is what the last answer is scored as (`answers_of`).
    """
    before, said = parts(episode)
    if isinstance(said, str):
        return before, said
    *earlier, last = said
    return _said(before), _said(earlier) + last["content"]


def _has_turns(episode: Mapping[str, Any]) -> bool:
    return "messages" in episode and "n_turns" in episode  # a column may be called `messages`


def _apart(pairs: Any, columns: Mapping[str, Sequence[Any]]) -> Answers:
    found = [
        (prompt, answer, i)
        for i, pair in enumerate(pairs)
        for prompt, answer in ([pair] if isinstance(pair[1], str) else _each(*pair))
    ]
    prompts, answers, owner = zip(*found, strict=True)
    repeated = {name: [values[i] for i in owner] for name, values in columns.items()}
    return Answers(list(prompts), list(answers), repeated, np.array(owner))


def _each(before: Messages, messages: Messages) -> Iterator[tuple[str, str]]:
    for i in range(0, len(messages), 2):
        yield _said([*before, *messages[:i]]), messages[i]["content"]


def _said(messages: Messages) -> str:
    return "".join(m["content"] + "\n" for m in messages if m["role"] != "system")
