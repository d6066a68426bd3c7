"""Tasks small enough for every algorithm, and for their optima to be known.

All tokens of their vocabularies may be chosen at any time, so that an algorithm that knows no
masks is at no disadvantage. The reference is a small GPT-2 with random weights.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from agents import CausalLMPolicy, TokenEmbeddingExtractor
from benchmarks.workloads import word_tokenizer
from text_env import TextVecEnv

Policy = Callable[[np.ndarray], np.ndarray]
"""Maps observations (n, L) to probabilities of the next token (n, V)."""


@dataclass(frozen=True)
class SmallTask:
    """A text generation task over a small vocabulary of words w0, w1, ...

    A policy is what maps observations (n, L) to probabilities of the next token (n, V).

    Args:
        name: What it is called.
        vocab_size: V.
        prompts: Words that a completion may be asked to follow, one token each.
        max_new_tokens: Tokens of the longest completion.
        score: Scores a completion's tokens, without EOS, given the prompt's token.
        beta: Weight of the KL penalty, score units per nat; 0 where the score is all that counts.
        ends: Whether the last word of the vocabulary is EOS; else all completions are as long.
        dense: Whether each token is paid for what it adds to score × tokens, rather than all at
            the end; the sum is the score, if completions are as long as may be.
        width: Width of the reference's layers.
    """

    name: str
    vocab_size: int
    prompts: tuple[int, ...]
    max_new_tokens: int
    score: Callable[[int, Sequence[int]], float]
    beta: float = 0.0
    ends: bool = False
    dense: bool = False
    width: int = 64

    @property
    def eos(self) -> int:
        """The end token, or -1, which no token is."""
        return self.vocab_size - 1 if self.ends else -1

    def lm(self) -> PreTrainedModel:
        """Return the reference, the same one each time."""
        state = th.random.get_rng_state()
        th.manual_seed(0)
        config = GPT2Config(
            vocab_size=self.vocab_size,
            n_embd=self.width,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        lm = GPT2LMHeadModel(config).eval()
        th.random.set_rng_state(state)
        return lm

    def env(self, num_envs: int, **changes: Any) -> VecEnv:
        """Return the environment."""
        env = TextVecEnv(
            num_envs=num_envs,
            tokenizer=word_tokenizer(self.vocab_size),
            prompts=[f"w{i}" for i in self.prompts],
            reward_fn=self.reward,
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=[self.eos] if self.ends else [],
            **changes,
        )
        return DenselyPaid(env, self) if self.dense else env

    def reward(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        """Score texts: the task as a reward function."""
        return [
            self.score(word_ids(prompt)[0], word_ids(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def network_env(self, num_envs: int) -> VecEnv:
        """Return the environment for algorithms with a small network."""
        return self.env(num_envs)

    @property
    def network_kwargs(self) -> dict[str, Any]:
        """What such a network is told: to embed ids."""
        return {"features_extractor_class": TokenEmbeddingExtractor}

    @property
    def lm_kwargs(self) -> dict[str, Any]:
        """What a policy that is a language model is told."""
        return {"lm": self.lm()}

    def uniform(self) -> Policy:
        """Return a writer of random words."""
        return lambda obs: np.full((len(obs), self.vocab_size), 1 / self.vocab_size)

    def from_lm(self, policy: CausalLMPolicy, greedy: bool = False) -> Policy:
        """Return what a language model does, sampling or not."""

        @th.no_grad()
        def probabilities(obs: np.ndarray) -> np.ndarray:
            hidden = policy.decoder.once(th.from_numpy(obs))  # what is cached stays so
            found = policy.decoding_head(policy.decoder.lm).logits(hidden).softmax(dim=1)
            return one_hot(found.numpy()) if greedy else found.double().numpy()

        return probabilities

    def from_network(self, read: Policy) -> Policy:
        """Return what a network does: it reads the observations themselves."""
        return read

    def write(self, policy: Policy, n: int, seed: int) -> np.ndarray:
        """Let a policy write n completions, prompts in turn: ids (n, L), padded with -1."""
        generator = np.random.default_rng(seed)
        ids = np.full((n, 1 + self.max_new_tokens), -1)
        ids[:, 0] = np.resize(self.prompts, n)
        going_on = np.ones(n, dtype=bool)
        for t in range(1, 1 + self.max_new_tokens):
            rows = np.flatnonzero(going_on)
            if len(rows) == 0:
                break
            cumulative = policy(ids[rows]).cumsum(axis=1)
            draws = generator.random((len(rows), 1)) * cumulative[:, -1:]
            ids[rows, t] = (cumulative <= draws).sum(axis=1)
            going_on[rows] = ids[rows, t] != self.eos
        return ids

    def scores(self, ids: np.ndarray) -> np.ndarray:
        """Score written ids (n, L) to (n,)."""
        over = (-1, self.eos)
        return np.array(
            [self.score(int(p), [int(i) for i in row if i not in over]) for p, *row in ids]
        )

    def mean_score(self, policy: Policy, n: int = 512, seed: int = 0) -> float:
        """Return the mean score of n completions that a policy writes."""
        return float(self.scores(self.write(policy, n, seed)).mean())


def one_hot(preferences: np.ndarray) -> np.ndarray:
    """Give all probability to each row's highest preference, (n, V) to (n, V)."""
    return np.eye(preferences.shape[1])[preferences.argmax(axis=1)]


class DenselyPaid(VecEnvWrapper):
    """Pays each token for what it adds to the score."""

    def __init__(self, venv: VecEnv, task: SmallTask) -> None:
        super().__init__(venv)
        self.task = task

    def reset(self) -> np.ndarray:
        """Begin an episode in every row."""
        self._ids = self.venv.reset()
        return self._ids

    def step_async(self, actions: np.ndarray) -> None:
        """Append a token to each row, and see what it is worth."""
        rewards = []
        for (prompt, *words), action in zip(self._ids.tolist(), actions.tolist(), strict=True):
            before = [word for word in words if word != -1]
            after = [*before, action]
            worth = self.task.score(prompt, after) * len(after)
            worth -= self.task.score(prompt, before) * len(before) if before else 0.0
            rewards.append(worth / self.task.max_new_tokens if prompt != -1 else 0.0)
        self._rewards = np.array(rewards, dtype=np.float32)
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Return what the wrapped environment does, with these rewards."""
        self._ids, _, dones, infos = self.venv.step_wait()
        return self._ids, self._rewards, dones, infos


def word_ids(text: str) -> list[int]:
    """Bring a text of words back to ids."""
    return [int(word[1:]) for word in text.split()]


class Enumeration:
    """Every completion of a small task with one prompt: exact expectations.

    Attributes:
        completions: Tokens of each of the N completions, EOS included.
        scores: (N,).
        log_ref: (N,), log-probability under the reference, nats.
        optimum: max over π of E_π[score] − β·KL(π‖π_ref) = β·log E_ref[exp(score / β)].
    """

    def __init__(self, task: SmallTask, reference: Policy) -> None:
        self.task = task
        words = range(task.vocab_size - 1)
        ended = [
            (*word, task.eos)
            for n in range(task.max_new_tokens)
            for word in itertools.product(words, repeat=n)
        ]
        self.completions = ended + list(itertools.product(words, repeat=task.max_new_tokens))
        self.scores = np.array(
            [task.score(task.prompts[0], [i for i in c if i != task.eos]) for c in self.completions]
        )
        self.log_ref = self.log_probs(reference)
        self.reference = self.value(self.log_ref)
        exponent = self.log_ref + self.scores / task.beta
        self.optimum = float(task.beta * np.logaddexp.reduce(exponent))

    @cached_property
    def _states(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All states (S, L), and each completion's states and tokens, both (N, T), -1 padded."""
        number: dict[tuple[int, ...], int] = {}
        width = self.task.max_new_tokens
        state = np.full((len(self.completions), width), -1)
        token = np.full((len(self.completions), width), -1)
        for i, completion in enumerate(self.completions):
            for t in range(len(completion)):
                state[i, t] = number.setdefault(completion[:t], len(number))
                token[i, t] = completion[t]
        observations = np.full((len(number), 1 + width), -1)
        observations[:, 0] = self.task.prompts[0]
        for prefix, row in number.items():
            observations[row, 1 : 1 + len(prefix)] = prefix
        return observations, state, token

    def log_probs(self, policy: Policy) -> np.ndarray:
        """Return the log-probability (nats) of each completion under a policy, (N,)."""
        observations, state, token = self._states
        with np.errstate(divide="ignore"):
            log_p = np.log(policy(observations))
        return np.where(state >= 0, log_p[state, token], 0.0).sum(axis=1)

    def best_of(self, n: int) -> np.ndarray:
        """Return the log-probability of each completion where the best of n samples is taken.

        Of equal scores, one is as likely as the reference has it among them.
        """
        p = np.exp(self.log_ref)
        _, level = np.unique(self.scores, return_inverse=True)
        share = np.bincount(level, weights=p)
        upto = share.cumsum() / share.sum()
        best = upto**n - np.concatenate(([0.0], upto[:-1])) ** n
        with np.errstate(divide="ignore"):
            return self.log_ref + np.log((best / share)[level])

    def mean_score(self, log_p: np.ndarray) -> float:
        """Return E[score]."""
        return float(np.exp(log_p) @ self.scores)

    def kl(self, log_p: np.ndarray) -> float:
        """Return KL(π‖π_ref) of completions, nats."""
        possible = np.isfinite(log_p)
        log_p, log_ref = log_p[possible], self.log_ref[possible]
        return float(np.exp(log_p) @ (log_p - log_ref))

    def value(self, log_p: np.ndarray) -> float:
        """Return E[score] − β·KL."""
        return self.mean_score(log_p) - self.task.beta * self.kl(log_p)

    def gain(self, log_p: np.ndarray) -> float:
        """Return the share of the optimal gain over the reference, at most 1."""
        return (self.value(log_p) - self.reference) / (self.optimum - self.reference)


def liked_letters(prompt: int, letters: Sequence[int]) -> float:
    """Score words of 0 to 5: a 2 is worth 1, a 3 at the end 1, a 0 −0.5, one twice in a row −1."""
    twice = sum(x == y for x, y in itertools.pairwise(letters))
    ends_well = len(letters) > 0 and letters[-1] == 3
    return letters.count(2) + ends_well - 0.5 * letters.count(0) - twice


def share_in_class(prompt: int, words: Sequence[int]) -> float:
    """Score the share of words in the class (id modulo 4) that the prompt names; random: 1/4."""
    return float(np.mean([word % 4 == prompt % 4 for word in words]))


def share_in_order(prompt: int, words: Sequence[int]) -> float:
    """Score the share of words whose class follows the class of the word before; random: 1/4."""
    pairs = itertools.pairwise((prompt, *words))
    return float(np.mean([after % 4 == (before + 1) % 4 for before, after in pairs]))


LETTERS = SmallTask("letters", 7, (0,), 4, liked_letters, beta=0.3, ends=True, width=32)
"""Enumerable: 6 letters and EOS, at most 4 tokens: 1,555 completions."""
CLASSES = SmallTask("classes", 256, (0, 1, 2, 3), 8, share_in_class)
"""Vocabulary constraint, paid at the end: the prompt says which quarter of 256 words is wanted."""
PATTERN = SmallTask("pattern", 256, (0, 1, 2, 3), 16, share_in_order, dense=True)
"""Target pattern, paid at each token: the word before says which quarter is wanted."""
SMALL_TASKS = {task.name: task for task in (LETTERS, CLASSES, PATTERN)}
