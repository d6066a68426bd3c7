"""What a tokenizer's ids mean to an episode: which are allowed, which end it, what text they make.

Leaves out prompts (`prompts`) and the state of episodes (`episodes`).
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes a part of a character to."""


class Vocabulary:
    """The tokens of one environment.

    Args:
        tokenizer: A transformers tokenizer.
        size: Number of actions, V; None takes the tokenizer's. A model whose embedding is padded to
            a rounder number has more.
        eos_token_ids: Ids that end an episode; None takes the tokenizer's `eos_token_id`, if any.
        allowed_token_ids: Restricts the allowed tokens to these (and the end tokens).
        stop: Texts that end an episode. They may begin and end within tokens.
        skip_special_tokens: Whether special tokens are left out of completions.

    Attributes:
        allowed_tokens: Shape (V,), bool, read-only: tokens an agent should choose from. Off are ids
            without a token and special tokens (padding, BOS, unknown, ...) that do not end an
            episode.
        allowed_before_eos: The same with the end tokens off.
        is_eos: Shape (V,), bool: tokens that end an episode.
        may_stop: Shape (V,), bool: tokens whose arrival may complete a stop text.

    Raises:
        ValueError: An id is out of range, no token is left, or a stop text can never appear.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        size: int | None = None,
        eos_token_ids: int | Sequence[int] | None = None,
        allowed_token_ids: Iterable[int] | None = None,
        stop: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        used = np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64)
        smallest = max(len(tokenizer), int(used.max()) + 1)
        self.size = smallest if size is None else size
        if self.size < smallest:
            raise ValueError(
                f"vocab_size: expected at least {smallest}, the tokenizer's, got {self.size}"
            )
        self.is_eos = self._flags(_end_ids(tokenizer, eos_token_ids), "eos_token_ids")
        ordinary = self._flags(used, "token ids") & ~self._flags(
            special_ids(tokenizer), "special ids"
        )
        if allowed_token_ids is not None:
            ordinary &= self._flags(allowed_token_ids, "allowed_token_ids")
        self.allowed_before_eos = _read_only(ordinary & ~self.is_eos)
        self.allowed_tokens = _read_only(ordinary | self.is_eos)
        if not self.allowed_tokens.any():
            raise ValueError("allowed_token_ids: expected at least one ordinary token, got none")
        self.stop = self._checked_stop(stop)
        self.may_stop = self._completers_of_stop(used)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of a whole sequence; decoding token by token would cut characters in two."""
        # Cleaned-up spaces ("a." for "a .") would be a text that the tokens do not say.
        return str(
            self.tokenizer.decode(
                ids,
                skip_special_tokens=self.skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def completion_text(self, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> str:
        """Text of a completion as it follows its prompt.

        Decoded alone, a completion would lose its leading space with sentencepiece-like tokenizers,
        which drop the space at the beginning of any text. So it is what the prompt's text grows by.
        """
        before = self.decode(prompt_ids)
        whole = self.decode(np.concatenate([prompt_ids, completion_ids]))
        if whole.startswith(before):
            return whole[len(before) :]
        # The completion begins with part of a character in byte tokens, and the decoder took these
        # together with the prompt's last byte tokens. No leading space is at stake.
        return self.decode(completion_ids)

    def pieces(
        self, prompt_ids: np.ndarray, completion_ids: np.ndarray, completion: str
    ) -> list[str]:
        """What each token of a completion adds to its text; together they are the text.

        A token that ends within a character adds nothing: the one that completes it adds it. So do
        end tokens, and those of a stop text add nothing that has been cut off.
        """
        sofar, pieces = "", []
        for end in range(1, len(completion_ids) + 1):
            text = self.completion_text(prompt_ids, completion_ids[:end]).rstrip(REPLACEMENT)
            if text.startswith(completion):
                text = completion  # the rest is an end token's, or has been cut off
            if len(text) > len(sofar) and completion.startswith(text):
                pieces.append(text[len(sofar) :])
                sofar = text
            else:
                pieces.append("")
        if pieces:
            pieces[-1] += completion[len(sofar) :]
        return pieces

    def find_stop(self, text: str) -> int:
        """Where the first stop text begins, or -1."""
        found = [place for place in map(text.find, self.stop) if place >= 0]
        return min(found, default=-1)

    def _flags(self, ids: Iterable[int], name: str) -> np.ndarray:
        flags = np.zeros(self.size, dtype=np.bool_)
        for token_id in ids:
            if not 0 <= token_id < self.size:
                raise ValueError(f"{name}: expected ids in [0, {self.size}), got {token_id}")
            flags[token_id] = True
        return flags

    def _checked_stop(self, stop: str | Sequence[str]) -> tuple[str, ...]:
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        for text in stops:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop: expected non-empty texts, got {text!r}")
            if self.skip_special_tokens and text in self.tokenizer.all_special_tokens:
                raise ValueError(
                    f"stop: {text!r} is a special token and never part of a completion; "
                    "pass its id in eos_token_ids"
                )
        return stops

    def _completers_of_stop(self, ids: np.ndarray) -> np.ndarray:
        """Tokens that contain the last character of a stop text, or a part of it."""
        flags = np.zeros(self.size, dtype=np.bool_)
        if not self.stop:
            return flags
        marks = {text[-1] for text in self.stop}
        if not all(mark.isascii() for mark in marks):
            marks.add(REPLACEMENT)
        # Behind another token, since the decoder may drop a space at the beginning of a text.
        ordinary = np.flatnonzero(self.allowed_before_eos).tolist()
        anchor = next((i for i in ordinary if self.decode([i])), int(ids[0]))
        texts = self.tokenizer.batch_decode(
            [[anchor, i] for i in ids.tolist()],
            skip_special_tokens=self.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        before = self.decode([anchor])
        for i, text in zip(ids, texts, strict=True):
            added = text[len(before) :] if text.startswith(before) else text
            flags[i] = not marks.isdisjoint(added)
        return flags


def load_tokenizer(tokenizer: "str | Path | PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """A tokenizer from a folder or hub id; a tokenizer is returned as it is.

    Raises:
        ValueError: Nothing can be loaded from there.
    """
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer  # takes seconds: only when there is something to load

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(tokenizer), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"tokenizer: expected the folder or hub id of one, got {str(tokenizer)!r} ({reason})"
        ) from error
    return loaded


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Sixteen hexadecimal digits that change when a text's ids, or a chat's text, would."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids of tokens that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {token_id for token_id, token in added.items() if token.special}
    return marked.union(tokenizer.all_special_ids)


def _end_ids(
    tokenizer: "PreTrainedTokenizerBase", eos_token_ids: int | Sequence[int] | None
) -> list[int]:
    if eos_token_ids is None:
        eos_token_ids = tokenizer.eos_token_id
    if eos_token_ids is None:
        return []
    return [eos_token_ids] if isinstance(eos_token_ids, int | np.integer) else list(eos_token_ids)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
