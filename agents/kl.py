"""The KL penalty to the reference model: estimators and the controller of its weight.

With log-ratio d = log π(a) − log π_ref(a) of a token sampled from π, three estimators of
KL(π‖π_ref) (Schulman, "Approximating KL divergence", 2020): k1 = d, k2 = d²/2 and
k3 = exp(−d) − 1 + d. The penalty in the reward is k1, whose gradient is right in expectation;
the others are for the log.
"""

import numpy as np


def kl_estimates(log_ratio: np.ndarray) -> dict[str, np.ndarray]:
    """Return k1, k2 and k3 (nats) of the log-ratios log π(a) − log π_ref(a), elementwise."""
    return {
        "k1": log_ratio,
        "k2": log_ratio**2 / 2,
        "k3": np.expm1(-log_ratio) + log_ratio,
    }


class KLController:
    """The weight β of the KL penalty: fixed, or moved so that the KL comes to a target.

    The adaptive rule is Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
    (2019), section 2.2: e = clip(KL/target − 1, −0.2, 0.2), β ← β·(1 + e·episodes/horizon).
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10_000) -> None:
        """Start at `coef`.

        Args:
            coef: β at the start, score units per nat.
            target: KL to keep, nats per completion (a sum over its tokens); None keeps β fixed.
            horizon: Episodes over which β follows a lasting error.

        Raises:
            ValueError: If an argument is out of range.
        """
        if coef < 0:
            raise ValueError(f"expected kl_coef >= 0, got {coef}")
        if target is not None and target <= 0:
            raise ValueError(f"expected target_ref_kl > 0 nats per completion, got {target}")
        if target is not None and coef == 0:
            raise ValueError("expected kl_coef > 0 with target_ref_kl: a weight of 0 stays 0")
        if horizon <= 0:
            raise ValueError(f"expected kl_horizon > 0 episodes, got {horizon}")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, ref_kl: float, n_episodes: int) -> None:
        """Move β after `n_episodes` completions with a mean KL of `ref_kl` nats each."""
        if self.target is not None:
            error = float(np.clip(ref_kl / self.target - 1, -0.2, 0.2))
            self.coef *= 1 + error * n_episodes / self.horizon
