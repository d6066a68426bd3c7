"""The Gymnasium `VectorEnv` face: B rows, one reward call for all that end at a step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from text_env.environment import RENDER_MODES, checked_render_mode, show
from text_env.episodes import Episodes
from text_env.task import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """A batch of `TextEnvironment`s: the same spaces, rules and trajectories, row by row.

    Observations (B, L), rewards (B,) float64, `infos` and seeds as `gymnasium.vector.SyncVectorEnv`
    has them.

    Args:
        num_envs: Number of rows, B.
        group_size: So many neighbouring rows get the same prompts in the same order:
            `reset(seed=s)` gives group g the seed s + g.
        autoreset_mode: What happens to a row whose episode has ended. NEXT_STEP: the next step
            resets it and ignores its action. SAME_STEP: it is reset at once; `infos` has
            "final_obs" and "final_info". DISABLED: it is held (observation all -1, reward 0, action
            ignored) until `reset(options={"reset_mask": ...})`.
        render_mode: As for `TextEnvironment`.
        **arguments: Those of `TextEnvironment`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        group_size: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": list(RENDER_MODES), "autoreset_mode": self.autoreset_mode}
        self.render_mode = checked_render_mode(render_mode)
        self.num_envs = num_envs
        self.task = TextTask(**arguments)
        self.episodes = Episodes(self.task, num_envs, group_size)
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer in use."""
        return self.task.tokenizer

    @property
    def allowed_tokens(self) -> np.ndarray:
        """Tokens that may be allowed at all, shape (V,), bool, read-only."""
        return self.task.vocabulary.allowed_tokens

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The rows' generators."""
        return tuple(self.episodes.generator(row) for row in range(self.num_envs))

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in every row, or in those of a mask.

        Args:
            seed: s gives the rows (or groups of rows) the seeds s, s + 1, ...; or one for each
                row, None leaving its generator.
            options: "reset_mask", shape (B,), bool: rows to reset. "prompt": begins all of them
                with it.

        Returns:
            The observations of all rows, and an empty info.
        """
        options = dict(options or {})
        rows = _rows_of_mask(options.pop("reset_mask", None), self.num_envs)
        for row, row_seed in enumerate(self._row_seeds(seed)):
            if row_seed is not None and row in rows:
                self.episodes.seed(row, row_seed)
        self.episodes.reset(rows, options)
        self._show()
        return self.episodes.observations(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Append one token to each row, or treat it by the autoreset mode.

        Args:
            actions: Token ids, shape (B,).

        Returns:
            Observations, rewards, terminations, truncations (all False), infos.

        Raises:
            ResetNeeded: There was no reset yet.
            ValueError: An action is not a token id, or the reward function's answer is wrong.
        """
        resting = ~self.episodes.active
        step = self.episodes.step(actions)
        if resting.any():
            if self.autoreset_mode is AutoresetMode.NEXT_STEP:
                self.episodes.reset(np.flatnonzero(resting))
            else:
                self.episodes.hold(resting)
        infos: dict[str, Any] = {}
        for row, info in step.infos.items():
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                info = {"final_obs": self.episodes.observation(row), "final_info": info}
            infos = self._add_info(infos, info, row)
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            self.episodes.reset(step.infos)
        self._show()
        truncations = np.zeros(self.num_envs, dtype=np.bool_)
        return self.episodes.observations(), step.rewards, step.ended, truncations, infos

    def action_masks(self) -> np.ndarray:
        """Tokens allowed next, shape (B, V), bool; read-only where all rows allow the same."""
        return self.episodes.action_masks()

    def render(self) -> tuple[str, ...] | None:
        """The texts so far: returned in mode "ansi", written to stdout in mode "human"."""
        if self.render_mode is None:
            gym.logger.warn(
                "render() does nothing without a render_mode; give one to the constructor"
            )
            return None
        texts = tuple(self.episodes.render(row) for row in range(self.num_envs))
        if self.render_mode == "ansi":
            return texts
        show("\n".join(texts))
        return None

    def get_state(self) -> dict[str, Any]:
        """The state of all rows as JSON types."""
        return self.episodes.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`, in an environment made with the same arguments."""
        self.episodes.set_state(state)

    def _row_seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return list(self.episodes.group_seeds(int(seed)))
        if len(seed) != self.num_envs:
            raise ValueError(f"seed: expected {self.num_envs} seeds, got {len(seed)}")
        return seed

    def _show(self) -> None:
        if self.render_mode == "human":
            self.render()


def _rows_of_mask(mask: np.ndarray | None, num_envs: int) -> list[int]:
    """Numbers of the rows that a reset mask names."""
    if mask is None:
        return list(range(num_envs))
    if not isinstance(mask, np.ndarray) or mask.shape != (num_envs,) or mask.dtype != np.bool_:
        raise ValueError(f"reset_mask: expected {num_envs} bools in an array, got {mask!r}")
    if not mask.any():
        raise ValueError("reset_mask: expected at least one True, got none")
    return [int(row) for row in np.flatnonzero(mask)]
