"""TokenPPO without a critic: what a completion is compared with are others of the same prompt.

`TokenRLOO` and `TokenGRPO` share policy, decoder, loop, loss and KL penalty with TokenPPO; only
the advantages differ. `TokenA2C` keeps the critic and drops PPO's surrogate.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import GymEnv

from agents.buffer import Segment, TokenRolloutBuffer
from agents.policy import CausalLMPolicy
from agents.token_ppo import TokenPPO

NOT_WITHOUT_A_CRITIC = {"gamma", "gae_lambda", "vf_coef", "value_warmup", "whole_episodes"}
"""Arguments of TokenPPO that mean nothing where there is no critic."""

Baseline = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps returns (B,) and the groups (B,) they belong to, 0 to G − 1, to advantages (B,)."""


def leave_one_out(returns: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Compare each completion with the mean of its group's others.

    A_i = R_i − 1/(k−1) · Σ_{j≠i} R_j. Source: Kool et al. 2019; Ahmadian et al. 2024, section 3.2.
    """
    size = np.bincount(groups)[groups]
    others = np.bincount(groups, weights=returns)[groups] - returns
    return returns - others / (size - 1)


def group_relative(returns: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Standardise each completion's return within its group.

    A_i = (R_i − mean(R)) / (std(R) + 1e-4), with the unbiased standard deviation; 0 where all
    of a group are equal. Source: Shao et al. 2024, section 4.1.2.
    """
    size = np.bincount(groups)
    centred = returns - (np.bincount(groups, weights=returns) / size)[groups]
    variance = np.bincount(groups, weights=centred**2) / (size - 1)
    return centred / (np.sqrt(variance)[groups] + 1e-4)


class GroupRolloutBuffer(TokenRolloutBuffer):
    """A rollout of whole episodes, each of which is one action: all its tokens are as good."""

    def __init__(self, *arguments: Any, baseline: Baseline, **further: Any) -> None:
        """Take `TokenRolloutBuffer`'s arguments, and what makes advantages of returns."""
        self.baseline = baseline
        super().__init__(*arguments, **further)

    def _leave_out(self, segments: list[Segment]) -> None:
        """Leave out all completions of their prompts: the others would be compared unfairly."""
        keys = {s.context.tobytes() for s in segments}
        super()._leave_out([s for s in self.segments if s.context.tobytes() in keys])

    def estimate_advantages(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Give all tokens of an episode its return, and how it compares with its group.

        The return is the sum of the rewards, the KL penalty's included.

        Raises:
            ValueError: If an episode is not over, or the only one of its prompt.
        """
        cut = (self.lengths[-1] > 0) & ~np.asarray(dones, dtype=bool)
        if cut.any():
            raise ValueError(
                f"expected whole episodes, got {cut.sum()} of {self.n_envs} rows cut by the "
                "rollout's end: use TextVecEnv(autoreset=False) and n_steps of its max_new_tokens"
            )
        numbers: dict[bytes, int] = {}
        keys = [segment.context.tobytes() for segment in self.segments]
        groups = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        alone = np.bincount(groups)[groups] == 1
        if alone.any():
            raise ValueError(
                "expected two completions or more of each prompt in a rollout, got "
                f"{alone.sum()} of {len(groups)} alone: give TextVecEnv a group_size, 4 for example"
            )
        returns = np.array([self.rewards[s.start : s.end, s.row].sum() for s in self.segments])
        advantages = self.baseline(returns, groups)
        for segment, total, advantage in zip(self.segments, returns, advantages, strict=True):
            self.returns[segment.start : segment.end, segment.row] = total
            self.advantages[segment.start : segment.end, segment.row] = advantage


class TokenRLOO(TokenPPO):
    """REINFORCE with a leave-one-out baseline, in TokenPPO's frame (Ahmadian et al. 2024).

    A rollout is one whole episode per row of an environment that gives each prompt to several
    rows: `TextVecEnv(group_size=4, autoreset=False)`. `n_steps` must be as long as the longest.
    All completions of a prompt in a rollout are compared, of however many rows. As in TokenPPO the
    update may take several epochs, under the clipped ratio, the KL penalty is in the reward, and
    the loss is a mean over a minibatch's tokens, so that long completions weigh more than short
    ones; the paper's is a mean over completions.
    """

    baseline: ClassVar[Baseline] = staticmethod(leave_one_out)

    def __init__(
        self, policy: str | type[CausalLMPolicy], env: GymEnv | str, **arguments: Any
    ) -> None:
        """Set up training.

        Args:
            policy: As in TokenPPO.
            env: As in TokenPPO; several rows for each prompt.
            **arguments: TokenPPO's, by name, but for those of returns and critics: `gamma`,
                `gae_lambda`, `vf_coef`, `value_warmup`, and `whole_episodes`, which is True.

        Raises:
            TypeError: If one of these is given, or `group_size`, which is the environment's.
        """
        if "group_size" in arguments:
            raise TypeError("expected group_size in TextVecEnv(group_size=…), got it here")
        if refused := sorted(NOT_WITHOUT_A_CRITIC & set(arguments)):
            raise TypeError(f"{type(self).__name__} has no critic: expected no {refused}")
        arguments = {
            "normalize_advantage": False,
            "rollout_buffer_class": GroupRolloutBuffer,
            **arguments,
        }
        buffer = {"baseline": self.baseline, **(arguments.pop("rollout_buffer_kwargs", None) or {})}
        super().__init__(
            policy,
            env,
            vf_coef=0.0,
            whole_episodes=True,
            rollout_buffer_kwargs=buffer,
            **arguments,
        )

    def train(self) -> None:
        """Update the policy as TokenPPO does; a critic's figures are not logged."""
        super().train()
        for name in ("train/value_loss", "train/explained_variance"):
            self.logger.name_to_value.pop(name, None)
            self.logger.name_to_excluded.pop(name, None)


class TokenGRPO(TokenRLOO):
    """Advantages standardised within a prompt's completions (Shao et al. 2024).

    The paper has the KL penalty in the loss and a mean over each completion's tokens first; here
    both are as in `TokenRLOO`.
    """

    baseline: ClassVar[Baseline] = staticmethod(group_relative)


class TokenA2C(TokenPPO):
    """Advantage actor-critic: one step of gradient on each rollout, where PPO's ratio is 1.

    Huang et al. 2022 ("A2C is a special case of PPO"). Advantages are as in SB3's A2C:
    λ = 1, not whitened.
    """

    def __init__(
        self, policy: str | type[CausalLMPolicy], env: GymEnv | str, **arguments: Any
    ) -> None:
        """Set up training.

        Args:
            policy: As in TokenPPO.
            env: As in TokenPPO.
            **arguments: TokenPPO's, by name, but for `n_epochs` and `batch_size`.

        Raises:
            TypeError: If one of these two is given.
        """
        if refused := sorted({"n_epochs", "batch_size"} & set(arguments)):
            raise TypeError(f"TokenA2C takes one step on the whole rollout: expected no {refused}")
        own = {"gae_lambda": 1.0, "normalize_advantage": False}
        super().__init__(policy, env, n_epochs=1, batch_size=WHOLE_ROLLOUT, **{**own, **arguments})


WHOLE_ROLLOUT = 2**62
"""More tokens than any rollout has: all of it is one minibatch."""
