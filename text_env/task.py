"""What all rows and all faces have in common: the arguments, checked, and the two spaces.

Leaves out the state of episodes (`episodes`).
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces

from text_env.prompts import PromptSet, beginning, shorten
from text_env.scoring import RewardFunction, asked_for, load_reward
from text_env.turns import UserFunction, UserTurns
from text_env.vocabulary import Vocabulary, fingerprint, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextTask:
    """A text generation task: which prompts, which tokens, when it ends, and what it pays.

    The arguments are those of all three faces, which pass them on to here; `TextEnvironment`
    describes them.

    Attributes:
        tokenizer: The tokenizer.
        vocabulary: What its ids mean: allowed, ending, text.
        prompts: The prompt set.
        reward_fn: Scores finished completions, in batches.
        asked_for: What it asks to be told about tokens, of `scoring.TOKENS`.
        user: Speaks between the assistant's turns; None where episodes have one.
        max_episode_tokens: Tokens that an agent can write in one episode, in all of its turns.
        observation_space: `Box(-1, V - 1, (L,))`: room for the longest prompt and all turns.
        action_space: `Discrete(V)`.
    """

    def __init__(
        self,
        *,
        tokenizer: "PreTrainedTokenizerBase | str | Path",
        prompts: str | Path | Iterable[Any] | None = None,
        reward_fn: RewardFunction | str | None = None,
        max_new_tokens: int = 48,
        max_prompt_tokens: int | None = None,
        prompt_too_long: str = "error",
        min_new_tokens: int = 0,
        stop: str | Sequence[str] = (),
        eos_token_ids: int | Sequence[int] | None = None,
        allowed_token_ids: Iterable[int] | None = None,
        missing_eos_penalty: float = 0.0,
        vocab_size: int | None = None,
        obs_dtype: str = "int64",
        shuffle: bool = True,
        skip_special_tokens: bool = True,
        nonfinite_scores: str = "error",
        user_fn: UserFunction | str | None = None,
        max_turns: int | None = None,
        max_user_tokens: int | None = None,
        texts: Sequence[str] | None = None,
        rewards: Sequence[float] | None = None,
        fit_reward: Callable[[Sequence[str], Sequence[float]], RewardFunction] | None = None,
    ) -> None:
        _check_budget(max_new_tokens, min_new_tokens)
        if obs_dtype not in ("int64", "float32"):
            raise ValueError(f'obs_dtype: expected "int64" or "float32", got {obs_dtype!r}')
        if nonfinite_scores not in ("error", "pass"):
            raise ValueError(
                f'nonfinite_scores: expected "error" or "pass", got {nonfinite_scores!r}'
            )
        if not (math.isfinite(missing_eos_penalty) and missing_eos_penalty >= 0):
            raise ValueError(
                f"missing_eos_penalty: expected a number >= 0, got {missing_eos_penalty}; "
                "it is subtracted from the score"
            )
        if texts is not None or rewards is not None or fit_reward is not None:
            if prompts is not None or reward_fn is not None:
                raise ValueError(
                    "expected prompts and reward_fn, or texts, rewards and fit_reward, got both"
                )
            prompts, reward_fn = _from_scored_texts(texts, rewards, fit_reward)
        if prompts is None or reward_fn is None:
            missing = "prompts" if prompts is None else "reward_fn"
            raise ValueError(f"{missing}: expected a value, got None")

        self.tokenizer = load_tokenizer(tokenizer)
        self.vocabulary = Vocabulary(
            self.tokenizer, vocab_size, eos_token_ids, allowed_token_ids, stop, skip_special_tokens
        )
        if min_new_tokens and not self.vocabulary.allowed_before_eos.any():
            raise ValueError("min_new_tokens: expected a token that may come before EOS, got none")
        self.prompts = PromptSet(
            prompts, self.tokenizer, max_prompt_tokens, prompt_too_long, user_fn is not None
        )
        self.user: UserTurns | None = None
        if self.prompts.conversations:
            self.user = UserTurns(
                self.tokenizer,
                self.prompts,
                user_fn,
                max_turns,
                max_user_tokens,
                self.vocabulary.is_eos,
            )
        elif max_turns is not None or max_user_tokens is not None:
            raise ValueError(
                "max_turns and max_user_tokens: expected user_fn, or prompts with the column "
                '"turns", got neither: each episode has one turn'
            )
        self.reward_fn = load_reward(reward_fn)
        self.asked_for = asked_for(self.reward_fn) - {*self.prompts.column_names}
        if self.asked_for and self.user is not None:
            raise ValueError(
                f"reward_fn: expected one that scores conversations, got one that asks for "
                f"{sorted(self.asked_for)}, which only episodes of one turn have"
            )
        self.allow_nonfinite = nonfinite_scores == "pass"
        self.max_prompt_tokens = self.prompts.max_tokens
        self.max_new_tokens = max_new_tokens
        self.min_new_tokens = min_new_tokens
        self.max_episode_tokens, width = max_new_tokens, self.max_prompt_tokens + max_new_tokens
        if self.user is not None:
            self.max_episode_tokens *= self.user.max_turns
            width += (self.user.max_turns - 1) * (self.user.max_tokens + max_new_tokens)
        self.missing_eos_penalty = missing_eos_penalty
        self.shuffle = shuffle
        self.obs_dtype = np.dtype(obs_dtype)
        self.observation_space = spaces.Box(
            low=-1,
            high=self.vocabulary.size - 1,
            shape=(width,),
            dtype=self.obs_dtype.type,
        )
        self.action_space = spaces.Discrete(self.vocabulary.size)

    def rules(self) -> dict[str, Any]:
        """What tells this task from others, its prompts and reward apart, as JSON types."""
        allowed = self.vocabulary.allowed_tokens
        turns = {}
        if self.user is not None:
            turns = {"max_turns": self.user.max_turns, "max_user_tokens": self.user.max_tokens}
        return {
            "tokenizer": fingerprint(self.tokenizer),
            "allowed tokens": hashlib.sha256(allowed.tobytes()).hexdigest()[:16],
            "end tokens": np.flatnonzero(self.vocabulary.is_eos).tolist(),
            "skip_special_tokens": self.vocabulary.skip_special_tokens,
            "stop": list(self.vocabulary.stop),
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "missing_eos_penalty": self.missing_eos_penalty,
            "nonfinite_scores": "pass" if self.allow_nonfinite else "error",
            "shuffle": self.shuffle,
            **turns,
        }


def _check_budget(max_new_tokens: int, min_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"min_new_tokens: expected a number in [0, max_new_tokens={max_new_tokens}], "
            f"got {min_new_tokens}"
        )


def _from_scored_texts(
    texts: Sequence[str] | None,
    rewards: Sequence[float] | None,
    fit_reward: Callable[[Sequence[str], Sequence[float]], RewardFunction] | None,
) -> tuple[list[str], RewardFunction]:
    """Prompts and reward function from texts that people have scored."""
    if texts is None or rewards is None or fit_reward is None:
        raise ValueError(
            "expected texts and rewards together with fit_reward, a callable (texts, rewards) -> "
            "reward_fn, got not all three"
        )
    texts, rewards = list(texts), [float(reward) for reward in rewards]
    if len(texts) != len(rewards):
        raise ValueError(f"rewards: expected {len(texts)}, one per text, got {len(rewards)}")
    for text, reward in zip(texts, rewards, strict=True):
        if not text.strip() or not math.isfinite(reward):
            raise ValueError(
                "texts and rewards: expected non-empty texts and finite numbers, "
                f"got {shorten(text)} and {reward}"
            )
    return [beginning(text) for text in texts], fit_reward(texts, rewards)
