"""The core: B rows of text being generated, with no per-row Python while no row ends.

Decides when an episode ends and when its score is paid. Leaves out what happens to a row afterwards
(autoreset, final observations): the three faces do that, each by its own convention.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding

from text_env.prompts import FixedOrder, Message, Prompt, PromptOrder, ShuffledOrder
from text_env.scoring import TOKENS, score
from text_env.task import TextTask

PADDING = -1
"""Fills observations; no token has this id."""

_RUNNING, _EOS, _STOP, _LENGTH = range(4)
FINISH_REASONS = ("", "eos", "stop", "length")

_DIM, _BRIGHT, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"  # ANSI escape codes


class Step(NamedTuple):
    """What one step did.

    Attributes:
        rewards: Shape (B,), float64: the score less the penalty where an episode ended, else 0.
        ended: Shape (B,), bool: rows whose episode ended at this step.
        infos: Row number to what is known about its ended episode.
    """

    rewards: np.ndarray
    ended: np.ndarray
    infos: dict[int, dict[str, Any]]


class Episodes:
    """B rows, each in one of two states: active (an episode is under way) or not (ended, or held).

    A row's prompts depend on its own generator and history only, so row i of any batch goes the way
    of a batch of one with row i's seed (with `shuffle=False` the rows share one pass instead). The
    rows of a group have one seed, and so the same prompts in the same order.

    Args:
        task: What all rows have in common.
        num_rows: Number of rows, B.
        group_size: Rows in each group, neighbours; they divide B.

    Attributes:
        ids: Shape (B, L), int64: prompt and completion, padded at the right with -1.
        lengths: Shape (B,): tokens in each row.
        starts: Shape (B,): where the turn under way begins in each row, the prompt's length at
            first.
        written: Shape (B,): tokens that the agent wrote in the row's earlier turns.
        active: Shape (B,), bool.
    """

    def __init__(self, task: TextTask, num_rows: int, group_size: int = 1) -> None:
        if num_rows < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_rows}")
        if group_size < 1 or num_rows % group_size:
            raise ValueError(
                f"group_size: expected a divisor of num_envs={num_rows}, got {group_size}"
            )
        self.task = task
        self.num_rows = num_rows
        self.group_size = group_size
        width = task.observation_space.shape[0]
        self.ids = np.full((num_rows, width), PADDING, dtype=np.int64)
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.starts = np.zeros(num_rows, dtype=np.int64)
        self.written = np.zeros(num_rows, dtype=np.int64)
        self.active = np.zeros(num_rows, dtype=np.bool_)
        self._started = False
        self._prompts: list[Prompt | None] = [None] * num_rows
        self._said: list[list[Message]] = [[] for _ in range(num_rows)]  # in finished turns
        self._generators: list[np.random.Generator | None] = [None] * num_rows
        self._orders: list[PromptOrder | None] = [None] * num_rows

    # -- beginning ---------------------------------------------------------------------------------

    def generator(self, row: int) -> np.random.Generator:
        """The row's generator; seeded by the operating system if nothing else has."""
        if self._generators[row] is None:
            _, seed = seeding.np_random()
            first = row - row % self.group_size
            for mate in range(first, first + self.group_size):
                if self._generators[mate] is None:
                    self.seed(mate, seed)
        generator = self._generators[row]
        assert generator is not None
        return generator

    def group_seeds(self, seed: int) -> list[int]:
        """One seed per row: `seed` for the first group, one more for each further group."""
        return [seed + row // self.group_size for row in range(self.num_rows)]

    def use_generator(self, row: int, generator: np.random.Generator) -> None:
        """Give the row a generator and begin a new order of prompts."""
        self._generators[row] = generator
        self._orders[row] = self._new_order(row, generator)

    def seed(self, row: int, seed: int) -> None:
        """Seed the row as Gymnasium seeds an environment, and begin a new order of prompts."""
        self.use_generator(row, seeding.np_random(int(seed))[0])

    def reset(self, rows: Iterable[int], options: Mapping[str, Any] | None = None) -> None:
        """Begin an episode in each of these rows.

        Args:
            rows: Row numbers.
            options: {"prompt": ...} begins with this prompt and leaves the order of prompts as it
                is.

        Raises:
            ValueError: Another option is given, or the prompt is not one that the prompt set would
                take.
        """
        given = None
        if options:
            if set(options) != {"prompt"}:
                raise ValueError(f'options: expected only the key "prompt", got {sorted(options)}')
            given = self.task.prompts.encode(options["prompt"])
        self._started = True
        for row in rows:
            self._begin(row, given if given is not None else self._draw(row))
            self.active[row] = True

    def _draw(self, row: int) -> Prompt:
        self.generator(row)  # makes generator and order where nobody has seeded the row
        order = self._orders[row]
        assert order is not None
        return self.task.prompts[order.draw()]

    def _begin(self, row: int, prompt: Prompt) -> None:
        n_tokens = len(prompt.ids)
        self._prompts[row], self._said[row] = prompt, []
        self.ids[row] = PADDING
        self.ids[row, :n_tokens] = prompt.ids
        self.lengths[row] = self.starts[row] = n_tokens
        self.written[row] = 0

    def _new_order(self, row: int, generator: np.random.Generator) -> PromptOrder:
        size = len(self.task.prompts)
        if self.task.shuffle:
            return ShuffledOrder(size, generator)
        return FixedOrder(size, row // self.group_size, self.num_rows // self.group_size)

    def hold(self, rows: np.ndarray) -> None:
        """Empty these rows: their observation is all padding until they are reset.

        Args:
            rows: Shape (B,), bool.
        """
        self.active[rows] = False
        self.ids[rows] = PADDING
        self.lengths[rows] = self.starts[rows] = self.written[rows] = 0
        for row in np.flatnonzero(rows):
            self._prompts[row], self._said[row] = None, []

    # -- being under way ---------------------------------------------------------------------------

    def step(self, actions: Any) -> Step:
        """Append one token to each active row; score, in one call, the rows that end by it.

        Where a turn ends and the conversation does not, the user's turn follows at once.

        Args:
            actions: Shape (B,), integers; those of inactive rows are ignored.

        Raises:
            ResetNeeded: No row has been reset yet.
            RewardError: The reward function raised an error.
            UserError: The user function did.
            ValueError: An action is not a token id, or the answer of one of the two is not what it
                is to be.
        """
        rows = np.flatnonzero(self.active)
        tokens = self._checked(actions)[rows]
        self.ids[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1
        reasons = self._finish_reasons(rows, tokens)
        rewards = np.zeros(self.num_rows, dtype=np.float64)
        ended = np.zeros(self.num_rows, dtype=np.bool_)
        infos: dict[int, dict[str, Any]] = {}
        over = reasons != _RUNNING
        if over.any():
            rows, reasons = rows[over], reasons[over]
            # first, so that an error in the reward leaves no row with more tokens than fit
            self.active[rows] = False
            going_on = self._user_speaks(rows, reasons)
            self.active[rows[going_on]] = True
            ended[rows[~going_on]] = True
            if not going_on.all():
                infos = self._finish(rows[~going_on], reasons[~going_on])
            for row, info in infos.items():
                rewards[row] = info["score"]
            rewards[rows] -= self.task.missing_eos_penalty * (reasons == _LENGTH)
        return Step(rewards, ended, infos)

    def observations(self) -> np.ndarray:
        """A copy of all rows, shape (B, L), in the observation's dtype."""
        return self.ids.astype(self.task.obs_dtype)  # copies, of the same type too

    def observation(self, row: int) -> np.ndarray:
        """A copy of one row, shape (L,), in the observation's dtype."""
        return self.ids[row].astype(self.task.obs_dtype)

    def action_masks(self) -> np.ndarray:
        """Tokens allowed next, shape (B, V), bool; read-only where all rows allow the same."""
        allowed = self.task.vocabulary.allowed_tokens
        early = self._early()
        if not early.any():
            return np.broadcast_to(allowed, (self.num_rows, len(allowed)))
        before_eos = self.task.vocabulary.allowed_before_eos
        if early.all():
            return np.broadcast_to(before_eos, (self.num_rows, len(allowed)))
        return np.where(early[:, None], before_eos, allowed)

    def action_mask(self, row: int) -> np.ndarray:
        """Tokens allowed next in one row, shape (V,), bool, read-only."""
        vocabulary = self.task.vocabulary
        return vocabulary.allowed_before_eos if self._early()[row] else vocabulary.allowed_tokens

    def render(self, row: int) -> str:
        """The row as text, the agent's part bright, the rest dim (ANSI codes); "" if it is held."""
        prompt = self._prompts[row]
        if prompt is None:
            return ""
        parts = [f"{_DIM}{prompt.text}{_PLAIN}"]
        for message in self._said[row]:
            mine = message["role"] == "assistant"
            text = message["content"] if mine else f"\n{message['content']}\n"
            parts.append(f"{_BRIGHT if mine else _DIM}{text}{_PLAIN}")
        if len(self._said[row]) % 2 == 0:  # else the last answer is there already
            parts.append(f"{_BRIGHT}{self._text(row)}{_PLAIN}")
        return "".join(parts)

    def _early(self) -> np.ndarray:
        """Rows in which EOS is not allowed yet, shape (B,), bool."""
        return self.active & (self.lengths - self.starts < self.task.min_new_tokens)

    def _checked(self, actions: Any) -> np.ndarray:
        actions = np.asarray(actions)
        if not self._started:
            raise ResetNeeded("Cannot call step() before calling reset()")
        if actions.shape != (self.num_rows,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions: expected {self.num_rows} integers, got shape {actions.shape} of "
                f"type {actions.dtype}"
            )
        wrong = ((actions < 0) | (actions >= self.task.vocabulary.size)) & self.active
        if wrong.any():
            row = int(wrong.argmax())
            prompt = self._prompts[row]
            raise ValueError(
                f"action of row {row}: expected a token id in [0, {self.task.vocabulary.size}), "
                f"got {actions[row]} (prompt {prompt.text if prompt else None!r})"
            )
        return actions

    # -- ending ------------------------------------------------------------------------------------

    def _finish_reasons(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Why the turn of each of these rows ends now, as indices of `FINISH_REASONS`, or 0."""
        vocabulary = self.task.vocabulary
        n_tokens = self.lengths[rows] - self.starts[rows]
        reasons = np.where(n_tokens >= self.task.max_new_tokens, _LENGTH, _RUNNING)
        if vocabulary.stop:
            for i in np.flatnonzero(vocabulary.may_stop[tokens]):
                if vocabulary.find_stop(self._text(rows[i])) >= 0:
                    reasons[i] = _STOP
        reasons[vocabulary.is_eos[tokens] & (n_tokens > self.task.min_new_tokens)] = _EOS
        return reasons

    def _user_speaks(self, rows: np.ndarray, reasons: np.ndarray) -> np.ndarray:
        """Put the user's next turn into rows whose turn has ended; (n,) bool: where there is one.

        The texts are asked for in one call.
        """
        going_on = np.zeros(len(rows), dtype=np.bool_)
        user = self.task.user
        if user is None:
            return going_on
        for row, reason in zip(rows, reasons, strict=True):
            answer = {"role": "assistant", "content": self._completion(row, reason)}
            self._said[row].append(answer)
        prompts, said = [self._prompt(row) for row in rows], [self._said[row] for row in rows]
        for i, text in enumerate(user.next_texts(prompts, said)):
            if text is None:
                continue
            row, going_on[i] = rows[i], True
            ids = user.ids(prompts[i], said[i], text, by_end_token=reasons[i] == _EOS)
            said[i].append({"role": "user", "content": text})
            self.written[row] += self.lengths[row] - self.starts[row]
            end = self.lengths[row] + len(ids)
            self.ids[row, self.lengths[row] : end] = ids
            self.lengths[row] = self.starts[row] = end
        return going_on

    def _finish(self, rows: np.ndarray, reasons: np.ndarray) -> dict[int, dict[str, Any]]:
        """Score the episodes that ended and describe them."""
        prompts = [self._prompt(row) for row in rows]
        columns = {
            name: [prompt.columns[name] for prompt in prompts]
            for name in self.task.prompts.column_names
        }
        if self.task.user is None:
            conversations: list[dict[str, Any]] = [{} for _ in rows]
            texts = [self._completion(row, why) for row, why in zip(rows, reasons, strict=True)]
            scored: tuple[list[Any], list[Any]] = [prompt.text for prompt in prompts], list(texts)
        else:
            said = [self._said[row] for row in rows]
            scored = [copy.deepcopy(prompt.messages) for prompt in prompts], copy.deepcopy(said)
            texts = ["\n".join(m["content"] for m in messages[::2]) for messages in said]
            conversations = [
                {
                    "messages": copy.deepcopy([*(prompt.messages or ()), *messages]),
                    "n_turns": (len(messages) + 1) // 2,
                }
                for prompt, messages in zip(prompts, said, strict=True)
            ]
        n_tokens = (self.written[rows] + self.lengths[rows] - self.starts[rows]).tolist()
        told = {name: self._tokens(name, rows, texts) for name in self.task.asked_for}
        scores = score(
            self.task.reward_fn,
            *scored,
            columns | told,
            n_tokens if told else None,
            self.task.allow_nonfinite,
        )
        return {
            int(row): {
                "prompt": prompts[i].text,
                "completion": texts[i],
                **_scores_in_info(scores[i]),
                "finish_reason": FINISH_REASONS[reasons[i]],
                "n_tokens": n_tokens[i],
                **conversations[i],
                **{name: values[i] for name, values in told.items()},
                **copy.deepcopy(prompts[i].columns),  # users keep and change infos
            }
            for i, row in enumerate(rows)
        }

    def _tokens(self, name: str, rows: np.ndarray, completions: list[str]) -> list[Any]:
        """What a reward function has asked for, one of `TOKENS`."""
        ids = [self.ids[row, self.starts[row] : self.lengths[row]] for row in rows]
        if name == TOKENS[0]:
            return [row_ids.tolist() for row_ids in ids]
        return [
            self.task.vocabulary.pieces(self._prompt(row).ids, row_ids, completion)
            for row, row_ids, completion in zip(rows, ids, completions, strict=True)
        ]

    def _completion(self, row: int, reason: int) -> str:
        text = self._text(row, without_last=reason == _EOS)
        return text[: self.task.vocabulary.find_stop(text)] if reason == _STOP else text

    def _text(self, row: int, without_last: bool = False) -> str:
        """The turn under way, or just over, as it follows what was there before it."""
        start, end = self.starts[row], self.lengths[row] - without_last
        before, ids = self.ids[row, :start], self.ids[row, start:end]
        return self.task.vocabulary.completion_text(before, ids)

    def _prompt(self, row: int) -> Prompt:
        prompt = self._prompts[row]
        assert prompt is not None
        return prompt

    # -- life --------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Everything that changes, as JSON types (if the columns of a given prompt are)."""
        return {
            "prompts": self.task.prompts.fingerprint(),
            "rules": self._rules(),
            "started": self._started,
            "rows": [self._row_state(row) for row in range(self.num_rows)],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `get_state`, in a batch made with the same arguments.

        Raises:
            ValueError: The state is of another number of rows, other prompts, or another task.
        """
        rows = state["rows"]
        if len(rows) != self.num_rows:
            raise ValueError(f"state: expected {self.num_rows} rows, got {len(rows)}")
        if state["prompts"] != self.task.prompts.fingerprint():
            raise ValueError("state: expected one of the same prompts and tokenizer, got another's")
        rules = self._rules()
        if other := [k for k, v in rules.items() if state["rules"].get(k) != v]:
            there = {name: state["rules"].get(name) for name in other}
            here = {name: rules[name] for name in other}
            raise ValueError(
                f"state: expected one of the same task, {here}, got another's, {there}"
            )
        self._started = state["started"]
        for row, row_state in enumerate(rows):
            self._set_row_state(row, row_state)

    def _rules(self) -> dict[str, Any]:
        return {**self.task.rules(), "group_size": self.group_size}

    def _row_state(self, row: int) -> dict[str, Any]:
        generator, order, prompt = self._generators[row], self._orders[row], self._prompts[row]
        n_prompt = 0 if prompt is None else len(prompt.ids)
        turns = {}
        if self.task.user is not None:
            turns = {
                "said": copy.deepcopy(self._said[row]),
                "start": int(self.starts[row]),
                "written": int(self.written[row]),
            }
        return {
            "generator": None if generator is None else generator.bit_generator.state,
            "order": None if order is None else order.get_state(),
            "prompt": None if prompt is None else _prompt_state(prompt),
            "completion": self.ids[row, n_prompt : self.lengths[row]].tolist(),
            "active": bool(self.active[row]),
            **turns,
        }

    def _set_row_state(self, row: int, state: Mapping[str, Any]) -> None:
        self.hold(np.arange(self.num_rows) == row)
        self._generators[row] = self._orders[row] = None
        if state["generator"] is not None:
            generator, _ = seeding.np_random()
            self.use_generator(row, generator)
            order = self._orders[row]
            assert order is not None
            order.set_state(state["order"])
            generator.bit_generator.state = state["generator"]
        if state["prompt"] is not None:
            self._begin(row, self._prompt_from_state(state["prompt"]))
            end = self.lengths[row] + len(state["completion"])
            self.ids[row, self.lengths[row] : end] = state["completion"]
            self.lengths[row] = end
            if self.task.user is not None:
                self._said[row] = copy.deepcopy(state["said"])
                self.starts[row], self.written[row] = state["start"], state["written"]
        self.active[row] = state["active"]

    def _prompt_from_state(self, state: Mapping[str, Any]) -> Prompt:
        if state["number"] is not None:
            return self.task.prompts[state["number"]]
        ids = np.array(state["ids"], dtype=np.int64)
        columns, messages = dict(state["columns"]), state.get("messages")
        return Prompt(state["text"], ids, columns, None, messages)


def _scores_in_info(value: float | list[float]) -> dict[str, Any]:
    if isinstance(value, list):
        return {"score": sum(value), "token_scores": value}
    return {"score": value}


def _prompt_state(prompt: Prompt) -> dict[str, Any]:
    if prompt.number is not None:
        return {"number": prompt.number}
    return {**prompt._asdict(), "ids": prompt.ids.tolist()}
