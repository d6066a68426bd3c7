"""The algorithms that are compared: each learns one task within a budget, watched by a `Curve`.

Token-level ones have the task's LM as their policy, and its frozen copy as their reference; the
classic ones a small network over embedded ids, and know nothing but observations and rewards.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch as th
from sb3_contrib import QRDQN, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from agents import (
    CausalLMPolicy,
    TokenA2C,
    TokenGRPO,
    TokenPPO,
    TokenRLOO,
)
from agents.sequences import PAD, TokenBatch, pad_right
from benchmarks.small_tasks import SmallTask, one_hot

Settings = dict[str, Any]


class Budget(NamedTuple):
    """What a run may use: tokens generated, and seconds of learning, the measuring not counted."""

    tokens: int
    seconds: float


Policy = Any
"""What a task makes of a policy or network, and measures: `Task.from_lm`, `Task.from_network`."""


class Task(Protocol):
    """What the algorithms need to know of a task."""

    @property
    def beta(self) -> float:
        """Weight of the KL penalty."""

    @property
    def max_new_tokens(self) -> int:
        """Tokens of the longest completion."""

    @property
    def network_kwargs(self) -> dict[str, Any]:
        """Return `policy_kwargs` of algorithms with a small network."""

    @property
    def lm_kwargs(self) -> dict[str, Any]:
        """Return `policy_kwargs` of algorithms whose policy is a language model."""

    def env(self, num_envs: int, **changes: Any) -> VecEnv:
        """Return the environment; changes are arguments of `TextVecEnv`."""

    def network_env(self, num_envs: int) -> VecEnv:
        """Return the environment as algorithms with a small network have it."""

    def uniform(self) -> Policy:
        """Return a writer of random tokens."""

    def from_lm(self, policy: CausalLMPolicy, greedy: bool = False) -> Policy:
        """Return what a language model does, sampling or not."""

    def from_network(self, read: Callable[[np.ndarray], np.ndarray]) -> Policy:
        """Return what a network does that maps observations to probabilities of actions."""


class Curve:
    """Measures a learner at every tenth of its budget of tokens, and watches the time.

    Args:
        measure: Measures a policy.
        budget: What the run may use.
        parts: Another number than ten.
        start: Tokens before which nothing is measured, but the end always is.
    """

    def __init__(
        self,
        measure: Callable[[Policy], dict[str, float]],
        budget: Budget,
        parts: int = 10,
        start: float = 0.0,
    ) -> None:
        self.measure, self.budget, self.parts = measure, budget, parts
        self.points: list[dict[str, float]] = []
        self._spent, self._since, self._next = 0.0, time.perf_counter(), start

    @property
    def seconds(self) -> float:
        """Seconds of learning so far."""
        return self._spent + time.perf_counter() - self._since

    def visit(self, tokens: int, policy: Policy, last: bool = False) -> bool:
        """Measure if it is time to; return whether there is time to go on."""
        seconds = self.seconds
        if tokens >= self._next or last:
            found = self.measure(policy)
            self.points.append({"tokens": tokens, "seconds": seconds, **found})
            part = self.budget.tokens / self.parts
            self._next = (tokens // part + 1) * part
            self._spent, self._since = seconds, time.perf_counter()
        return seconds < self.budget.seconds


Learner = Callable[[Any, Settings, int, Curve], None]
"""Learns a `Task` (a `SmallTask`, if by a table) with settings and a seed, calling the curve's
`visit` now and then."""


# ------------------------------------------------------------------------ nothing learned


def uniform(task: Task, settings: Settings, seed: int, curve: Curve) -> None:
    """Write words at random."""
    curve.visit(0, task.uniform(), last=True)


def untouched(
    task: Task, settings: Settings, seed: int, curve: Curve, greedy: bool = False
) -> None:
    """Leave the language model as it is; sample from it, or take its likeliest words."""
    curve.visit(0, task.from_lm(reference(task), greedy=greedy), last=True)


def reference(task: Task) -> CausalLMPolicy:
    """Return the task's language model as a policy."""
    return lm_policy(task, task.env(1), learning_rate=0.0)


def lm_policy(task: Task, env: VecEnv, learning_rate: float) -> CausalLMPolicy:
    """Return a policy around the task's language model, with an optimizer."""
    spaces = env.observation_space, env.action_space
    policy = CausalLMPolicy(*spaces, lambda _: learning_rate, **task.lm_kwargs)
    policy.allowed_tokens.copy_(th.from_numpy(np.array(env.get_attr("allowed_tokens")[0])))
    return policy


# -------------------------------------------------------------------------- Stable-Baselines3


class Visit(BaseCallback):
    """Lets a curve visit an SB3 algorithm at each step, and stop it."""

    def __init__(self, curve: Curve, policy: Policy) -> None:
        super().__init__()
        self.curve, self.policy_ = curve, policy

    def _on_step(self) -> bool:
        return self.curve.visit(self.num_timesteps, self.policy_)


def learn(model: BaseAlgorithm, policy: Policy, curve: Curve) -> None:
    """Let an SB3 algorithm learn for the curve's budget."""
    curve.visit(0, policy)
    model.learn(curve.budget.tokens, callback=Visit(curve, policy))
    curve.visit(model.num_timesteps, policy, last=True)


def classic(
    algorithm: type[BaseAlgorithm], task: Task, settings: Settings, seed: int, curve: Curve
) -> None:
    """Learn with a stock algorithm and its own network over embedded ids."""
    settings = prepared(settings)
    settings["policy_kwargs"] = task.network_kwargs | settings.get("policy_kwargs", {})
    name = "MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy"
    env = task.network_env(settings.pop("num_envs"))
    model = algorithm(name, env, gamma=1.0, seed=seed, device="cpu", **settings)
    learn(model, task.from_network(partial(READ[algorithm], model)), curve)


def with_lm(
    algorithm: type[BaseAlgorithm], task: Task, settings: Settings, seed: int, curve: Curve
) -> None:
    """Learn with the language model as the policy, in a stock algorithm or one of ours."""
    settings, changes = prepared(settings), {}
    if issubclass(algorithm, TokenRLOO) or settings.get("whole_episodes"):
        changes = {"group_size": settings.pop("group_size", 1), "autoreset": False}
        settings["n_steps"] = task.max_new_tokens
    if issubclass(algorithm, TokenPPO):
        settings["kl_coef"] = task.beta
    else:
        settings["gamma"] = 1.0
    env = task.env(settings.pop("num_envs"), **changes)
    settings["policy_kwargs"] = task.lm_kwargs | settings.get("policy_kwargs", {})
    model = algorithm("CausalLMPolicy", env, seed=seed, device="cpu", **settings)
    learn(model, task.from_lm(model.policy), curve)


def prepared(settings: Settings) -> Settings:
    """Copy settings, a learning rate that falls to 0 made a function."""
    settings = dict(settings)
    if settings.pop("linear_decay", False):
        settings["learning_rate"] = partial(linear, settings["learning_rate"])
    return settings


def linear(highest: float, progress: float) -> float:
    """Fall linearly with the remaining progress, 1 to 0; SB3's may go below."""
    return highest * max(progress, 0.0)


@th.no_grad()
def read_actor(model: BaseAlgorithm, obs: np.ndarray) -> np.ndarray:
    """Return what an actor does, sampling."""
    tensor, _ = model.policy.obs_to_tensor(obs)
    return model.policy.get_distribution(tensor).distribution.probs.double().numpy()


@th.no_grad()
def read_recurrent(model: BaseAlgorithm, obs: np.ndarray) -> np.ndarray:
    """Return what a recurrent actor does after the observations that led to each."""
    length = (obs != PAD).sum(axis=1)
    shape = (model.policy.lstm_actor.num_layers, len(obs), model.policy.lstm_actor.hidden_size)
    states = (th.zeros(shape), th.zeros(shape))
    found = np.zeros((len(obs), model.action_space.n))
    for t in range(1, int(length.max()) + 1):
        seen = np.where(np.arange(obs.shape[1]) < t, obs, PAD)
        tensor, _ = model.policy.obs_to_tensor(seen)
        starts = th.full((len(obs),), float(t == 1))
        distribution, states = model.policy.get_distribution(tensor, states, starts)
        now = length == t
        found[now] = distribution.distribution.probs.double().numpy()[now]
    return found


@th.no_grad()
def read_q_values(model: BaseAlgorithm, obs: np.ndarray) -> np.ndarray:
    """Return what a Q network does when it explores no more: the best action."""
    tensor, _ = model.policy.obs_to_tensor(obs)
    if isinstance(model, QRDQN):
        return one_hot(model.quantile_net(tensor).mean(dim=1).numpy())
    return one_hot(model.q_net(tensor).numpy())


READ = {
    A2C: read_actor,
    PPO: read_actor,
    TRPO: read_actor,
    MaskablePPO: read_actor,
    RecurrentPPO: read_recurrent,
    DQN: read_q_values,
    QRDQN: read_q_values,
}


# ---------------------------------------------------------------------------------- others


def expert_iteration(task: Task, settings: Settings, seed: int, curve: Curve) -> None:
    """Write, keep the best of each prompt, learn to write those; and round again.

    Settings: `num_envs` completions a round, `group_size` of each prompt, of which the share `keep`
    is learned from, for `n_epochs` passes with `learning_rate`.
    """
    th.manual_seed(seed)
    size = settings["group_size"]
    env = task.env(settings["num_envs"], group_size=size, autoreset=False)
    env.seed(seed)
    actor = lm_policy(task, env, settings["learning_rate"])
    policy, tokens = task.from_lm(actor), 0
    while curve.visit(tokens, policy) and tokens < curve.budget.tokens:
        obs, paid = env.reset(), np.zeros(env.num_envs)
        n_prompt = (obs != PAD).sum(axis=1)
        written: dict[int, np.ndarray] = {}
        while len(written) < env.num_envs:
            masks = np.stack(env.env_method("action_masks"))
            obs, rewards, dones, infos = env.step(actor.predict(obs, action_masks=masks)[0])
            paid += rewards
            for row in np.flatnonzero(dones).tolist():
                last = infos[row]["terminal_observation"]
                written[row] = last[last != PAD]
        tokens += sum(len(ids) for ids in written.values()) - int(n_prompt.sum())
        ranks = (-paid).reshape(-1, size).argsort(axis=1, kind="stable")
        ranks += size * np.arange(len(ranks))[:, None]
        best = ranks[:, : max(1, round(settings["keep"] * size))].reshape(-1)
        ids = th.from_numpy(pad_right([written[row] for row in best.tolist()]))
        place = th.arange(ids.shape[1] - 1)
        learned = (ids[:, 1:] != PAD) & (place >= th.from_numpy(n_prompt[best])[:, None] - 1)
        row, column = learned.nonzero(as_tuple=True)
        batch = TokenBatch(ids, row, column)
        for _ in range(settings["n_epochs"]):
            _, log_prob, _ = actor.evaluate_actions(batch, ids[row, column + 1])
            actor.optimizer.zero_grad()
            (-log_prob.mean()).backward()
            th.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            actor.optimizer.step()
    curve.visit(tokens, policy, last=True)


def tabular(
    task: SmallTask, settings: Settings, seed: int, curve: Curve, sarsa: bool = False
) -> None:
    """Learn a table of Q values: Q-learning (Watkins 1989) or SARSA (Rummery & Niranjan 1994).

    Settings: `num_envs`, `learning_rate`; ε falls from 1 to `final_epsilon` over the first
    `exploration_fraction` of the tokens.
    """
    generator = np.random.default_rng(seed)
    table: dict[bytes, np.ndarray] = {}
    env = task.env(settings["num_envs"])
    env.seed(seed)
    rate, n = settings["learning_rate"], task.vocab_size

    def values(obs: np.ndarray) -> np.ndarray:
        return np.stack([table.setdefault(row.tobytes(), np.zeros(n)) for row in obs])

    def act(obs: np.ndarray, tokens: int) -> np.ndarray:
        share = tokens / (settings["exploration_fraction"] * curve.budget.tokens)
        epsilon = max(settings["final_epsilon"], 1 - share)
        explore = generator.random(len(obs)) < epsilon
        best = values(obs) + 1e-9 * generator.random((len(obs), n))  # ties by lot
        return np.where(explore, generator.integers(0, n, len(obs)), best.argmax(axis=1))

    def policy(obs: np.ndarray) -> np.ndarray:
        return one_hot(np.stack([table.get(row.tobytes(), np.zeros(n)) for row in obs]))

    tokens, obs = 0, env.reset()
    actions = act(obs, tokens)
    while curve.visit(tokens, policy) and tokens < curve.budget.tokens:
        after, rewards, dones, _ = env.step(actions)
        next_actions = act(after, tokens)
        following = values(after)
        taken = following[np.arange(len(after)), next_actions]
        ahead = taken if sarsa else following.max(axis=1)
        targets = rewards + np.where(dones, 0.0, ahead)
        for row, action, target in zip(obs, actions, targets, strict=True):
            q = table[row.tobytes()]
            q[action] += rate * (target - q[action])
        tokens += len(obs)
        obs, actions = after, next_actions
    curve.visit(tokens, policy, last=True)


LEARNERS: dict[str, Learner] = {
    "random": uniform,
    "reference": untouched,
    "greedy": partial(untouched, greedy=True),
    "expert iteration": expert_iteration,
    "Q-learning": tabular,
    "SARSA": partial(tabular, sarsa=True),
    "DQN": partial(classic, DQN),
    "QR-DQN": partial(classic, QRDQN),
    "A2C": partial(classic, A2C),
    "PPO": partial(classic, PPO),
    "TRPO": partial(classic, TRPO),
    "MaskablePPO": partial(classic, MaskablePPO),
    "RecurrentPPO": partial(classic, RecurrentPPO),
    "A2C, LM": partial(with_lm, A2C),
    "PPO, LM": partial(with_lm, PPO),
    "TokenPPO": partial(with_lm, TokenPPO),
    "TokenA2C": partial(with_lm, TokenA2C),
    "TokenRLOO": partial(with_lm, TokenRLOO),
    "TokenGRPO": partial(with_lm, TokenGRPO),
}
"""By name; best-of-n, whose result is no policy, is measured by itself."""
