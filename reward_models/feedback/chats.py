"""What a prompt and its completions are made of, where they are of a chat: messages.

A person is shown these in the place of the texts, which a chat template has filled in. What is
learned from the answers is learned from the texts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward_models.conversations import as_texts, parts


@dataclass(frozen=True)
class Message:
    """What one of a chat's speakers says.

    Args:
        role: who speaks: user, assistant, system, or another.
        content: what is said.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """The messages behind a prompt and its completions.

    Args:
        prompt: what was said before.
        completions: the messages of each completion: an answer, or, of a conversation of several
            turns, the answers with the user's turns between them.
    """

    prompt: tuple[Message, ...]
    completions: tuple[tuple[Message, ...], ...]

    @property
    def is_of_turns(self) -> bool:
        """Whether a completion is more than one answer."""
        return any(len(messages) > 1 for messages in self.completions)

    def swapped(self) -> "Chat":
        """The same with the completions in the other order."""
        return Chat(self.prompt, self.completions[::-1])


def as_chat(value: Any, n_completions: int) -> Chat | None:
    """A chat from what JSON has of one; a `Chat`, or None, stays as it is.

    Args:
        value: `{"prompt": [...], "completions": [[...], ...]}`, of messages `{"role", "content"}`.
        n_completions: how many completions there are to be.

    Raises:
        ValueError: if it is none, or not of so many completions.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        if missing := {"prompt", "completions"} - value.keys():
            raise ValueError(f"expected chat to have {min(missing)!r}, got {sorted(value)}")
        completions = value["completions"]
        if not isinstance(completions, list | tuple):
            raise ValueError(
                f"expected a list of messages for each completion of chat, got {completions!r:.60}"
            )
        value = Chat(_messages(value["prompt"]), tuple(map(_messages, completions)))
    if not isinstance(value, Chat):
        raise ValueError(f"expected chat to have 'prompt' and 'completions', got {value!r:.60}")
    if len(value.completions) != n_completions or not all(value.completions):
        raise ValueError(
            f"expected chat to have messages for each of {n_completions} completions, got "
            f"{[len(messages) for messages in value.completions]}"
        )
    return value


def chats_of(
    episodes: Iterable[Mapping[str, Any]], prompts: Iterable[str | Sequence[Mapping[str, Any]]]
) -> dict[tuple[str, str], Chat]:
    """The chats that finished episodes are of, each with one completion, by their `as_texts`.

    Args:
        episodes: `prompt` and `completion`, and, of several turns, `messages` and `n_turns` (the
            environment's final info).
        prompts: what each began with. Of texts there are no chats, nor of messages that hold
            something else than text.
    """
    found: dict[tuple[str, str], Chat] = {}
    for episode, prompt in zip(episodes, prompts, strict=True):
        if isinstance(prompt, str):
            continue
        before, said = parts(episode)
        if isinstance(said, str):
            before, said = prompt, [{"role": "assistant", "content": said}]
        if all(isinstance(message["content"], str) for message in (*before, *said)):
            chat = Chat(_messages(before), (_messages(said),))
            found.setdefault(as_texts(episode), chat)
    return found


def side_by_side(
    chats: Mapping[tuple[str, str], Chat], prompt: str, completions: Sequence[str]
) -> Chat | None:
    """The chat behind a prompt and several completions; None if it is not known of each.

    Nor is there one where the system's message, which is in no text, is another for each.

    Args:
        chats: of one completion each, as `chats_of` gives them.
        prompt: the text.
        completions: texts.
    """
    found = [chats.get((prompt, completion)) for completion in completions]
    known = [chat for chat in found if chat is not None]
    if len(known) < len(found) or any(chat.prompt != known[0].prompt for chat in known):
        return None
    return Chat(known[0].prompt, tuple(chat.completions[0] for chat in known))


def _messages(values: Any) -> tuple[Message, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"expected a list of messages in chat, got {values!r:.60}")
    return tuple(map(_message, values))


def _message(value: Any) -> Message:
    known = value if isinstance(value, Mapping) else {}
    role, content = known.get("role"), known.get("content")
    if not (isinstance(role, str) and isinstance(content, str)):
        raise ValueError(
            f"expected messages with the texts 'role' and 'content', got {value!r:.60}"
        )
    try:
        (role + content).encode()
    except UnicodeEncodeError as error:
        raise ValueError("expected messages to be text, got half a character") from error
    return Message(role, content)
