"""Text generation as a Gymnasium environment; holds no model and no reward.

Importing this package registers `TextEnvironment-v0`. `TextVecEnv` is imported when it is first
asked for, so that Stable-Baselines3 (and with it torch) is needed by those who use it only.
"""

from typing import TYPE_CHECKING, Any

import gymnasium as gym

from text_env.environment import TextEnvironment
from text_env.prompts import PromptSet, load_prompts, split_by_hash
from text_env.scoring import RewardFunction
from text_env.turns import UserFunction
from text_env.vector import TextVectorEnv

if TYPE_CHECKING:
    from text_env.sb3 import TextVecEnv

__all__ = [
    "PromptSet",
    "RewardFunction",
    "TextEnvironment",
    "TextVecEnv",
    "TextVectorEnv",
    "UserFunction",
    "load_prompts",
    "split_by_hash",
]

gym.register(
    id="TextEnvironment-v0",
    entry_point="text_env.environment:TextEnvironment",
    vector_entry_point="text_env.vector:TextVectorEnv",
)


def __getattr__(name: str) -> Any:
    """Import the Stable-Baselines3 face on first use."""
    if name == "TextVecEnv":
        from text_env.sb3 import TextVecEnv

        return TextVecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
