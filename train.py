"""The whole of rlhf-gym, composed: text environment, reward model, TokenPPO, one stage after another.

    python train.py                      the main job: all stages with their defaults
    python train.py STAGE --help         one stage alone: sft, reward, ppo, evaluate
    python train.py run --config F.yaml  the same with a file of settings

Every stage reads what the ones before left in the run folder and adds its own part; each input
can be given by hand instead. Nothing heavy is imported before the arguments are parsed.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import ArgumentParser
    from transformers import PreTrainedTokenizerBase

    from agents import CausalLMPolicy, TokenPPO
    from reward_models import LearnedRewardModel

# ------------------------------------------------------------------------------- settings


@dataclass
class Common:
    """What every stage is told."""

    run: Path | None = None
    """Run folder. `run` makes a new one, runs/<date>-<time>, if none is given."""
    seed: int = 0
    """Of every random choice; the same seed on the same machine gives the same run."""
    threads: int | None = None
    """CPU threads; None leaves the choice to torch."""
    device: str = "auto"
    """Where models compute: auto, cpu, cuda, mps."""
    overwrite: bool = False
    """Replace results of an earlier run of the stage."""


@dataclass
class SFT:
    """Supervised warm start: the language model learns the kind of text it is to write."""

    model: str = "smollm2"
    """The causal LM to start from: a folder, a hub id, or smollm2 (SmolLM2-135M, fetched once)."""
    texts: Path | None = None
    """Texts to learn from, one per line (.txt), or with a key or column `text` (.jsonl, .csv)."""
    max_tokens: int = 64
    """Longer texts are cut there."""
    epochs: float = 1.0
    """Passes over the texts."""
    max_steps: int | None = None
    """Updates at most."""
    batch_size: int = 32
    """Texts per update."""
    learning_rate: float = 1e-4
    """Highest learning rate; it rises over the first tenth and falls linearly to 0."""


@dataclass
class Reward:
    """Reward model and judge, each learned from its own part of the human feedback."""

    model: str = "minilm"
    """What both start from: a folder, a hub id, or minilm (MiniLM-L6, fetched once)."""
    feedback: Path | None = None
    """Feedback to learn the reward from (.jsonl: ratings, comparisons, labels)."""
    judge_feedback: Path | None = None
    """Feedback for the judge, which is never a reward. Without it, and with own `feedback`, there
    is no judge."""
    held_out: float = 0.1
    """Share of the texts that the report is measured on."""
    epochs: float = 3.0
    """Passes over the feedback."""
    batch_size: int = 32
    """Records per update."""
    learning_rate: float = 1e-4
    """Highest learning rate."""


@dataclass
class PPO:
    """Token-level PPO against the reward model, held to the warm start by a KL penalty."""

    policy: str | None = None
    """The LM to train, which is also the reference: a folder or hub id. None: the run's sft/."""
    reward_model: str | None = None
    """A folder or hub id of a sequence classifier with one label. None: the run's."""
    prompts: Path | None = None
    """Training prompts (.txt, .jsonl, .csv). None: the run's."""
    total_timesteps: int = 40_000
    """Tokens to generate."""
    n_envs: int = 32
    """Rows that write side by side."""
    n_steps: int = 32
    """Tokens per row between updates."""
    batch_size: int = 512
    """Tokens per minibatch."""
    n_epochs: int = 2
    """Passes over each rollout."""
    learning_rate: float = 3e-5
    """At the start; it falls linearly to 0."""
    trainable_layers: int | None = None
    """How many of the last transformer layers learn; None: all of the model."""
    max_new_tokens: int = 24
    """Longest completion, tokens."""
    temperature: float = 1.0
    """Divides the logits, in training and evaluation."""
    kl_coef: float = 0.1
    """Weight of the KL penalty at the start, score units per nat."""
    target_ref_kl: float | None = None
    """Adapt the weight so that the KL comes to this, nats per completion."""
    kl_horizon: float = 1000.0
    """Episodes over which an adaptive weight moves."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of a completion that ran out of tokens."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    save_every: int | None = None
    """Rollouts between saves of the policy; it is always saved at the end."""


@dataclass
class Evaluate:
    """Held-out prompts, before and after: scores, KL, text statistics, samples, a report."""

    prompts: Path | None = None
    """Test prompts. None: the run's."""
    n_prompts: int = 200
    """How many of them are used."""
    policy: str | None = None
    """The trained policy. None: the run's policy/."""
    reference: str | None = None
    """What it is compared with, and the KL is measured to. None: the run's sft/."""
    reward_model: str | None = None
    """None: the run's reward_model/."""
    judge: str | None = None
    """None: the run's judge/, if there is one."""
    max_new_tokens: int = 24
    """Longest completion, tokens."""
    temperature: float = 1.0
    """Divides the logits."""
    best_of: int = 4
    """Samples of the reference per prompt for the best-of-n baseline; 1 leaves it out."""
    n_samples: int = 10
    """Prompts shown side by side."""


@dataclass
class Run:
    """The main job: sft, reward, ppo, evaluate."""

    sft: SFT = field(default_factory=SFT)
    reward: Reward = field(default_factory=Reward)
    ppo: PPO = field(default_factory=PPO)
    evaluate: Evaluate = field(default_factory=Evaluate)


# ------------------------------------------------------------------------------ the stages


def run(common: Common, settings: Run) -> None:
    """Do all stages, and say at the end what improved and where to look."""
    start = time.time()
    for stage in ("sft", "reward", "ppo", "evaluate"):
        STAGES[stage].function(common, getattr(settings, stage))
    say(f"All of it took {time.time() - start:.0f} s.")


def sft(common: Common, settings: SFT) -> None:
    """Warm-start a causal LM on texts; leaves the folder `sft` in the run folder."""
    from agents.language_model import load_lm
    from agents.sft import warm_start
    from text_env.vocabulary import load_tokenizer

    with stage(common, "sft", makes=["sft"]) as (facts, path):
        model = named_model(settings.model)
        texts = read_texts(settings.texts or data(common) / "language.jsonl")
        tokenizer, lm = load_tokenizer(model), load_lm(model).to(device(common))
        facts["report"] = warm_start(
            lm,
            tokenizer,
            texts,
            max_tokens=settings.max_tokens,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            seed=common.seed,
            progress_bar=True,
        )
        save_lm(lm, tokenizer, path / "sft")
        report = facts["report"]
        say(
            f"held-out loss {report.loss_before:.2f} -> {report.loss_after:.2f} nats per token, "
            f"{report.steps} updates on {report.n_texts} texts"
        )


def reward(common: Common, settings: Reward) -> None:
    """Learn reward model and judge from feedback; leaves `reward_model` and `judge`."""
    from reward_models import LearnedRewardModel, read_feedback

    if settings.feedback is None:
        sources = {
            "reward_model": data(common) / "reward_feedback.jsonl",
            "judge": data(common) / "judge_feedback.jsonl",
        }
    else:
        sources = {"reward_model": settings.feedback}
    if settings.judge_feedback is not None:
        sources["judge"] = settings.judge_feedback
    with stage(common, "reward", makes=["reward_model", "judge"]) as (facts, path):
        for number, (name, source) in enumerate(sources.items()):
            records = read_feedback(source)
            model = LearnedRewardModel.from_pretrained(
                named_model(settings.model), device(common), seed=common.seed + number
            )
            report = model.fit(
                records,
                settings.held_out,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                seed=common.seed + number,
                progress_bar=True,
            )
            texts = [text for record in records for text in record.texts]
            model.normalize([""] * len(texts), texts, f"the {len(texts)} texts of {source.name}")
            model.save(path / name, overwrite=common.overwrite)
            facts[name] = report
            say(f"{name}: {agreement(report)}")
        if settings.feedback is None:
            facts["human"] = human_agreement(data(common))


def ppo(common: Common, settings: PPO) -> None:
    """Train the policy against the reward model; leaves `policy`, metrics and samples."""
    from stable_baselines3.common.logger import (
        JSONOutputFormat,
        Logger,
        TensorBoardOutputFormat,
    )

    from agents import SampleTextCallback, SavePretrainedCallback, TokenPPO
    from reward_models import LearnedRewardModel
    from text_env import TextVecEnv
    from text_env.vocabulary import load_tokenizer

    makes = ["policy", "metrics.jsonl", "samples.jsonl", "tensorboard"]
    with stage(common, "ppo", makes) as (facts, path):
        policy = settings.policy or str(needed(path / "sft", "sft"))
        reward_model = settings.reward_model or needed(path / "reward_model", "reward")
        tokenizer = load_tokenizer(policy)
        env = TextVecEnv(
            num_envs=settings.n_envs,
            tokenizer=tokenizer,
            prompts=settings.prompts or data(common) / "prompts.jsonl",
            reward_fn=LearnedRewardModel.load(reward_model, device(common)),
            max_new_tokens=settings.max_new_tokens,
            missing_eos_penalty=settings.missing_eos_penalty,
        )
        model = TokenPPO(
            "CausalLMPolicy",
            env,
            learning_rate=lambda progress: settings.learning_rate * progress,
            n_steps=settings.n_steps,
            batch_size=settings.batch_size,
            n_epochs=settings.n_epochs,
            vf_coef=settings.vf_coef,
            policy_kwargs={
                "lm": policy,
                "temperature": settings.temperature,
                "trainable_layers": settings.trainable_layers,
            },
            kl_coef=settings.kl_coef,
            target_ref_kl=settings.target_ref_kl,
            kl_horizon=settings.kl_horizon,
            seed=common.seed,
            device=device(common),
        )
        metrics = JSONOutputFormat(str(path / "metrics.jsonl"))
        board = TensorBoardOutputFormat(str(path / "tensorboard"))
        model.set_logger(Logger(str(path), [metrics, board]))
        callbacks = [
            SampleTextCallback(path / "samples.jsonl"),
            SavePretrainedCallback(path / "policy", tokenizer, settings.save_every),
        ]
        if (path / "judge").exists():
            callbacks.append(judge_callback(LearnedRewardModel.load(path / "judge")))
        model.learn(settings.total_timesteps, callback=callbacks, progress_bar=True)
        facts["tokens"] = model.num_timesteps


def evaluate(common: Common, settings: Evaluate) -> None:
    """Compare policy and warm start on test prompts; leaves `report.md` and its pictures."""
    from reward_models import LearnedRewardModel, LexiconSentiment
    from reward_models.assets import sentiment_lexicon
    from text_env.prompts import load_prompts

    makes = ["evaluation.json", "report.md", "curves.png"]
    with stage(common, "evaluate", makes) as (facts, path):
        reference = settings.reference or str(needed(path / "sft", "sft"))
        policy = settings.policy or str(needed(path / "policy", "ppo"))
        reward_path = settings.reward_model or needed(path / "reward_model", "reward")
        judge_path = settings.judge or (path / "judge" if (path / "judge").exists() else None)
        prompts = load_prompts(settings.prompts or data(common) / "test_prompts.jsonl")
        scorers = {"score": LearnedRewardModel.load(reward_path, device(common))}
        if judge_path is not None:
            scorers["judge"] = LearnedRewardModel.load(judge_path, device(common)).human_scale
        scorers["lexicon"] = LexiconSentiment(sentiment_lexicon())
        writers = written(common, settings, reference, policy, prompts[: settings.n_prompts])
        facts["writers"] = {
            name: statistics(completions, scorers) for name, completions in writers.items()
        }
