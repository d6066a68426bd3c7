"""PPO in one file, over `gym.make_vec`: what it takes to plug another algorithm in.

    python examples/single_file_ppo.py [--mode sync | async | vector_entry_point] [--same-step]

Letters are written, each "c" is worth a point. No language model and nothing of `agents`: a small
network over embedded ids, so that all of the loop can be seen. It runs for seconds; random scores
about 0.6 of 8. All modes give the same run; `vector_entry_point` is the fastest.
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.vector import AutoresetMode
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from torch import nn
from torch.distributions import Categorical
from transformers import PreTrainedTokenizerFast

import text_env  # noqa: F401  registers TextEnvironment-v0


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per letter, and an end token."""
    tokens = [*"abcdefgh>", "<eos>"]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=">"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    words.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def count_c(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score a completion by its c's."""
    return [float(text.count("c")) for text in completions]


class Agent(nn.Module):
    """An actor and a critic over embedded ids; padding is id -1 and embedded as 0."""

    def __init__(self, length: int, n_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens + 1, 16, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(16 * length, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, n_tokens), nn.Linear(64, 1)

    def forward(self, obs: th.Tensor) -> tuple[Categorical, th.Tensor]:
        """Map ids (n, L) to distributions over the next token and values (n,)."""
        features = self.body(self.embedding(obs + 1).flatten(1))
        return Categorical(logits=self.actor(features)), self.critic(features)[:, 0]


def train(mode: str, autoreset: AutoresetMode, n_updates: int, seed: int = 0) -> list[float]:
    """Train, and return the mean score of the episodes of each rollout.

    With NEXT_STEP a row's step after its episode is a reset that ignores the action: it is left
    out of the loss. With SAME_STEP there is no such step.
    """
    n_envs, n_steps, n_epochs, lr, clip, ent_coef, gae_lambda = 16, 32, 4, 3e-3, 0.2, 0.01, 0.95
    th.manual_seed(seed)
    in_a_vector = mode == "vector_entry_point"
    how = {"autoreset_mode": autoreset}
    envs = gym.make_vec(
        "TextEnvironment-v0",
        num_envs=n_envs,
        vectorization_mode=mode,
        **(how if in_a_vector else {"vector_kwargs": how}),
        tokenizer=letter_tokenizer(),
        prompts=[">", ">>"],
        reward_fn=count_c,
        max_new_tokens=8,
    )
    length = envs.single_observation_space.shape[0]
    agent = Agent(length, int(envs.single_action_space.n))
    optimizer = th.optim.Adam(agent.parameters(), lr=lr, eps=1e-5)
    shape = (n_steps, n_envs)
    obs, actions = th.zeros(*shape, length, dtype=th.long), th.zeros(shape, dtype=th.long)
    log_probs, rewards, values, dones = (th.zeros(shape) for _ in range(4))
    valid = th.zeros(shape, dtype=th.bool)
    next_obs, _ = envs.reset(seed=seed)
    resetting = np.zeros(n_envs, dtype=bool)
    curve = []
    for _ in range(n_updates):
        scores = []
        for t in range(n_steps):
            obs[t], valid[t] = th.from_numpy(next_obs), th.from_numpy(~resetting)
            with th.no_grad():
                distribution, values[t] = agent(obs[t])
                actions[t] = distribution.sample()
                log_probs[t] = distribution.log_prob(actions[t])
            next_obs, reward, terminated, truncated, _ = envs.step(actions[t].numpy())
            done = terminated | truncated
            rewards[t], dones[t] = th.from_numpy(reward), th.from_numpy(done.astype(np.float32))
            scores += reward[done].tolist()
            resetting = done & (autoreset is AutoresetMode.NEXT_STEP)
        curve.append(float(np.mean(scores)))
        with th.no_grad():  # generalized advantage estimation, gamma = 1
            _, following = agent(th.from_numpy(next_obs))
            advantages, last = th.zeros(shape), th.zeros(n_envs)
            for t in reversed(range(n_steps)):
                going_on = 1 - dones[t]
                delta = rewards[t] + following * going_on - values[t]
                advantages[t] = last = delta + gae_lambda * going_on * last
                following = values[t]
            returns = advantages + values
        batch = [x[valid] for x in (obs, actions, log_probs, advantages, returns)]
        for _ in range(n_epochs):
            for part in th.randperm(len(batch[0])).split(128):
                o, a, old, advantage, target = (x[part] for x in batch)
                distribution, value = agent(o)
                advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
                ratio = (distribution.log_prob(a) - old).exp()
                surrogate = th.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
                entropy = distribution.entropy().mean()
                loss = -surrogate.mean() + 0.5 * (value - target).square().mean()
                optimizer.zero_grad()
                (loss - ent_coef * entropy).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    envs.close()
    return curve


def main() -> None:
    """Train and print the curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    modes = ("vector_entry_point", "sync", "async")
    parser.add_argument("--mode", choices=modes, default=modes[0])
    parser.add_argument("--same-step", action="store_true", help="autoreset within the ending step")
    parser.add_argument("--updates", type=int, default=30)
    chosen = parser.parse_args()
    autoreset = AutoresetMode.SAME_STEP if chosen.same_step else AutoresetMode.NEXT_STEP
    for i, score in enumerate(train(chosen.mode, autoreset, chosen.updates)):
        print(f"update {i + 1:3}: mean score {score:.2f} of 8", flush=True)


if __name__ == "__main__":
    main()
