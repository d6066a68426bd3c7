"""Action masks of a rollout: asked of the environment at each step, each distinct one kept once.

A mask per token would be (T, n_envs, V): gigabytes at a real vocabulary. Rows of a text
environment share a handful of masks, so a rollout keeps those and an index per token.
"""

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv


class ActionMasks:
    """The masks that an environment's `action_masks()` gave since the rollout began."""

    def __init__(self, env: VecEnv, device: th.device) -> None:
        """Ask `env`, an SB3 VecEnv whose rows have a method `action_masks`."""
        self.env, self.device = env, device
        self._table: list[th.Tensor] = []
        self._index: dict[bytes, int] = {}
        self._last: np.ndarray | None = None
        self.mask_id = np.zeros(env.num_envs, dtype=np.int32)
        """(n_envs,) int32, the masks of the step asked last."""

    def ask(self) -> th.Tensor:
        """Return the tokens allowed at this step: (n_envs, V) bool."""
        masks = np.stack(self.env.env_method("action_masks")).astype(bool, copy=False)
        if self._last is None or not np.array_equal(masks, self._last):
            self.mask_id = np.array([self._intern(mask) for mask in masks], dtype=np.int32)
            self._last = masks
            self._current = self.table()[th.from_numpy(self.mask_id).long()]
        return self._current

    def table(self) -> th.Tensor:
        """Return the distinct masks so far: (M, V) bool."""
        return th.stack(self._table)

    @property
    def known(self) -> bool:
        """Whether there was a mask yet."""
        return bool(self._table)

    def know(self, table: th.Tensor) -> None:
        """Begin with the masks that a rollout has met before, (M, V) bool."""
        for mask in table.cpu().numpy():
            self._intern(mask)

    def _intern(self, mask: np.ndarray) -> int:
        key = mask.tobytes()
        if key not in self._index:
            if not mask.any():
                raise ValueError("expected at least one allowed token, got a mask of none")
            self._index[key] = len(self._table)
            self._table.append(th.from_numpy(mask.copy()).to(self.device))
        return self._index[key]
