"""How good a text is: reward functions, learned and written by hand, and the feedback they need.

`LearnedRewardModel` and `RewardEnsemble` are loaded when first asked for, so that importing this
package costs neither torch nor transformers. What acts on the scores (environment, agent) is not
known here.
"""

from typing import TYPE_CHECKING, Any

from reward_models.assets import AssetError
from reward_models.composed import WeightedSum, weighted_sum
from reward_models.contract import RewardFunction, checked_scores
from reward_models.conversations import EachAnswer
from reward_models.feedback.records import (
    Comparison,
    Feedback,
    Label,
    Rating,
    read_feedback,
    write_feedback,
)
from reward_models.feedback.simulated import SimulatedAnnotator
from reward_models.feedback.weights import agreement_weights
from reward_models.http_reward import HTTPRewardError, HTTPRewardModel
from reward_models.http_server import reward_server
from reward_models.references import Bleu, ChrF, ExactMatch, Rouge, self_bleu
from reward_models.shaping import PotentialShaping
from reward_models.terms import (
    LengthReward,
    LexiconSentiment,
    RepetitionPenalty,
    distinct_n,
    repetition,
)
from reward_models.time_limit import TimeLimitedReward

if TYPE_CHECKING:
    from reward_models.ensemble import RewardEnsemble, load_reward_model
    from reward_models.learned import LearnedRewardModel

__all__ = [
    "AssetError",
    "Bleu",
    "ChrF",
    "Comparison",
    "EachAnswer",
    "ExactMatch",
    "Feedback",
    "HTTPRewardError",
    "HTTPRewardModel",
    "Label",
    "LearnedRewardModel",
    "LengthReward",
    "LexiconSentiment",
    "PotentialShaping",
    "Rating",
    "RepetitionPenalty",
    "RewardEnsemble",
    "RewardFunction",
    "Rouge",
    "SimulatedAnnotator",
    "TimeLimitedReward",
    "WeightedSum",
    "agreement_weights",
    "checked_scores",
    "distinct_n",
    "load_reward_model",
    "read_feedback",
    "repetition",
    "reward_server",
    "self_bleu",
    "weighted_sum",
    "write_feedback",
]


def __getattr__(name: str) -> Any:
    if name == "LearnedRewardModel":
        from reward_models.learned import LearnedRewardModel

        return LearnedRewardModel
    if name in ("RewardEnsemble", "load_reward_model"):
        from reward_models import ensemble

        return getattr(ensemble, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
