"""Rewards on the way that leave the aim as it is: potential-based shaping."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from reward_models.composed import add_at_end
from reward_models.contract import TOKENS, RewardFunction, ask, asked_for


class PotentialShaping:
    """Adds to a reward, at each token, how much better the text looks after it than before.

    A token that leads from the text s to s′ gets F = γΦ(s′) − Φ(s) on top of its reward. What is
    best, with and without a KL penalty, is the same with F as without it, whatever the potential Φ
    is; a good one tells the agent early what the score will say at the end. Φ of the finished text
    counts as 0, as it must for that, and Φ of the bare prompt is subtracted from all others: with
    γ = 1 the sum of F is then 0, and the score stays what it was.

    Φ is asked about the text after every token, so it should be cheap.

    Args:
        reward_fn: the reward.
        potential: Φ, a reward function that is given unfinished completions, the empty one too.
        weight: times Φ.
        gamma: γ, the agent's.

    Source: Ng, Harada & Russell 1999, Policy Invariance under Reward Transformations; for the last
    state Grzes 2017, Reward Shaping in Episodic Reinforcement Learning.
    """

    def __init__(
        self,
        reward_fn: RewardFunction,
        potential: RewardFunction,
        weight: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        self.reward_fn, self.potential = reward_fn, potential
        self.weight, self.gamma = weight, gamma

    @property
    def asks_for(self) -> set[str]:
        """The tokens' texts, and what the reward asks for."""
        return {"completion_pieces"} | asked_for(self.reward_fn)

    def __call__(
        self,
        *,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_pieces: Sequence[Sequence[str]],
        **columns: Any,
    ) -> list[list[float]]:
        """Score each token; see `RewardFunction`.

        Raises:
            ValueError: if reward or potential return a wrong number of scores, or one that is not
                finite.
        """
        columns["completion_pieces"] = completion_pieces
        scores = ask(self.reward_fn, prompts, completions, columns)
        shaped = []
        for values, score in zip(
            self._potentials(prompts, completion_pieces, columns), scores, strict=True
        ):
            after = np.append(values[1:], 0.0)
            shaped.append(add_at_end(self.gamma * after - values, score).tolist())
        return shaped

    def _potentials(
        self, prompts: Sequence[str], pieces: Sequence[Sequence[str]], columns: dict[str, Any]
    ) -> list[np.ndarray]:
        """Φ before each token, asked for once where a token adds nothing to the text."""
        sofar = [
            ["".join(tokens[:end]) for end in range(len(tokens))] for tokens in pieces
        ]  # B lists of T texts
        places = [(row, text) for row, texts in enumerate(sofar) for text in dict.fromkeys(texts)]
        unfinished = {
            name: [column[row] for row, _ in places]
            for name, column in columns.items()
            if name not in TOKENS
        }
        values = ask(
            self.potential,
            [prompts[row] for row, _ in places],
            [text for _, text in places],
            unfinished,
        )
        known = {
            place: self.weight * float(v.sum()) for place, v in zip(places, values, strict=True)
        }
        return [
            np.array([known[row, text] - known[row, ""] for text in texts])
            for row, texts in enumerate(sofar)
        ]
