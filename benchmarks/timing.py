"""What a peer tells of one iteration."""

from math import nan
from typing import NamedTuple


class Timing(NamedTuple):
    """One iteration: useful completion tokens, and seconds in all and of its parts.

    Args:
        tokens: completion tokens, each row's up to its end.
        seconds: the whole iteration; what the parts leave is the reference and, in a loop that
            scores afterwards, the scoring.
        rollout: writing; in an environment with its bookkeeping and scoring.
        update: learning.
        bookkeeping: the part of the rollout that is not spent in the policy.
    """

    tokens: int
    seconds: float
    rollout: float
    update: float
    bookkeeping: float = nan
