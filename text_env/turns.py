"""The user's turns between the assistant's: what is said, and which tokens it comes to.

Leaves out when a turn is over (`episodes`) and how a conversation's first part becomes a prompt
(`prompts`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from text_env.prompts import TURNS, Message, Prompt, PromptSet, shorten
from text_env.scoring import load_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "[the answer 5fd1c2a7e0]"
"""Stands for an answer in a chat template, to find what the template puts behind it."""


class UserFunction(Protocol):
    """Speaks for the users of several conversations at once."""

    def __call__(
        self, conversations: list[list[Message]], **columns: list[Any]
    ) -> Sequence[str | None]:
        """Say what comes next in B conversations.

        Whatever else is to be exactly repeatable (one seed, one run; the three faces; resume) asks
        for an answer that depends on the arguments alone, and not on which conversations come
        together.

        Args:
            conversations: B lists of messages {"role", "content"}, from the prompt's first to the
                assistant's last.
            **columns: The prompts' further columns, B values each.

        Returns:
            B texts; None ends the conversation.
        """
        ...


class UserError(RuntimeError):
    """A user function raised an error, which is this one's cause."""


class UserTurns:
    """The user of a task whose episodes have several turns.

    Args:
        tokenizer: Its chat template says how a turn ends and the next one begins.
        prompts: The prompt set, all of conversations.
        user_fn: Speaks for the user; None takes the prompts' column `turns`.
        max_turns: Answers in a conversation at most; None (without `user_fn`) takes the longest
            conversation's.
        max_tokens: Longest turn of a user, in tokens, with what the template puts around it; None
            (without `user_fn`) takes the longest one given.
        is_eos: Shape (V,), bool: the end tokens.

    Raises:
        ValueError: An argument is missing or out of range, or a turn is too long.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: PromptSet,
        user_fn: UserFunction | str | None,
        max_turns: int | None,
        max_tokens: int | None,
        is_eos: np.ndarray,
    ) -> None:
        self._tokenizer = tokenizer
        self._ends = tokenizer.convert_ids_to_tokens(np.flatnonzero(is_eos).tolist())
        self._user_fn: Callable[..., Any] | None = None
        for name, value in (("max_turns", max_turns), ("max_user_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
            if value is None and user_fn is not None:
                raise ValueError(f"{name}: expected a number with user_fn, got None")
        if user_fn is not None:
            assert max_turns is not None and max_tokens is not None
            if TURNS in prompts.column_names:
                raise ValueError(
                    f"expected user_fn or the column {TURNS!r}, got both: leave user_fn out, or "
                    f"that column (rows with `messages` have it: give them as `prompt`)"
                )
            self._user_fn = load_function(user_fn, "user_fn")
            self.max_turns, self.max_tokens = max_turns, max_tokens
            return
        given = [prompts[i] for i in range(len(prompts))]
        self.max_turns = max_turns or 1 + max(len(prompt.columns[TURNS]) for prompt in given)
        turns = [turn for prompt in given for turn in self._turns_of(prompt)]
        self.max_tokens = max_tokens or max((len(ids) for _, ids in turns), default=0)
        for text, ids in turns:
            self._require_room(text, ids)

    def next_texts(
        self, prompts: Sequence[Prompt], said: Sequence[list[Message]]
    ) -> list[str | None]:
        """What the user says next in B conversations; None where they are over.

        Args:
            prompts: Their prompts.
            said: The messages since, the last one an answer.

        Raises:
            UserError: The user function raised an error.
            ValueError: It did not return one text or None per conversation.
        """
        n_answers = [sum(m["role"] == "assistant" for m in messages) for messages in said]
        open_ones = [i for i, n in enumerate(n_answers) if n < self.max_turns]
        texts: list[str | None] = [None] * len(prompts)
        if self._user_fn is not None and open_ones:
            found = self._ask([prompts[i] for i in open_ones], [said[i] for i in open_ones])
            for i, text in zip(open_ones, found, strict=True):
                texts[i] = text
        elif self._user_fn is None:
            for i in open_ones:
                turns = prompts[i].columns[TURNS]
                texts[i] = turns[n_answers[i] - 1] if n_answers[i] <= len(turns) else None
        return texts

    def ids(
        self, prompt: Prompt, said: Sequence[Message], text: str, by_end_token: bool
    ) -> np.ndarray:
        """The tokens from an answer's end to where the next one begins, shape (k,), int64.

        Args:
            prompt: The conversation's prompt.
            said: The messages since, the last one the answer.
            text: What the user says now.
            by_end_token: The answer ended with an end token, which is not repeated.

        Raises:
            ValueError: The template does not show the answer, or there are too many tokens.
        """
        ids = self._behind([*(prompt.messages or ()), *said[:-1]], text, by_end_token)
        self._require_room(text, ids)
        return np.asarray(ids, dtype=np.int64)

    def _behind(self, before: list[Message], text: str, by_end_token: bool) -> list[int]:
        """What the template puts behind an answer to `before`, with the user's text."""
        messages = [
            *before,
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": text},
        ]
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        _, found, behind = str(rendered).rpartition(ANSWER)
        if not found:
            raise ValueError(
                "chat template: expected one that shows the assistant's text as it is, got one "
                "that does not; give the tokenizer another for several turns"
            )
        if by_end_token:
            for end in self._ends:
                if behind.lstrip().startswith(end):
                    behind = behind.lstrip()[len(end) :]
                    break
        return list(self._tokenizer(behind, add_special_tokens=False)["input_ids"])

    def _require_room(self, text: str, ids: Sequence[int]) -> None:
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"the user's turn {shorten(text)}: expected at most {self.max_tokens} tokens with "
                f"what the chat template puts around it, got {len(ids)}; raise max_user_tokens"
            )

    def _turns_of(self, prompt: Prompt) -> Iterator[tuple[str, list[int]]]:
        """The user's turns of a prompt, each with its tokens, nothing in the answers' places."""
        before = list(prompt.messages or ())
        for text in prompt.columns[TURNS][: self.max_turns - 1]:
            yield text, self._behind(before, text, by_end_token=False)
            before += [{"role": "assistant", "content": ""}, {"role": "user", "content": text}]

    def _ask(self, prompts: Sequence[Prompt], said: Sequence[list[Message]]) -> list[str | None]:
        assert self._user_fn is not None
        conversations = [
            [dict(message) for message in (*(prompt.messages or ()), *messages)]
            for prompt, messages in zip(prompts, said, strict=True)
        ]
        columns = {name: [p.columns[name] for p in prompts] for name in prompts[0].columns}
        first = f"first of {len(prompts)} conversations {shorten(prompts[0].text)}"
        try:
            answer: Any = self._user_fn(conversations, **columns)
        except Exception as error:
            name = getattr(self._user_fn, "__name__", type(self._user_fn).__name__)
            raise UserError(
                f"user_fn: {name} raised {type(error).__name__}: {error} ({first})"
            ) from error
        if isinstance(answer, str) or not isinstance(answer, Sequence):
            raise ValueError(
                f"user_fn: expected a sequence of {len(prompts)} texts or None, got "
                f"{type(answer).__name__} ({first})"
            )
        wrong = [text for text in answer if not (text is None or isinstance(text, str))]
        if wrong or len(answer) != len(prompts):
            got = type(wrong[0]).__name__ if wrong else len(answer)
            raise ValueError(
                f"user_fn: expected {len(prompts)} texts or None, one per conversation, got {got} "
                f"({first})"
            )
        return list(answer)
