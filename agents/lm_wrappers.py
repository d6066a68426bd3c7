"""Wrappers that make a language model's spaces fit for classic algorithms.

`TopKActions` offers the k likeliest next tokens in the place of all, `LMFeatures` the LM's last
hidden state in the place of ids; both for one Gymnasium environment, and with `Vec` before their
names for an SB3 `VecEnv`, where one call of the LM serves all rows. Ids must reach a wrapper as
they are, so features come outermost: `VecLMFeatures(VecTopKActions(venv, reader, k), reader)`.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from agents.language_model import LM, check_positions
from agents.lm_reader import LMReader
from agents.sequences import count_ids, require_token_actions


class TopKActions(gym.Wrapper, RecordConstructorArgs):
    """The action is a rank: 0 for the likeliest next token, k − 1 for the k-th.

    Tokens that the environment's `action_masks()` forbids are never offered; where it allows
    fewer than k, further ranks stand for the last of these, and `action_masks()` says so.
    """

    def __init__(self, env: gym.Env, lm: LM | LMReader, k: int = 16) -> None:
        """Wrap an environment of token ids.

        Args:
            env: Its observations are ids, its actions one per token.
            lm: The causal LM whose ranks they are, or the reader of another wrapper.
            k: Ranks to choose from.

        Raises:
            ValueError: If `k` is not within the vocabulary, or spaces or model do not fit.
        """
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, lm=lm, k=k)
        super().__init__(env)
        self.reader = reader_for(lm, env.observation_space)
        self.action_space = rank_space(env.action_space, self.reader, k)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode."""
        self._obs, info = self.env.reset(**kwargs)
        return self._obs, info

    def step(self, action: int) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Append the token of rank `action`."""
        tokens, n_allowed = self._offer()
        token = int(tokens[min(int(action), n_allowed - 1)])
        self._obs, *rest = self.env.step(token)
        return (self._obs, *rest)

    def action_masks(self) -> np.ndarray:
        """Ranks that stand for a token of their own now, (k,) bool."""
        return np.arange(self.action_space.n) < self._offer()[1]

    def _offer(self) -> tuple[np.ndarray, int]:
        """The tokens of all ranks (k,), and how many of them are allowed."""
        masks = None
        if self.env.has_wrapper_attr("action_masks"):
            masks = self.env.get_wrapper_attr("action_masks")()[None]
        tokens = self.reader.likeliest(self._obs[None], self.action_space.n, masks)[0]
        return tokens, len(tokens) if masks is None else min(len(tokens), int(masks.sum()))


class LMFeatures(gym.ObservationWrapper, RecordConstructorArgs):
    """The observation is the LM's last hidden state, (H,) float32, in the place of ids."""

    def __init__(self, env: gym.Env, lm: LM | LMReader) -> None:
        """Wrap an environment whose observations are ids.

        Args:
            env: The environment.
            lm: The causal LM, or the reader of another wrapper.

        Raises:
            ValueError: If space or model do not fit.
        """
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, lm=lm)
        super().__init__(env)
        self.reader = reader_for(lm, env.observation_space)
        self.observation_space = feature_space(self.reader)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """Read one observation: (L,) ids to (H,)."""
        return self.reader.read(observation[None])[0]


class VecTopKActions(VecEnvWrapper):
    """`TopKActions` for all rows of a VecEnv at once."""

    def __init__(self, venv: VecEnv, lm: LM | LMReader, k: int = 16) -> None:
        """Wrap a VecEnv; arguments and errors as for `TopKActions`."""
        require_vec_env(venv)
        self.reader = reader_for(lm, venv.observation_space)
        ranks = rank_space(venv.action_space, self.reader, k)
        super().__init__(venv, action_space=ranks)
        self.k = k
        self._masked = venv.has_attr("action_masks")

    def reset(self) -> VecEnvObs:
        """Begin an episode in every row."""
        self._obs = self.venv.reset()
        return self._obs

    def step_async(self, actions: np.ndarray) -> None:
        """Append to each row the token of the rank given."""
        tokens, n_allowed = self._offer()
        ranks = np.minimum(actions, n_allowed - 1)
        self.venv.step_async(tokens[np.arange(self.num_envs), ranks])

    def step_wait(self) -> VecEnvStepReturn:
        """Return what the wrapped environment does."""
        self._obs, rewards, dones, infos = self.venv.step_wait()
        return self._obs, rewards, dones, infos

    def action_masks(self) -> np.ndarray:
        """Ranks that stand for a token of their own now, (n, k) bool."""
        return np.arange(self.k) < self._offer()[1][:, None]

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of each row; "action_masks" gives those of ranks."""
        if method_name == "action_masks":
            return list(self.action_masks()[list(self._get_indices(indices))])
        return self.venv.env_method(method_name, *args, indices=indices, **kwargs)

    def _offer(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all ranks (n, k), and how many of them are allowed (n,)."""
        masks = np.stack(self.venv.env_method("action_masks")) if self._masked else None
        tokens = self.reader.likeliest(self._obs, self.k, masks)
        if masks is None:
            return tokens, np.full(self.num_envs, self.k)
        return tokens, np.minimum(masks.sum(axis=1), self.k)


class VecLMFeatures(VecEnvWrapper):
    """`LMFeatures` for all rows of a VecEnv at once; a row that is held shows 0."""

    def __init__(self, venv: VecEnv, lm: LM | LMReader) -> None:
        """Wrap a VecEnv; arguments and errors as for `LMFeatures`."""
        require_vec_env(venv)
        self.reader = reader_for(lm, venv.observation_space)
        super().__init__(venv, observation_space=feature_space(self.reader))

    def reset(self) -> np.ndarray:
        """Begin an episode in every row."""
        return self.reader.read(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """Return what the wrapped environment does, observations and last ones as features."""
        obs, rewards, dones, infos = self.venv.step_wait()
        features = self.reader.read(obs)
        ended = [info for info in infos if "terminal_observation" in info]
        if ended:
            last = self.reader.read_aside(np.stack([i["terminal_observation"] for i in ended]))
            for info, state in zip(ended, last, strict=True):
                info["terminal_observation"] = state
        return features, rewards, dones, infos


def require_vec_env(venv: Any) -> None:
    """Require an SB3 VecEnv.

    Raises:
        TypeError: If it is a single environment, or Gymnasium's kind of batch.
    """
    if not isinstance(venv, VecEnv):
        raise TypeError(
            f"expected an SB3 VecEnv, such as TextVecEnv, got {type(venv).__name__}; for a single "
            "environment there are TopKActions and LMFeatures"
        )


def reader_for(lm: LM | LMReader, observation_space: spaces.Space) -> LMReader:
    """Return the reader given, or make one for the tokens of an observation space.

    Raises:
        ValueError: If the observations are not token ids, those of another vocabulary, or longer
            than the model has positions for.
    """
    vocab_size = count_ids(observation_space)
    reader = lm if isinstance(lm, LMReader) else LMReader(lm, vocab_size)
    if reader.vocab_size != vocab_size:
        raise ValueError(
            f"expected a reader of {vocab_size} tokens, got one of {reader.vocab_size}"
        )
    check_positions(reader.lm, observation_space.shape[0])
    return reader


def feature_space(reader: LMReader) -> spaces.Box:
    """Return the space of hidden states, (H,) float32."""
    return spaces.Box(-np.inf, np.inf, shape=(reader.hidden_size,), dtype=np.float32)


def rank_space(action_space: spaces.Space, reader: LMReader, k: int) -> spaces.Discrete:
    """Return the space of k ranks.

    Raises:
        ValueError: If `k` is out of range, or the actions are not one per token.
    """
    require_token_actions(action_space, reader.vocab_size)
    if not 1 <= k <= reader.vocab_size:
        raise ValueError(f"expected k in 1 to {reader.vocab_size} tokens, got {k}")
    return spaces.Discrete(k)
