"""The Stable-Baselines3 `VecEnv` face: B rows, one reward call for all that end at a step."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from text_env.environment import checked_render_mode, show
from text_env.episodes import Episodes
from text_env.task import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextVecEnv(VecEnv):
    """A batch of `TextEnvironment`s: the same spaces, rules and trajectories, row by row.

    Follows `DummyVecEnv`: a row whose episode has ended is reset at once, its last observation is
    `info["terminal_observation"]`. It does a `Monitor`'s work too (`info["episode"]`: return "r",
    length "l" in tokens, time "t" in seconds), and says so when asked whether it is wrapped with
    one; so `ep_info_buffer` fills and `evaluate_policy` does not warn.

    Args:
        num_envs: Number of rows, B.
        group_size: So many neighbouring rows get the same prompts in the same order, as RLOO and
            GRPO need it: `seed(s)` gives group g the seed s + g.
        autoreset: With False, a row whose episode has ended is held: its observation is all -1
            (from the ending step on), its reward 0, done False, and its action ignored, until
            `reset`. For algorithms that reset it for each rollout (TokenPPO and its relatives with
            `whole_episodes`); others would go on learning from rows that do nothing.
        render_mode: As for `TextEnvironment`.
        **arguments: Those of `TextEnvironment`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        group_size: int = 1,
        autoreset: bool = True,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        self.autoreset = autoreset
        self.render_mode = checked_render_mode(render_mode)
        self.task = TextTask(**arguments)
        self.episodes = Episodes(self.task, num_envs, group_size)
        self.num_envs = num_envs  # VecEnv's constructor already calls get_attr
        super().__init__(num_envs, self.task.observation_space, self.task.action_space)
        self._actions: Any = None
        self._start_time = time.time()

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer in use."""
        return self.task.tokenizer

    @property
    def max_new_tokens(self) -> int:
        """Tokens that an agent can write in one episode, in all of its turns."""
        return self.task.max_episode_tokens

    @property
    def allowed_tokens(self) -> np.ndarray:
        """Tokens that may be allowed at all, shape (V,), bool, read-only."""
        return self.task.vocabulary.allowed_tokens

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the rows at the next reset: a group's rows alike, each group by one more."""
        first = super().seed(seed)[0]
        assert first is not None
        self._seeds = list(self.episodes.group_seeds(first))
        return self._seeds

    def reset(self) -> np.ndarray:
        """Begin an episode in every row, with the seeds and options set before (used once).

        Returns:
            Observations, shape (B, L).
        """
        for row, (seed, options) in enumerate(zip(self._seeds, self._options, strict=True)):
            if seed is not None:
                self.episodes.seed(row, seed)
            self.episodes.reset([row], options)
        self._reset_seeds()
        self._reset_options()
        self._show()
        return self.episodes.observations()

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions, shape (B,), for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Append one token to each row that is not held.

        Returns:
            Observations (B, L), rewards (B,) float32, dones (B,) bool, and one info per row: empty,
            or for a row that is done what `TextEnvironment` gives and "terminal_observation",
            "episode" and "TimeLimit.truncated" (always False).

        Raises:
            ResetNeeded: There was no reset yet.
            ValueError: An action is not a token id, or the reward function's answer is wrong.
        """
        step = self.episodes.step(self._actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        elapsed = round(time.time() - self._start_time, 6)
        for row, info in step.infos.items():
            info["terminal_observation"] = self.episodes.observation(row)
            info["TimeLimit.truncated"] = False
            info["episode"] = {"r": float(step.rewards[row]), "l": info["n_tokens"], "t": elapsed}
            infos[row] = info
        if step.infos:
            if self.autoreset:
                self.episodes.reset(step.infos)
            else:
                self.episodes.hold(step.ended)
        self._show()
        rewards = step.rewards.astype(np.float32)
        return self.episodes.observations(), rewards, step.ended, infos

    def action_masks(self) -> np.ndarray:
        """Tokens allowed next, shape (B, V), bool; read-only where all rows allow the same."""
        return self.episodes.action_masks()

    def render(self, mode: str | None = None) -> str | None:  # type: ignore[override]
        """The texts so far, one per line: returned ("ansi") or written to stdout ("human")."""
        mode = mode or self.render_mode
        if mode is None or mode != self.render_mode:
            gym.logger.warn(
                f"render: expected the constructor's mode {self.render_mode!r}, got {mode!r}"
            )
            return None
        text = "\n".join(self.episodes.render(row) for row in range(self.num_envs))
        if mode == "ansi":
            return text
        show(text)
        return None

    def close(self) -> None:
        """Nothing to close."""

    def get_state(self) -> dict[str, Any]:
        """The state of all rows as JSON types."""
        return {**self.episodes.get_state(), "autoreset": self.autoreset}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`, in an environment made with the same arguments.

        Raises:
            ValueError: The state is of other arguments.
        """
        if state["autoreset"] != self.autoreset:
            raise ValueError(
                f"state: expected one of autoreset={self.autoreset}, got {state['autoreset']}"
            )
        self.episodes.set_state(state)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute once for each row; all rows share them."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute for all rows.

        Raises:
            ValueError: Only some rows are named.
        """
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(
                f"set_attr: expected all rows, which share their attributes, got indices={indices}"
            )
        setattr(self, attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,
        indices: VecEnvIndices = None,
        **method_kwargs: Any,
    ) -> list[Any]:
        """Call a method of each row: "action_masks" or "render".

        Raises:
            AttributeError: It is another method: a row is no environment of its own.
        """
        methods = {"action_masks": self.episodes.action_mask, "render": self._render_row}
        if method_name not in methods:
            raise AttributeError(
                f"env_method: expected one of {', '.join(methods)}, got {method_name!r}; "
                "call it on TextVecEnv itself if it concerns all rows"
            )
        method = methods[method_name]
        return [method(row, *method_args, **method_kwargs) for row in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        """True for `Monitor`, whose work is done here, and False for any other wrapper."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def _get_indices(self, indices: VecEnvIndices) -> Iterable[int]:
        return [int(row) for row in super()._get_indices(indices)]

    def _render_row(self, row: int) -> str:
        text = self.episodes.render(row)
        if self.render_mode == "human":
            show(text)
        return text

    def _show(self) -> None:
        if self.render_mode == "human":
            self.render()
