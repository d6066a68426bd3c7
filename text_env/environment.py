"""The Gymnasium `Env` face: one row of `Episodes`, and what this environment is, spelled out."""

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded

from text_env.episodes import Episodes
from text_env.task import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_MODES = ("ansi", "human")


class TextEnvironment(gym.Env[np.ndarray, int]):
    """Text generation, one token at a time, scored when the text is finished.

    ## Description
    An episode is one completion of one prompt. The agent sees the tokens so far and appends one
    token at each step, until it ends the text or has used up its budget. Then a reward function
    scores the finished completion.

    In a conversation an episode has several turns: where the agent's ends, the user's next one is
    put into the observation at once, with what the chat template has around it, up to where the
    agent's next turn begins; and the score is of the whole. What the user says comes with the
    prompts (column `turns`) or from a callable (`user_fn`).

    ## Action Space
    `Discrete(V)`: the id of the next token, V the size of the vocabulary. `action_masks()` gives
    the tokens one should choose from (shape (V,), bool): no special token except the end token, no
    id without a token, no end token before `min_new_tokens`. A token that is masked but in range is
    accepted as any other; an end token that comes too early does not end the episode.

    ## Observation Space
    `Box(-1, V - 1, (max_prompt_tokens + max_new_tokens,), int64)`: the ids of prompt and
    completion, followed by -1, which is no token's id. With `obs_dtype="float32"` the same numbers
    as floats. With several turns the length is max_prompt_tokens + max_turns * max_new_tokens +
    (max_turns - 1) * max_user_tokens. An observation is always the last one, the action, and
    whatever follows from it: nothing, or a user's turn.

    ## Starting State
    A prompt, drawn without replacement in an order that the environment's own `np_random` shuffles;
    a new order when all have been drawn. `reset(seed=...)` begins a new order.
    `reset(options={"prompt": ...})` begins with the given prompt instead and draws none.

    ## Rewards
    0 at each token but the last. At the last one the score, less `missing_eos_penalty` if the
    budget ran out. (With several turns: less that at the last token of each turn that ran out.)
    Where the reward function scores each token, the score is their sum, and it is still paid at the
    end: only then is the function asked. `token_scores` in the information lets an agent divide it
    up, as TokenPPO does.

    ## Episode End
    Always with `terminated=True`, and a `finish_reason`:

    - "eos": the agent chose an end token (after `min_new_tokens` others).
    - "stop": the completion's text contains one of the `stop` texts.
    - "length": it has `max_new_tokens` tokens. The budget is part of the task and can be seen in
      the observation, so this is no truncation, and no value is to be bootstrapped past it.

    With several turns these are the ends of a turn; budget, `min_new_tokens` and `stop` are each
    turn's. The episode ends with the turn after which the user has no more to say, or with number
    `max_turns`. A turn that ended without an end token is closed as the chat template does it.

    ## Information
    Empty until the end; then `prompt`, `completion` (without end token, cut before the stop text,
    decoded as a whole), `score`, `finish_reason`, `n_tokens` (all tokens generated, the end token
    included), and the prompt's further columns under their own names. With several turns also
    `messages`, the whole conversation, and `n_turns`, the agent's part of it; `completion` is what
    the agent said in all turns, a line break between them, `n_tokens` what it wrote in all turns,
    and `finish_reason` the last turn's. Also what the reward function was told of tokens, where it
    asked, and `token_scores`, a list of `n_tokens` numbers whose sum is the score, where it gave
    such.

    ## Arguments
    - `tokenizer`: a transformers tokenizer, or the folder or hub id of one.
    - `prompts`: a path (.jsonl, .csv, .txt), or an iterable of texts, of conversations (lists of
      `{"role", "content"}`, put through the chat template), or of dicts with the key "prompt" and
      further columns, such as a `datasets` split. A dict with the key "messages" is a whole
      conversation: its part before the first answer is the prompt, and what the user says later
      the column `turns`.
    - `reward_fn`: called as `reward_fn(prompts=[...], completions=[...], **columns)`, gives one
      number per completion (see `text_env.RewardFunction`); or its place, "module:name". If its
      signature names `completion_ids` or `completion_pieces` (the text that each token adds), it is
      given these and may give a list per completion, one number per token, end token included; not
      with several turns, where prompts and completions are lists of messages, as in TRL.
    - `max_new_tokens=48`: longest completion (or turn), in tokens, end token included.
    - `user_fn=None`: called as `user_fn(conversations, **columns)` where turns have ended, gives
      what the users say next, None to end (see `text_env.turns.UserFunction`); or its place.
    - `max_turns=None`: the agent's turns in an episode at most; None takes the longest
      conversation's. Needed with `user_fn`.
    - `max_user_tokens=None`: longest turn of a user, in tokens, with what the chat template puts
      around it; None takes the longest one given. Needed with `user_fn`.
    - `max_prompt_tokens=None`: longest prompt, in tokens; None takes the longest one given.
    - `prompt_too_long="error"`: or "truncate_left", which drops the oldest tokens.
    - `min_new_tokens=0`: tokens before an end token counts as one.
    - `stop=()`: a text or several that end an episode; they may span tokens.
    - `eos_token_ids=None`: one or several ids that end an episode; None takes the tokenizer's.
    - `allowed_token_ids=None`: restricts `action_masks()` to these and the end tokens.
    - `missing_eos_penalty=0.0`: subtracted from the score where the budget ran out.
    - `vocab_size=None`: number of actions; None takes the tokenizer's, a padded embedding has more.
    - `obs_dtype="int64"`: or "float32".
    - `shuffle=True`: with False the prompts come in their own order, from the first after a seeded
      reset; the rows of a batch share them out.
    - `skip_special_tokens=True`: whether completions leave out special tokens.
    - `nonfinite_scores="error"`: or "pass", which pays NaN and infinity as they are, to an agent
      that leaves such episodes out (`TokenPPO(on_nonfinite="skip")`).
    - `texts`, `rewards`, `fit_reward`: instead of `prompts` and `reward_fn`. Texts with a score
      each, and a callable that makes a reward function of the two; prompts are the texts'
      beginnings.
    - `render_mode=None`: "ansi" (`render` returns the text, prompt dim, completion bright) or
      "human" (the same is written to stdout at each reset and step).

    All but the reward and user functions, the tokenizer object and `fit_reward` fit into JSON, and
    the first three can be given as strings, so that `spec.to_json()` works.

    ## Version History
    - v0: first version.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": list(RENDER_MODES),
        "render_fps": 10,
    }

    def __init__(self, *, render_mode: str | None = None, **arguments: Any) -> None:
        self.render_mode = checked_render_mode(render_mode)
        self.task = TextTask(**arguments)
        self.episodes = Episodes(self.task, num_rows=1)
        self.observation_space = self.task.observation_space
        self.action_space = self.task.action_space  # type: ignore[assignment]

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer in use."""
        return self.task.tokenizer

    @property
    def allowed_tokens(self) -> np.ndarray:
        """Tokens that may be allowed at all, shape (V,), bool, read-only."""
        return self.task.vocabulary.allowed_tokens

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Makes `np_random` anew and begins a new order of prompts.
            options: {"prompt": ...} to begin with this prompt.

        Returns:
            The observation, and an empty info.
        """
        super().reset(seed=seed)
        if self.episodes.generator(0) is not self.np_random:  # a new one, by whatever way
            self.episodes.use_generator(0, self.np_random)
        self.episodes.reset([0], options)
        self._show()
        return self.episodes.observation(0), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Append one token.

        Args:
            action: Its id.

        Returns:
            Observation, reward, terminated, truncated (always False), info.

        Raises:
            ResetNeeded: No episode is under way.
            ValueError: The action is not a token id, or the reward function's answer is wrong.
        """
        if not self.episodes.active[0]:
            raise ResetNeeded(
                "Cannot call env.step() before calling env.reset(): no episode is under way"
            )
        step = self.episodes.step(np.asarray(action).reshape(-1))
        self._show()
        return (
            self.episodes.observation(0),
            float(step.rewards[0]),
            bool(step.ended[0]),
            False,
            step.infos.get(0, {}),
        )

    def action_masks(self) -> np.ndarray:
        """Tokens allowed next, shape (V,), bool, read-only; named as sb3-contrib expects it."""
        return self.episodes.action_mask(0)

    def render(self) -> str | None:
        """The text so far: returned in mode "ansi", written to stdout in mode "human"."""
        if self.render_mode is None:
            gym.logger.warn(
                "render() does nothing without a render_mode; give one to the constructor"
            )
            return None
        text = self.episodes.render(0)
        if self.render_mode == "ansi":
            return text
        show(text)
        return None

    def get_state(self) -> dict[str, Any]:
        """The environment's state as JSON types: generator, order of prompts, episode under way."""
        return self.episodes.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`, in an environment made with the same arguments."""
        self.episodes.set_state(state)
        self.np_random = self.episodes.generator(0)

    def _show(self) -> None:
        if self.render_mode == "human":
            self.render()


def checked_render_mode(render_mode: str | None) -> str | None:
    """The render mode, if it is one.

    Raises:
        TypeError: It is none. SB3's `make_vec_env` asks for "rgb_array" first and takes a
            TypeError, and no other, to mean that there is no such mode.
    """
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise TypeError(f"render_mode: expected None or one of {RENDER_MODES}, got {render_mode!r}")
    return render_mode


def show(text: str) -> None:
    """Write a text to stdout at once: what render mode "human" is for."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
