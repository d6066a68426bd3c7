"""A features extractor for SB3's own policies, to which ids would be mere numbers."""

import gymnasium as gym
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents.sequences import count_ids


class TokenEmbeddingExtractor(BaseFeaturesExtractor):
    """Each place's token as a learned vector; padding as 0. (n, L) ids to (n, L·D) features.

    `policy_kwargs={"features_extractor_class": TokenEmbeddingExtractor}` gives SB3's MlpPolicy
    something that it can learn from.
    """

    def __init__(self, observation_space: gym.Space, embedding_dim: int = 16) -> None:
        """Make the embedding.

        Args:
            observation_space: A one-dimensional Box of token ids, -1 for padding.
            embedding_dim: D, size of a token's vector.

        Raises:
            ValueError: If the observations are not token ids.
        """
        n_tokens = count_ids(observation_space)
        super().__init__(observation_space, observation_space.shape[0] * embedding_dim)
        self.embedding = nn.Embedding(n_tokens + 1, embedding_dim, padding_idx=0)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """Map ids (n, L), as floats since SB3 makes them so, to features (n, L·D)."""
        return self.embedding(observations.long() + 1).flatten(start_dim=-2)
