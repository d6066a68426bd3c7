"""What learns: TokenPPO, its policy, decoder and buffer. Knows spaces, not environments.

Importing this package also makes the name "CausalLMPolicy" known to stock SB3 PPO and A2C.
"""

from stable_baselines3 import A2C, PPO

from agents.buffer import TokenRolloutBuffer
from agents.callbacks import SampleTextCallback, SavePretrainedCallback
from agents.checkpoint import DamagedCheckpoint
from agents.checkpoint_callback import CheckpointFolderCallback, StoppedBySignal
from agents.checkpoint_store import CheckpointStore, newest_whole
from agents.critic_free import TokenA2C, TokenGRPO, TokenRLOO
from agents.doctor import DoctorCallback
from agents.lm_reader import LMReader
from agents.lm_wrappers import LMFeatures, TopKActions, VecLMFeatures, VecTopKActions
from agents.policy import CausalLMPolicy
from agents.token_embedding import TokenEmbeddingExtractor
from agents.token_ppo import TokenPPO
from agents.weight_schedule import WeightScheduleCallback

for _algorithm in (A2C, PPO):
    _algorithm.policy_aliases["CausalLMPolicy"] = CausalLMPolicy

__all__ = [
    "CausalLMPolicy",
    "CheckpointFolderCallback",
    "CheckpointStore",
    "DamagedCheckpoint",
    "DoctorCallback",
    "LMFeatures",
    "LMReader",
    "SampleTextCallback",
    "SavePretrainedCallback",
    "StoppedBySignal",
    "TokenA2C",
    "TokenEmbeddingExtractor",
    "TokenGRPO",
    "TokenPPO",
    "TokenRLOO",
    "TokenRolloutBuffer",
    "TopKActions",
    "VecLMFeatures",
    "VecTopKActions",
    "WeightScheduleCallback",
    "newest_whole",
]
