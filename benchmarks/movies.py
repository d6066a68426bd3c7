"""Movie sentences as a task of the baseline benchmark: a real LM, a learned reward, a judge.

Algorithms with a small network choose among the likeliest next tokens of the warm start and see its
hidden state; the others have the warm start itself as their policy. What is measured is what they
write on test prompts. Settings are chosen on others of these than the ones reported on.
"""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv
from transformers import PreTrainedModel

import train
from agents import CausalLMPolicy, LMReader, VecLMFeatures, VecTopKActions
from agents.language_model import Reference, load_named
from agents.writing import write_episodes
from benchmarks.algorithms import LEARNERS, Budget, Curve, Settings, reference
from benchmarks.small_runs import Point
from reward_models import LearnedRewardModel, LexiconSentiment, distinct_n
from reward_models.assets import sentiment_lexicon
from reward_models.conversations import answers_of
from stages.process import dtype_of
from stages.writing import tokens_of
from text_env import TextVecEnv
from text_env.prompts import load_prompts
from text_env.vocabulary import load_tokenizer

Episodes = list[dict[str, Any]]
Writer = Callable[[], Episodes]
"""What this task makes of a policy: continues each test prompt once. Episodes are final infos,
with `ref_kl`, the exact KL to the warm start over each episode's states, in nats."""
Choose = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Maps observations (n, L), the tokens allowed (n, V) and log π_ref (n, V) to probabilities of the
next token (n, V)."""

TEMPERATURE = 0.7
"""Divides the logits of all that write, the reference included."""


def prepare(folder: Path) -> str:
    """Make the run folder that the task stands on, if it is not there: `sft` and `reward`.

    Returns:
        A fingerprint of its models; results on others are not comparable.
    """
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    for stage, left in (("sft", ("sft",)), ("reward", ("reward_model", "judge"))):
        if not all((folder / name).exists() for name in left):
            line = [
                sys.executable,
                train.__file__,
                stage,
                "--run",
                str(folder),
                "--overwrite",
                "true",
            ]
            subprocess.run(line, env=environment, check=True)
    digest = hashlib.sha256()
    for name in ("sft", "reward_model", "judge"):
        digest.update((folder / name / "model.safetensors").read_bytes())
    return digest.hexdigest()[:16]


class Movies:
    """The main job's task: continue a sentence about a film so that people would rate it well.

    Args:
        folder: A run folder with sft, reward_model, judge and data.
        n_prompts: How many test prompts the measures are taken on.
        tuning: Whether these are the last ones, which settings are chosen by, not the first.
        ranks: Actions of the small networks: so many of the likeliest tokens.
        beta: Weight of the KL penalty, score units per nat.
    """

    def __init__(
        self,
        folder: Path,
        n_prompts: int = 64,
        tuning: bool = False,
        ranks: int = 16,
        beta: float = 0.02,
    ) -> None:
        self.folder, self.ranks, self.beta, self.max_new_tokens = folder, ranks, beta, 32
        self.lm = str(folder / "sft")
        self.dtype = dtype_of(train.Common(device="cpu"))
        self.rewarder = LearnedRewardModel.load(folder / "reward_model", "cpu")
        tokenizer = load_tokenizer(self.lm)
        prompts, tests = (
            load_prompts(folder / "data" / f"{name}.jsonl") for name in ("prompts", "test_prompts")
        )
        self.prompts, self.seed = prompts, int(tuning)
        self.test_prompts = tests[-n_prompts:] if tuning else tests[:n_prompts]
        texts = [prompt["prompt"] for prompt in (*prompts, *self.test_prompts)]
        self._texts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "reward_fn": self.rewarder,
            "max_prompt_tokens": max(map(len, tokenizer(texts)["input_ids"])),
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": 6,
            "missing_eos_penalty": 1.0,
            "allowed_token_ids": tokens_of(folder / "data" / "language.jsonl", tokenizer),
        }

    # ------------------------------------------------------------------ what is learned from

    def env(self, num_envs: int, **changes: Any) -> VecEnv:
        """Return the environment of training prompts."""
        return TextVecEnv(num_envs, prompts=self.prompts, **self._texts, **changes)

    def network_env(self, num_envs: int) -> VecEnv:
        """Return the environment as ranks and hidden states."""
        env, reader = self.env(num_envs), self.reader()
        return VecLMFeatures(VecTopKActions(env, reader, self.ranks), reader)

    def reader(self) -> LMReader:
        """Return a reader of the warm start."""
        n_tokens = len(self._texts["tokenizer"])
        return LMReader(
            self._warm_start, n_tokens, "cpu", temperature=TEMPERATURE, dtype=self.dtype
        )

    @cached_property
    def _warm_start(self) -> PreTrainedModel:
        """What readers read with: nobody changes it."""
        return load_named(self.lm)

    @property
    def network_kwargs(self) -> dict[str, Any]:
        """What a small network is told: nothing; hidden states are features enough."""
        return {}

    @property
    def lm_kwargs(self) -> dict[str, Any]:
        """What a policy that is a language model is told."""
        return {
            "lm": self.lm,
            "temperature": TEMPERATURE,
            "trainable_layers": 6,
            "dtype": self.dtype,
        }

    # ------------------------------------------------------------------------ what is written

    def test_env(self, copies: int = 1) -> TextVecEnv:
        """Return the environment of test prompts, each so often, rows that end held."""
        num_envs = copies * len(self.test_prompts)
        told = self._texts | {"prompts": self.test_prompts, "shuffle": False}
        return TextVecEnv(num_envs, autoreset=False, **told)

    @cached_property
    def _own(self) -> tuple[TextVecEnv, LMReader]:
        """What `write` needs."""
        return self.test_env(), self.reader()

    def write(self, choose: Choose) -> Episodes:
        """Continue each test prompt by what is chosen, given what the reference would write."""
        env, reader = self._own
        env.seed(self.seed)
        generator, obs = np.random.default_rng(self.seed), env.reset()
        ref_kl, ended = np.zeros(env.num_envs), dict[int, dict[str, Any]]()
        while len(ended) < env.num_envs:
            masks = env.action_masks()
            log_ref = reader.log_probs(obs, masks)
            p = choose(obs, masks, log_ref)
            live = np.array([row not in ended for row in range(env.num_envs)])
            with np.errstate(divide="ignore", invalid="ignore"):
                per_token = np.where(p > 0, p * (np.log(p) - log_ref), 0.0)
            ref_kl += np.where(live, per_token.sum(axis=1), 0.0)
            cumulative = p.cumsum(axis=1)
            draws = generator.random((len(p), 1)) * cumulative[:, -1:]
            obs, _, dones, infos = env.step((cumulative <= draws).sum(axis=1))
            ended |= {row: infos[row] for row in np.flatnonzero(dones).tolist()}
        return [{**ended[row], "ref_kl": float(ref_kl[row])} for row in range(env.num_envs)]

    def uniform(self) -> Writer:
        """Write any tokens that are allowed."""
        return lambda: self.write(lambda obs, masks, log_ref: normalised(masks))

    def from_network(self, read: Callable[[np.ndarray], np.ndarray]) -> Writer:
        """Write what a network does, which maps hidden states to probabilities of ranks."""

        def choose(obs: np.ndarray, masks: np.ndarray, log_ref: np.ndarray) -> np.ndarray:
            reader, p = self._own[1], np.zeros(log_ref.shape)
            offered = reader.likeliest(obs, self.ranks, masks)
            np.put_along_axis(p, offered, read(reader.read(obs)), axis=1)
            return normalised(p)

        return lambda: self.write(choose)

    def from_lm(self, policy: CausalLMPolicy, greedy: bool = False) -> Writer:
        """Write what a language model does, sampling or not."""
        frozen = Reference(load_named(self.lm), policy)

        def write() -> Episodes:
            env, _ = self._own
            env.seed(self.seed)
            with th.random.fork_rng(devices=[]):  # learning goes on as if nobody looked
                th.manual_seed(self.seed)
                return write_episodes(policy, env, frozen, deterministic=greedy)

        return write

    # ----------------------------------------------------------------------- what is measured

    @cached_property
    def scorers(self) -> dict[str, Callable[[Sequence[str], Sequence[str]], np.ndarray]]:
        """What scores a completion: the reward model, the judge, the lexicon."""
        judge = LearnedRewardModel.load(self.folder / "judge", "cpu")
        lexicon = LexiconSentiment(sentiment_lexicon())
        return {
            "score": self.rewarder.score,
            "judge": judge.human_scale,
            "lexicon": lambda p, c: np.asarray(lexicon(prompts=p, completions=c)),
        }

    def measure(self, write: Writer) -> Point:
        """Measure what is written on the test prompts: means over these.

        `score` is the reward model's, `reward` what is paid, without the KL penalty, `value` with
        it, and `judge_error` the judge's standard error, which the prompts leave.
        """
        episodes = write()
        prompts, texts, *_ = answers_of(episodes)
        scores = {name: f(prompts, texts) for name, f in self.scorers.items()}
        found = {name: float(values.mean()) for name, values in scores.items()}
        found["judge_error"] = float(scores["judge"].std(ddof=1) / math.sqrt(len(texts)))
        found["ref_kl"] = float(np.mean([e["ref_kl"] for e in episodes]))
        found["reward"] = found["score"] - float(np.mean([missing(e) for e in episodes]))
        found["value"] = found["reward"] - self.beta * found["ref_kl"]
        return found | {"distinct_2": distinct_n(texts)}

    def best_of(self, n: int, copies: int = 4) -> list[Point]:
        """Measure the best of 1, 2, 4 … n samples of the reference, by what is paid for them.

        Each is the expectation over all subsets of the n samples of a prompt. The KL is at most
        log n − (n − 1)/n, and about that where no completion is likely by itself (Beirami et al.
        2024).
        """
        env, policy = self.test_env(copies), reference(self)
        env.seed(self.seed)
        rounds = math.ceil(n / copies)
        episodes = [episode for _ in range(rounds) for episode in write_episodes(policy, env)]
        prompts, texts, *_ = answers_of(episodes)
        shape = (rounds * copies, len(self.test_prompts))
        scores = {name: f(prompts, texts).reshape(shape)[:n] for name, f in self.scorers.items()}
        penalty = np.array([missing(e) for e in episodes]).reshape(shape)[:n]
        scores["reward"] = scores["score"] - penalty
        order = scores["reward"].argsort(axis=0, kind="stable")
        points = []
        for m in sorted({2**i for i in range(int(math.log2(n)) + 1)} | {n}):
            weights = chance_to_be_best(n, m)[:, None]
            found = {
                name: float((weights * np.take_along_axis(s, order, axis=0)).sum(axis=0).mean())
                for name, s in scores.items()
            }
            ref_kl = math.log(m) - (m - 1) / m
            value = found["reward"] - self.beta * ref_kl
            points.append({"n": m, **found, "ref_kl": ref_kl, "value": value})
        return points


def missing(episode: dict[str, Any]) -> float:
    """Return what was subtracted from an episode's score because it had no end."""
    return float(episode["finish_reason"] == "length")


def normalised(p: np.ndarray) -> np.ndarray:
    """Divide each row by its sum; (n, V) float64."""
    return p / p.sum(axis=1, keepdims=True, dtype=np.float64)


def chance_to_be_best(n: int, m: int) -> np.ndarray:
    """Return how likely the i-th lowest of n is the highest of m drawn of them, (n,).

    C(i − 1, m − 1) / C(n, m): the m − 1 others are among the i − 1 that are lower.
    """
    return np.array([math.comb(i, m - 1) / math.comb(n, m) for i in range(n)])


def run_movies(
    folder: Path,
    algorithm: str,
    settings: Settings,
    seed: int,
    budget: Budget,
    tuning: bool = False,
) -> list[Point]:
    """Do a run on movie sentences; return what was measured as it went on, or at its end.

    Args:
        folder: As for `Movies`.
        algorithm: Its name, after which ", β = …" may follow.
        settings: Its own; in `task`, arguments of `Movies`; in `measurements`, how often it is
            measured as it goes on, not counting the start.
        seed: Of everything random in learning.
        budget: What it may use.
        tuning: As for `Movies`.
    """
    settings = dict(settings)
    measurements = settings.pop("measurements", None)
    told = {k: v for k, v in settings.pop("task", {}).items() if k != "fingerprint"}
    task = Movies(folder, tuning=tuning, **told)
    set_random_seed(seed)
    if algorithm.startswith("best of "):
        found = task.best_of(int(algorithm.removeprefix("best of ")))
        return [{"tokens": 0, "seconds": 0.0, **point} for point in found]
    if measurements is None:
        curve = Curve(task.measure, budget, start=math.inf)
    else:
        curve = Curve(task.measure, budget, measurements)
    LEARNERS[algorithm.partition(", β")[0]](task, settings, seed, curve)
    return curve.points
