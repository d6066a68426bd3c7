"""The whole of rlhf-gym, composed: one stage after another, from texts to a better policy.

    python train.py                      the main job: all stages with their defaults
    python train.py STAGE --help         one stage alone: sft, reward, ppo, evaluate
    python train.py run --config F.yaml  the same with a file of settings
    python train.py check --model M --reward R   in a minute: would a run with these work?
    python train.py tune --run RUN       better settings of PPO; chat RUN: talk with its policy
    python train.py annotate, feedback, compare, loop   with people, or simulated ones: --help
    torchrun --nproc-per-node 2 -- train.py …   the same, PPO on several processes

Every stage reads what the ones before left in the run folder and adds its own part; each input
can be given by hand instead. Nothing heavy is imported before the arguments are parsed.
"""

import ctypes
import gc
import getpass
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from configs.settings import (
    PPO,
    SFT,
    Annotate,
    Chat,
    Check,
    Common,
    Compare,
    Evaluate,
    Export,
    Forget,
    Import,
    Loop,
    Reward,
    Run,
    SignIn,
    Simulated,
    Terms,
    Tune,
    Worth,
    Writing,
)

if TYPE_CHECKING:
    import numpy as np
    import torch as th
    from jsonargparse import ArgumentParser, Namespace
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import KVWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agents import CausalLMPolicy, TokenPPO
    from agents.checks import Verdict
    from agents.tuning import Objective, TrialCallback
    from reward_models import LearnedRewardModel
    from reward_models.ensemble import EnsembleReport
    from reward_models.feedback import Feedback, FeedbackStore, Task
    from reward_models.feedback.tasks import Kind
    from reward_models.learned import FitReport
    from text_env import TextVecEnv
    from text_env.task import TextTask

Episodes = list[dict[str, Any]]

# ------------------------------------------------------------------------------ the stages


def run(common: Common, settings: Run) -> None:
    """Do all stages: warm start, reward model and judge, PPO, evaluation."""
    start = time.time()
    require_files(settings)  # now, not when the stage that reads them begins
    say(f"Run folder: {common.run}")
    on_first_process(sft, common, settings.sft)
    given = settings.ppo.prompts is None or settings.reward.feedback is not None
    if given or "learned" in by_name(settings.ppo.reward):  # not for metrics of a task of one's own
        on_first_process(reward, common, settings.reward)
    ppo(common, settings.ppo)
    on_first_process(evaluate, common, settings.evaluate)
    say(f"The whole run took {time.time() - start:.0f} s.")


def sft(common: Common, settings: SFT) -> None:
    """Warm-start a language model on texts; leaves the folder sft."""
    from agents.language_model import build_lm, load_config, load_named
    from agents.saving import replaced_folder
    from agents.sft import warm_start
    from text_env.own_tokenizer import learn_tokenizer
    from text_env.prompts import load_examples, whole_text
    from text_env.vocabulary import load_tokenizer

    with stage(common, "sft") as (facts, made):
        texts = load_examples(settings.texts or data(common) / "language.jsonl")
        if settings.model.endswith(".json"):
            config = load_config(settings.model)
            tokenizer = learn_tokenizer(map(whole_text, texts), config.vocab_size)
            lm = build_lm(config, tokenizer)
        else:
            model = named_model(settings.model)
            tokenizer, lm = load_tokenizer(model), load_named(model)
        report = warm_start(
            lm.to(device_of(common)),
            tokenizer,
            texts,
            max_tokens=settings.max_tokens,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            trainable_layers=settings.trainable_layers,
            dtype=dtype_of(common),
            seed=common.seed,
            progress_bar=True,
        )
        with replaced_folder(made / "sft") as folder:
            lm.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        facts["sft"] = asdict(report)
        facts["model"] = settings.model
        say(
            f"held-out loss {report.loss_before:.2f} -> {report.loss_after:.2f} nats per token "
            f"({report.n_texts} texts, {report.steps} updates)"
        )


def reward(common: Common, settings: Reward) -> None:
    """Learn reward model and judge from human feedback; leaves reward_model and judge."""
    from reward_models import (
        LearnedRewardModel,
        RewardEnsemble,
        agreement_weights,
        read_feedback,
    )

    if settings.feedback is None:
        parts = {name: data(common) / f"{name}.jsonl" for name in ("reward_model", "judge")}
    else:
        parts = {"reward_model": settings.feedback}
    if settings.judge_feedback is not None:
        parts["judge"] = settings.judge_feedback
    with stage(common, "reward") as (facts, made):
        feedback = {name: read_feedback(file) for name, file in parts.items()}
        for seed, (name, file) in enumerate(parts.items(), start=common.seed):
            records = feedback[name]
            start = {"device": device_of(common), "seed": seed}
            base = named_model(settings.model)
            if settings.model == "sft":
                base = str(left_by("sft", folder_of(common) / "sft"))
            model: LearnedRewardModel | RewardEnsemble
            if name == "reward_model" and settings.members > 1:
                model = RewardEnsemble.from_pretrained(base, settings.members, **start)
            else:
                model = LearnedRewardModel.from_pretrained(base, **start)
            weights = agreement_weights(records) if settings.weigh_annotators else None
            report = model.fit(
                records,
                settings.held_out,
                ties=settings.ties,
                margin=settings.margin,
                label_smoothing=settings.label_smoothing,
                annotator_weights=weights,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                seed=seed,
                progress_bar=True,
            )
            texts = [text for record in records for text in record.texts]
            texts = texts[:: max(1, len(texts) // REFERENCE_TEXTS)]  # files may be in some order
            what = f"{len(texts)} texts of {file.name}"
            model.normalize([""] * len(texts), texts, what)
            model.save(made / name)
            facts[name] = asdict(report)
            say(f"{name}: {agreement(facts[name])}")
            if name == "reward_model":
                draw_calibration(report, made / "calibration.png")
        if not (made / "calibration.png").exists():  # an earlier one is of another model
            (folder_of(common) / "calibration.png").unlink(missing_ok=True)
        facts["model"] = settings.model
        if settings.feedback is None and source_of(common) == "movies":
            facts["people"] = human_agreement()
            say(PEOPLE.format(**facts["people"]))


def draw_calibration(report: "FitReport | EnsembleReport", path: Path) -> None:
    """Draw how far predicted shares are people's, where choices were held out."""
    from reward_models.plots import plot_calibration

    kinds = ("comparisons", "labels")
    parts = {kind: part for kind in kinds if (part := getattr(report.held_out, kind, None))}
    if parts:
        plot_calibration(parts, path)


def ppo(common: Common, settings: PPO) -> None:
    """Train the policy on the reward model's scores; leaves policy, metrics and samples."""
    from agents import ranks

    if process_number() == 0 and settings.prompts is None:
        data(common)  # made by one, read by all
    ranks.connect(common.device)  # others than the first wait here for the stages before
    common.run = ranks.gather([common.run])[0]
    train_policy(common, settings)
    ranks.disconnect()
    if settings.resume is not None and (settings.resume / "report.md").exists():
        say(
            f"{settings.resume}/report.md is of the policy before: python train.py evaluate "
            f"--run {settings.resume} --overwrite true"
        )


def train_policy(common: Common, settings: PPO) -> None:
    """Do what stage ppo does, in each of the processes that have been connected."""
    from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat

    from agents import (
        CheckpointFolderCallback,
        DoctorCallback,
        SampleTextCallback,
        SavePretrainedCallback,
        TokenPPO,
        ranks,
    )
    from agents.checkpoint_callback import cut_back
    from reward_models import LearnedRewardModel
    from text_env.vocabulary import fingerprint, load_tokenizer

    if settings.shard and settings.lora_rank is not None:
        raise ValueError("expected shard or lora_rank, got both: adapters have little to split")
    n_processes, first = ranks.world_size(), ranks.rank() == 0
    if settings.resume is not None and n_processes > 1:
        raise ValueError(
            f"expected one process with resume, got {n_processes}: only one process's generators, "
            "environments and rollout are in a checkpoint; resume without torchrun, or begin anew "
            "with --policy and --reference (docs/guarantees.md)"
        )
    checkpoint = None if settings.resume is None else to_go_on_from(settings.resume, settings)
    if settings.n_envs % n_processes:
        raise ValueError(
            f"expected n_envs divisible by the number of processes, got {settings.n_envs} rows for "
            f"{n_processes}"
        )
    folder = folder_of(common)
    with stage(common, "ppo", go_on=checkpoint is not None) as (facts, made):
        policy = settings.policy or str(left_by("sft", folder / "sft"))
        tokenizer = load_tokenizer(policy)
        facts["reward"] = settings.reward
        vocabulary = settings.vocabulary
        if vocabulary is None and settings.prompts is None:
            vocabulary = data(common) / "language.jsonl"
        facts["writing"] = {
            "max_new_tokens": settings.max_new_tokens,
            "min_new_tokens": settings.min_new_tokens,
            "temperature": settings.temperature,
            "vocabulary": str(vocabulary) if vocabulary else None,
        }
        prompts = settings.prompts or data(common) / "prompts.jsonl"
        env = training_env(
            common,
            settings,
            tokenizer,
            prompts,
            vocabulary,
            n_processes,
        )
        same = {
            "policy": digest_of(policy),
            "reward model": digest_of_reward(common, settings),
            "tokenizer": fingerprint(tokenizer),
            f"prompts of {Path(prompts).name}": env.task.prompts.fingerprint(),
            "judge": digest_of(folder / "judge") if (folder / "judge").exists() else None,
        }
        if checkpoint is None:
            model = ppo_model(common, settings, policy, env)
        else:
            say(f"   from {checkpoint}")
            learning_rate = partial(warm_up_and_decay, settings.learning_rate)
            model = TokenPPO.load(
                checkpoint, env, device_of(common), learning_rate=learning_rate, facts=same
            )
        alone = n_processes == 1  # several make no checkpoints: they could not go on exactly
        if alone:
            remember_settings(common, settings, made / "checkpoints")
        logs = [made / name for name in ("metrics.jsonl", "samples.jsonl", "doctor.jsonl")]
        if first:
            if checkpoint is not None:
                cut_back(checkpoint, logs)
            writers: list[KVWriter] = [
                appending(logs[0]),
                TensorBoardOutputFormat(str(made / "tensorboard")),
            ]
            model.set_logger(Logger(str(made), writers))
        callbacks = [
            SampleTextCallback(logs[1]),
            SavePretrainedCallback(
                made / "policy", tokenizer, settings.save_every, merge=settings.merge_lora
            ),
            DoctorCallback(logs[2], settings.stop_on),  # behind what logs the judge
        ]
        if first and (folder / "judge").exists():
            judge = LearnedRewardModel.load(folder / "judge", device_of(common))
            callbacks.insert(0, judged_rollouts(judge))
        saver = CheckpointFolderCallback(
            made / "checkpoints",
            settings.checkpoint_every,
            settings.checkpoint_keep,
            facts=same,
            logs=logs,
        )
        if model.num_timesteps < settings.total_timesteps or model.rollout_under_way:
            with saver.stops_at_signals() if alone else nullcontext():
                model.learn(
                    settings.total_timesteps,
                    callback=[*callbacks, saver] if alone else callbacks,
                    reset_num_timesteps=checkpoint is None,
                    progress_bar=True,
                )
        model.logger.close()
        saver.store.keep = 1  # of a finished training
        saver.store.prune()
        rows = map(json.loads, read_lines(made / "metrics.jsonl"))
        facts["tokens"] = model.num_timesteps
        facts["doctor"] = [json.loads(line)["name"] for line in read_lines(logs[2])]
        facts["episodes"] = sum(row.get("rollout/episodes", 0) for row in rows)
        steps = model.policy.guard.n_steps
        if first:
            facts["card"] = card_of(common, settings, policy, model, env)
            if vocabulary:
                facts["card"]["limits"] = [RESTRICTED.format(int(env.allowed_tokens.sum()))]
            if (made / "policy").exists():  # else it is in its place already, with its card
                write_card(made / "policy", facts["card"])
        if first and not (facts["episodes"] and steps):
            raise RuntimeError(
                f"nothing was trained: expected finished episodes and optimizer steps, got "
                f"{facts['episodes']} and {steps} from {facts['tokens']} tokens; raise "
                "total_timesteps, or n_steps to the length of an episode"
            )


def training_env(
    common: Common,
    settings: PPO,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Path,
    vocabulary: Path | None,
    n_processes: int = 1,
) -> "TextVecEnv":
    """Return the environment that PPO trains in, one process's part of it."""
    from reward_models import EachAnswer
    from text_env import TextVecEnv

    skips = settings.on_nonfinite == "skip"
    models = (settings.reward_model, settings.reference)
    reward_fn = reward_function(common, settings.reward, *models, skips)
    return TextVecEnv(
        num_envs=settings.n_envs // n_processes,
        autoreset=settings.n_steps is not None,
        tokenizer=tokenizer,
        prompts=prompts,
        reward_fn=EachAnswer(reward_fn),
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        missing_eos_penalty=settings.missing_eos_penalty,
        allowed_token_ids=tokens_of(vocabulary, tokenizer),
        nonfinite_scores="pass" if skips else "error",
    )


def ppo_model(common: Common, settings: PPO, policy: str, env: "TextVecEnv") -> "TokenPPO":
    """Return the algorithm with all its settings, before its first token."""
    from agents import TokenPPO

    return TokenPPO(
        "CausalLMPolicy",
        env,
        partial(warm_up_and_decay, settings.learning_rate),
        device=device_of(common),
        n_steps=env.max_new_tokens if settings.n_steps is None else settings.n_steps,
        whole_episodes=settings.n_steps is None,
        batch_size=settings.batch_size,
        n_epochs=settings.n_epochs,
        gae_lambda=settings.gae_lambda,
        vf_coef=settings.vf_coef,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={
            "lm": policy,
            "temperature": settings.temperature,
            "trainable_layers": settings.trainable_layers,
            "lora": lora_of(settings),
            "value_lm": policy if settings.value_network else None,
            "dtype": dtype_of(common),
            "gradient_checkpointing": settings.gradient_checkpointing,
            "micro_batch_size": settings.micro_batch_size,
        },
        value_warmup=settings.value_warmup,
        shard=settings.shard,
        kl_coef=settings.kl_coef,
        ref_lm=settings.reference,
        target_ref_kl=settings.target_ref_kl,
        kl_horizon=settings.kl_horizon,
        on_nonfinite=settings.on_nonfinite,
        stats_window_size=max(100, settings.n_envs),
        seed=common.seed,
    )


FREE = (
    "total_timesteps", "save_every", "checkpoint_every", "checkpoint_keep", "stop_on", "resume",
    "threads",
)  # fmt: skip
"""Settings that may be others when a training of PPO goes on."""


def remember_settings(common: Common, settings: PPO, folder: Path) -> None:
    """Write down a training's settings, beside its checkpoints, for `as_begun`."""
    import torch as th

    from reward_models.atomic import atomic_file

    began = {
        "common": {"seed": common.seed, "dtype": common.dtype, "threads": th.get_num_threads()},
        "ppo": {**asdict(settings), "resume": None},
    }
    with atomic_file(folder / "settings.json") as aside:
        aside.write_text(json.dumps(began, indent=1, default=str), encoding="utf-8")


def as_begun(common: Common, settings: PPO, asked: Container[str]) -> PPO:
    """Return the settings that a training began with; those of `common` are set in place.

    Args:
        common: As the command line gives it.
        settings: As the command line gives it.
        asked: Names of the settings that the command line says itself, which are no defaults.

    Raises:
        ValueError: If one of those is not what the training began with, and has to be.
    """
    assert settings.resume is not None
    place = settings.resume / "ppo.unfinished" / "checkpoints"
    if not place.exists():
        place = settings.resume / "checkpoints"
    if not (place / "settings.json").exists():
        raise FileNotFoundError(
            "resume: expected a run folder with checkpoints of PPO, which one process makes and "
            f"several do not (docs/guarantees.md), got '{settings.resume}'"
        )
    began = json.loads((place / "settings.json").read_text(encoding="utf-8"))
    other = []
    for given, stored in ((settings, began["ppo"]), (common, began["common"])):
        for part in fields(given):
            if part.name not in stored:
                continue
            value, was = getattr(given, part.name), stored[part.name]
            is_asked, is_free = part.name in asked, part.name in FREE
            if is_asked and not is_free and str(value) != str(was):
                other.append(f"{part.name} is {was}, not {value}")
            if not (is_asked and is_free):
                path = was is not None and "Path" in str(part.type)
                setattr(given, part.name, Path(was) if path else was)
    if other:
        raise ValueError(
            f"resume: expected the settings that this training began with, where {', '.join(other)}"
        )
    return settings


def to_go_on_from(run_folder: Path, settings: PPO) -> Path:
    """Return a run's newest whole checkpoint, in the folder of its unfinished results.

    Results that are in their place already are copied there: those of a finished run, and those
    that a crash came behind while they were put in place.

    Raises:
        ValueError: If total_timesteps leave nothing to do.
    """
    from agents import newest_whole

    unfinished = run_folder / "ppo.unfinished"
    there = unfinished / "checkpoints"
    is_there = there.exists()
    checkpoint = newest_whole(there if is_there else run_folder / "checkpoints")
    at_end, n_tokens = how_far(checkpoint)
    is_done = at_end and not is_there and (run_folder / "stages/ppo.json").exists()
    if n_tokens >= settings.total_timesteps and (is_done or not at_end):
        raise ValueError(
            f"resume: {run_folder} is {'finished' if is_done else 'stopped'}, with {n_tokens} "
            f"tokens: expected more than that as total_timesteps, got {settings.total_timesteps}"
        )
    unfinished.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl", "doctor.jsonl", "tensorboard", "checkpoints"):
        if (run_folder / name).exists() and not (unfinished / name).exists():
            copy_whole(run_folder / name, unfinished / name)
    return there / checkpoint.name


def how_far(checkpoint: Path) -> tuple[bool, int]:
    """Say whether a checkpoint is of its training's end, and the tokens of all whole rollouts."""
    from agents.checkpoint import read_state

    state = read_state(checkpoint)
    progress, rollout = state["progress"], state["rollout"]
    n_tokens: int = progress["num_timesteps"] if rollout is None else rollout["tokens_before"]
    return rollout is None and n_tokens >= progress["_total_timesteps"], n_tokens


def copy_whole(source: Path, place: Path) -> None:
    """Copy a file or folder, which appears at its place when it is whole."""
    aside = place.with_name(f"{place.name}.copy")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    if source.is_dir():
        shutil.copytree(source, aside / source.name)
    else:
        shutil.copy2(source, aside)
    (aside / source.name).rename(place)
    aside.rmdir()


def digest_of(source: str | Path) -> str:
    """Return a digest of a model's folder; a hub id stands for itself."""
    folder, digest = Path(source), hashlib.sha256()
    if not folder.is_dir():
        return str(source)
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in CARD)
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def digest_of_reward(common: Common, settings: PPO) -> str:
    """Return a digest of the reward: its terms, and the models that they are made of."""
    digest = [] if settings.reward is None else [json.dumps(settings.reward)]
    own = {
        "learned": settings.reward_model or folder_of(common) / "reward_model",
        "likelihood": settings.reference or folder_of(common) / "sft",
    }
    terms = by_name(settings.reward)
    digest += [
        digest_of(own.get(name, name)) for name in terms if name in own or Path(name).is_dir()
    ]
    return " ".join(digest)


CARD = ("README.md", "curves.png")
"""Of a policy's folder, what is written about it; `evaluate` completes it."""


def appending(path: Path) -> "KVWriter":
    """Return SB3's writer of JSON lines, which goes on with a file rather than empty it."""
    from stable_baselines3.common.logger import JSONOutputFormat

    class Appending(JSONOutputFormat):
        def __init__(self) -> None:
            self.file = path.open("a", encoding="utf-8")

    return Appending()


def lora_of(settings: PPO) -> dict[str, float] | None:
    """Return the adapters' settings for peft, None where there are to be none."""
    if settings.lora_rank is None:
        return None
    alpha = 2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    return {"r": settings.lora_rank, "lora_alpha": alpha}


def evaluate(common: Common, settings: Evaluate) -> None:
    """Compare policy and warm start on test prompts; leaves report.md and its pictures."""
    from agents.language_model import load_named
    from agents.likelihood import LogLikelihood
    from reward_models import EachAnswer, LearnedRewardModel, LexiconSentiment
    from reward_models.assets import sentiment_lexicon
    from reward_models.contract import asked_for
    from reward_models.evaluation import mean_interval
    from reward_models.measures import LIKELIHOOD, measures
    from text_env.prompts import load_prompts
    from text_env.vocabulary import load_tokenizer

    folder = folder_of(common)
    with stage(common, "evaluate") as (facts, made):
        settings = as_in_ppo(folder, settings)
        reference = settings.reference or str(left_by("sft", folder / "sft"))
        policy = settings.policy or str(left_by("ppo", folder / "policy"))
        prompts = load_prompts(settings.prompts or data(common) / "test_prompts.jsonl")
        models = (settings.reward_model, settings.reference)
        rewarder = reward_function(common, settings.reward, *models)
        facts["reward"] = settings.reward
        scorers: dict[str, Callable[..., Any]] = {"score": rewarder}
        for name in settings.metrics:
            scorers[name] = reward_function(common, name, *models)
        if settings.judge or (folder / "judge").exists():
            judge = LearnedRewardModel.load(settings.judge or folder / "judge", device_of(common))
            scorers["judge"] = lambda prompts, completions, **_: judge.human_scale(
                prompts, completions
            )
            facts["judge_scale"] = judge.scale
        if settings.prompts is None and source_of(common) == "movies":  # the lexicon is English
            scorers["lexicon"] = LexiconSentiment(sentiment_lexicon())
        asked = set().union(*map(asked_for, scorers.values()))
        paid = EachAnswer(rewarder, also=asked)
        groups = write_all(common, settings, reference, policy, paid, prompts[: settings.n_prompts])
        give_back_memory()
        tokenizer, lm = load_tokenizer(reference), load_named(reference).to(device_of(common))
        if tokenizer.eos_token_id is not None and "turns" not in prompts[0]:
            scorers[LIKELIHOOD] = LogLikelihood(lm, tokenizer, dtype_of(common))
        columns = sorted(set(prompts[0]) - {"prompt"} | asked)
        scores = {name: scores_of(group, columns, scorers) for name, group in groups.items()}
        facts["measures"] = {name: measures(groups[name], scores[name]) for name in groups}
        facts["gain"] = {
            key: mean_interval(scores[POLICY][key] - scores[WARM_START][key])
            for key in scores[POLICY]
        }
        write_report(folder, made, facts, groups, scores, settings)
    if policy == str(folder / "policy"):
        complete_card(folder, facts)
    say(summary(facts))
    say(f"Report: {folder / 'report.md'}")


def scores_of(
    episodes: Episodes, columns: list[str], scorers: dict[str, Callable[..., Any]]
) -> "dict[str, np.ndarray]":
    """Score a writer's texts by all scorers, and by the terms of one that has several."""
    import numpy as np

    from reward_models import WeightedSum
    from reward_models.contract import ask
    from reward_models.conversations import answers_of

    answers = answers_of(episodes, columns)
    given = (answers.prompts, answers.completions, answers.columns)
    found: dict[str, np.ndarray] = {}
    for key, scorer in scorers.items():
        if key in found:  # a metric that is a term of the reward too
            continue
        if isinstance(scorer, WeightedSum):
            parts = [answers.mean(part) for part in scorer.parts(*given)]
            found[key] = scorer.total(parts)
            found |= dict(zip(scorer.names, parts, strict=True))
        else:
            found[key] = answers.mean([x.sum() for x in ask(scorer, *given)])
    return found


def check(common: Common, settings: Check) -> int:
    """Look in a minute for what would spoil a run: model, tokenizer, reward, speed, memory.

    Prints a line for each thing looked at: ok, look, or wrong. The exit code is 1 if any is wrong.
    """
    from agents.checks import Verdict

    set_up(common)
    found: list[Verdict] = []
    for verdict in verdicts(common, settings):
        found.append(verdict)
        say(in_columns(verdict.level, verdict.name, verdict.said))
    counts = {level: sum(v.level == level for v in found) for level in ("ok", "look", "wrong")}
    say("\n" + ", ".join(f"{count} {level}" for level, count in counts.items()))
    if settings.json is not None:
        text = json.dumps([asdict(verdict) for verdict in found], indent=1, ensure_ascii=False)
        write_text(settings.json, text + "\n")
    return int(counts["wrong"] > 0)


def verdicts(common: Common, settings: Check) -> "Iterator[Verdict]":
    """Check one thing after another; what cannot be checked is said so."""
    from agents import checks
    from agents.language_model import load_named
    from text_env.vocabulary import load_tokenizer

    if settings.model is None and common.run is None:
        raise ValueError("expected --model, or --run for the sft/ of a run, got neither")
    name = settings.model or str(left_by("sft", folder_of(common) / "sft"))
    model = named_model(name)
    lm, tokenizer = load_named(model), load_tokenizer(settings.tokenizer or model)
    vocabulary = checks.attempt("vocabulary", checks.check_vocabulary, lm, tokenizer)
    yield vocabulary
    yield checks.attempt("end token", checks.check_end_token, lm, tokenizer)
    yield checks.attempt("padding token", checks.check_padding_token, tokenizer)
    yield checks.attempt("chat template", checks.check_chat_template, tokenizer)
    if vocabulary.level == "wrong":
        yield checks.Verdict("all else", "look", "not checked: it needs a vocabulary that fits")
        return
    try:
        env, policy, columns = to_be_checked(common, settings, lm, tokenizer)
    except (ValueError, OSError, RuntimeError) as error:
        yield checks.Verdict("set-up", "wrong", " ".join(str(error).split()))
        yield checks.Verdict("all else", "look", "not checked: it needs a run that can be set up")
        return
    try:
        samples = yield from verdicts_of_policy(settings, env, policy)
    except Exception as error:  # whatever a user's model does
        reason = " ".join(str(error).split())
        yield checks.Verdict("model", "wrong", f"it cannot write: {type(error).__name__}: {reason}")
        yield checks.Verdict("all else", "look", "not checked: it needs a model that can write")
        return
    yield from verdicts_of_reward(common, settings, samples, columns, env.task)


BEGINNINGS = ("The film is", "This is a story of", "I think that", "With", "In the end, the actors")
"""Prompts where none are given, of several lengths."""


def to_be_checked(
    common: Common,
    settings: Check,
    lm: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> "tuple[TextVecEnv, CausalLMPolicy, list[str]]":
    """Return environment and policy as a run would make them, and the prompts' further columns."""
    import numpy as np

    from agents import CausalLMPolicy
    from text_env import TextVecEnv
    from text_env.prompts import load_prompts

    prompts = load_prompts(settings.prompts or list(BEGINNINGS))
    env = TextVecEnv(
        num_envs=32,
        group_size=2,  # two completions of each prompt, for the reward to tell apart
        autoreset=False,
        tokenizer=tokenizer,
        prompts=prompts,
        reward_fn=lambda prompts, completions, **_: [0.0] * len(completions),
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        allowed_token_ids=tokens_of(settings.vocabulary, tokenizer),
    )
    policy = CausalLMPolicy(
        env.observation_space,
        env.action_space,
        lambda _: 0.0,
        lm=lm,
        temperature=settings.temperature,
        trainable_layers=settings.trainable_layers,
        dtype=dtype_of(common),
        gradient_checkpointing=settings.gradient_checkpointing,
    ).to(device_of(common))
    policy.allowed_tokens.copy_(policy.allowed_tokens.new_tensor(np.array(env.allowed_tokens)))
    env.seed(common.seed)
    return env, policy, sorted(set(prompts[0]) - {"prompt"})


def verdicts_of_policy(
    settings: Check, env: "TextVecEnv", policy: "CausalLMPolicy"
) -> "Generator[Verdict, None, Episodes]":
    """Check what the policy must keep, and what it costs; return what it wrote."""
    import numpy as np

    from agents import checks, forecast
    from agents.writing import write_episodes

    prompts = [row[row >= 0] for row in env.reset()[:16:2]]
    walked = checks.walk(policy, prompts, min(settings.max_new_tokens, 12))
    yield checks.attempt("cache", checks.check_cache, policy, walked)
    yield checks.attempt("padding", checks.check_padding, policy, walked)
    yield checks.attempt("temperature", checks.check_temperature, policy, prompts[0])
    episodes = write_episodes(policy, env)
    ends = np.flatnonzero(env.task.vocabulary.is_eos).tolist()
    reasons = [episode["finish_reason"] for episode in episodes]
    budget = (settings.min_new_tokens, settings.max_new_tokens)
    yield checks.attempt("ending", checks.check_ends, policy, walked, ends, reasons, *budget)
    try:
        steps = min(settings.max_new_tokens, 12)
        rows = min(settings.n_envs, 32)
        measured = forecast.measure(policy, prompts, walked, rows, steps)
    except Exception as error:  # whatever a user's model does in a backward pass
        reason = " ".join(str(error).split())
        yield checks.Verdict("speed", "wrong", f"an update failed: {reason}")
        return episodes
    length = float(np.mean([episode["n_tokens"] for episode in episodes]))
    yield forecast.check_speed(measured, settings.n_envs, length, settings.n_epochs)
    whole = 1 + float(np.mean([len(prompt) for prompt in prompts])) / length  # with the prompt
    n_tokens = settings.n_envs * length
    held = min(settings.micro_batch_size or settings.batch_size, n_tokens)
    parts = forecast.memory_parts(policy, measured, settings.n_envs, whole * held, whole * n_tokens)
    yield forecast.check_memory(parts, forecast.device_memory(policy.device))
    return episodes


def verdicts_of_reward(
    common: Common, settings: Check, episodes: Episodes, columns: list[str], task: "TextTask"
) -> "Iterator[Verdict]":
    """Check the reward on what the policy wrote."""
    from agents import checks, reward_checks
    from reward_models.contract import asked_for
    from reward_models.conversations import answers_of

    reward = settings.reward
    if reward is None and common.run is not None and (common.run / "reward_model").exists():
        reward = str(common.run / "reward_model")
    if reward is None:
        yield checks.Verdict("reward", "look", "not checked: there is none; give it as --reward")
        return
    try:
        reward_fn = reward_function(common, reward, None)
    except Exception as error:  # whatever a user's module does when imported
        reason = " ".join(str(error).split())
        yield checks.Verdict("reward", "wrong", f"cannot be loaded from {reward!r}: {reason}")
        return
    asked = asked_for(reward_fn)
    if asked and task.user is not None:
        said = f"it asks for {sorted(asked)}, which only episodes of one turn have"
        yield checks.Verdict("reward", "wrong", said)
        return
    if asked:
        reward_fn = partial(sums_of_tokens, reward_fn, task)
    answers = answers_of(episodes, columns)
    texts, further = (answers.prompts, answers.completions), answers.columns
    for name, look in (
        ("reward finite", reward_checks.check_finite),
        ("reward in batches", reward_checks.check_batch),
        ("reward spread", reward_checks.check_spread),
    ):
        yield checks.attempt(name, look, reward_fn, *texts, further)


def sums_of_tokens(
    reward_fn: Callable[..., Any],
    task: "TextTask",
    *,
    prompts: list[str],
    completions: list[str],
    **columns: Any,
) -> list[float]:
    """Score texts by a reward that asks for tokens: those that the tokenizer makes, and an end."""
    import numpy as np

    from reward_models.contract import ask
    from text_env.scoring import TOKENS

    ends = np.flatnonzero(task.vocabulary.is_eos)[:1].tolist()
    ids = [task.tokenizer(x, add_special_tokens=False)["input_ids"] + ends for x in completions]
    no_prompt = np.zeros(0, dtype=int)
    pieces = [task.vocabulary.pieces(no_prompt, *row) for row in zip(ids, completions, strict=True)]
    columns |= dict(zip(TOKENS, (ids, pieces), strict=True))
    return [float(part.sum()) for part in ask(reward_fn, prompts, completions, columns, True)]


def by_name(terms: Terms) -> dict[str, Any]:
    """Return a reward's terms by name."""
    return terms if isinstance(terms, dict) else {terms or "learned": 1.0}


def reward_function(
    common: Common,
    terms: Terms,
    reward_model: str | None,
    reference: str | None = None,
    allow_nonfinite: bool = False,
) -> Callable[..., Any]:
    """Return the reward function that settings ask for.

    Args:
        common: Whose run has the reward model and the warm start that terms may mean.
        terms: As in `PPO.reward`.
        reward_model: Folder or hub id of what `learned` means; None: the run's.
        reference: Of the model that `likelihood` asks; None: the run's warm start.
        allow_nonfinite: Let terms score NaN, for an agent that leaves such episodes out.
    """
    from agents.language_model import load_named
    from agents.likelihood import LogLikelihood
    from reward_models import load_reward_model, weighted_sum
    from reward_models.composed import TERMS
    from text_env.vocabulary import load_tokenizer

    def other(name: str) -> Callable[..., Any]:
        if name == "learned":
            learned = reward_model or left_by("reward", folder_of(common) / "reward_model")
            return load_reward_model(learned, device_of(common))
        if name == "likelihood":
            asked = reference or str(left_by("sft", folder_of(common) / "sft"))
            lm = load_named(asked).to(device_of(common))
            return LogLikelihood(lm, load_tokenizer(asked), dtype_of(common))
        return named_reward(common, name)

    if not isinstance(terms, dict) and (terms or "learned") not in TERMS:
        return other(terms or "learned")  # as it is, whatever it returns
    return weighted_sum(by_name(terms), other, allow_nonfinite)


def named_reward(common: Common, name: str) -> Callable[..., Any]:
    """Return a reward model from a folder or hub id, or a function from module:name."""
    from reward_models import load_reward_model
    from reward_models.composed import TERMS
    from text_env.scoring import load_reward

    if ":" in name and not Path(name).exists():
        if os.getcwd() not in sys.path:  # where a user's module would be looked for
            sys.path.append(os.getcwd())
        return load_reward(name)
    try:
        return load_reward_model(name, device_of(common))
    except OSError as error:
        known = ", ".join([*TERMS, "learned", "likelihood"])
        raise ValueError(
            f"{name}: expected one of {known}, a function as module:name, or the folder or hub id "
            f"of a reward model ({str(error).partition(chr(10))[0]})"
        ) from error


def in_columns(level: str, name: str, said: str) -> str:
    """Lay out a verdict: level, name, and the sentence in lines of its own column."""
    lines = textwrap.wrap(said, 72) or [""]
    return "\n".join([f"{level:<5}  {name:<18} {lines[0]}", *(" " * 26 + x for x in lines[1:])])


def chat(common: Common, settings: Chat) -> None:
    """Talk with a run's policy at the terminal; it writes as it was trained to.

    With a chat template in its tokenizer it is given the conversation, and without one each text of
    yours, to go on from.
    """
    from agents.chat import converse
    from reward_models.feedback.terminal import visible

    set_up(common)
    folder = settings.run_folder
    settings = as_in_ppo(folder, settings)
    policy = settings.policy or str(left_by("ppo", folder / "policy"))
    write, templated = replies(common, settings, policy)
    converse(write, templated, visible)


def replies(
    common: Common, settings: Writing, lm: str
) -> tuple[Callable[[str | list[dict[str, str]]], Iterator[str]], bool]:
    """Return what writes after a text or conversation, as it grows, and if it takes the latter."""
    import numpy as np

    from agents.language_model import load_named, most_positions
    from text_env import TextVecEnv
    from text_env.vocabulary import load_tokenizer

    assert settings.max_new_tokens is not None
    tokenizer, model = load_tokenizer(lm), load_named(lm)
    templated = getattr(tokenizer, "chat_template", None) is not None
    positions = most_positions(model) or LONGEST_CHAT
    env = TextVecEnv(
        num_envs=1,
        autoreset=False,
        tokenizer=tokenizer,
        prompts=[[{"role": "user", "content": "?"}]] if templated else ["?"],
        reward_fn=lambda prompts, completions, **_: [0.0],
        max_prompt_tokens=min(positions, LONGEST_CHAT) - settings.max_new_tokens,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        allowed_token_ids=tokens_of(settings.vocabulary, tokenizer),
    )
    policy = writer(common, settings, env, model)

    def write(prompt: str | list[dict[str, str]]) -> Iterator[str]:
        env.set_options({"prompt": prompt})
        obs, done, info = env.reset(), False, {}
        n_prompt = int((obs[0] >= 0).sum())
        while not done:
            token, _ = policy.predict(obs, action_masks=np.array(env.action_masks()))
            obs, _, dones, infos = env.step(token)
            done, info = bool(dones[0]), infos[0]
            if not done:
                ids = obs[0][obs[0] >= 0]
                yield env.task.vocabulary.completion_text(ids[:n_prompt], ids[n_prompt:])
        yield info["completion"]

    return write, templated


LONGEST_CHAT = 2048
"""Tokens of a conversation that are looked at, at most."""


# --------------------------------------------------------------------------------- people


def annotate(common: Common, settings: Annotate) -> None:
    """Ask people about completions, on a page or here; answers go to the run's feedback.sqlite."""
    from reward_models.feedback import Accounts, FeedbackStore
    from reward_models.feedback.terminal import annotate as ask_here

    if not settings.terminal:
        from reward_models.feedback.web import serve, set_up_account  # missing? now, not later
    kind = settings.kind or "comparison"
    if settings.against is not None and kind != "comparison":
        raise ValueError(f"expected kind comparison with against, got {kind}")
    file = store_file(common, settings.store)
    with (
        FeedbackStore(file, common.seed, settings.gold_rate) as store,
        Accounts(file) as accounts,
    ):
        given = (settings.tasks, settings.policy, settings.against, settings.prompts)
        if any(value is not None for value in given) or store.count_tasks(settings.kind) == 0:
            tasks = tasks_to_ask(common, settings, kind)
            overlap = (settings.overlap_share, settings.overlap_annotators)
            say(f"{store.add(tasks, *overlap)} new tasks")
        if settings.ensemble is not None:
            waiting = with_uncertainty(common, store.unanswered(), settings.ensemble)
            store.add(waiting)  # they are there: it is told how uncertain each is
            say(f"{len(waiting)} tasks without all their answers put in order, the disputed first")
        if settings.terminal:
            here = settings.annotator or getpass.getuser()
            account = accounts.find(here) or accounts.create(here)
            ask_here(store, account.pseudonym)
            return
        if not accounts.anybody_can_sign_in():
            set_up_account(accounts, ask("Nobody can sign in yet. A name to do it with: "))
        scheme = "http" if settings.certificate is None else "https"
        say(f"Annotate at {scheme}://{settings.host}:{settings.port}/ (Ctrl-C ends it)")
        serve(
            store,
            accounts,
            settings.host,
            settings.port,
            settings.names,
            settings.lead,
            certificate=None if settings.certificate is None else str(settings.certificate),
            key=None if settings.key is None else str(settings.key),
        )


def ask(question: str) -> str:
    """Ask for a line at the terminal."""
    try:
        return input(question)
    except EOFError:
        raise ValueError("expected an answer at the terminal, which is not to be had") from None


def tasks_to_ask(common: Common, settings: Annotate, kind: "Kind") -> "list[Task]":
    """Read tasks from a file, or sample them from one policy or two."""
    from reward_models.feedback import (
        tasks_from_completions,
        tasks_from_jsonl,
        tasks_side_by_side,
    )
    from text_env.prompts import load_prompts

    if settings.tasks is not None:
        tasks = tasks_from_jsonl(settings.tasks, kind)
    else:
        set_up(common)
        folder, policy = folder_of(common), settings.policy
        if policy is None:
            trained = folder / "policy"
            policy = str(trained if trained.exists() else left_by("sft", folder / "sft"))
        settings = as_in_ppo(Path(policy).parent, settings)
        prompts = some_prompts(
            load_prompts(settings.prompts or data(common) / "prompts.jsonl"),
            settings.n_prompts,
            common.seed,
        )
        mine = samples_of(common, settings, policy, prompts, settings.samples)
        if settings.against is None:
            tasks = tasks_from_completions(mine, kind, policy)
        else:
            theirs = samples_of(common, settings, settings.against, prompts, settings.samples)
            tasks = tasks_side_by_side(mine, theirs, (policy, settings.against))
    return tasks


def some_prompts(prompts: list[dict[str, Any]], n: int, seed: int) -> list[dict[str, Any]]:
    """Draw n of the prompts, all of them if there are fewer."""
    return random.Random(seed).sample(prompts, min(n, len(prompts)))


def with_uncertainty(common: Common, tasks: "list[Task]", ensemble: Path) -> "list[Task]":
    """Say of each task how far the members of an ensemble differ on it."""
    from reward_models import RewardEnsemble

    model = RewardEnsemble.load(ensemble, device_of(common))
    said: list[Task] = []
    measures: tuple[tuple[int, Any], ...] = ((1, model.spread), (2, model.pair_uncertainty))
    for n_texts, measure in measures:
        some = [task for task in tasks if len(task.completions) == n_texts]
        if some:
            sides = map(list, zip(*(task.completions for task in some), strict=True))
            found: Any = measure([task.prompt for task in some], *sides)
            said += [replace(t, uncertainty=float(u)) for t, u in zip(some, found, strict=True)]
    return said


def store_file(common: Common, given: Path | None, there: bool = False) -> Path:
    """Return the file of tasks and answers; if it is to be `there`, say how it is made."""
    file = given or folder_of(common) / "feedback.sqlite"
    if there and not file.exists():
        raise FileNotFoundError(
            f"expected {file}, which `python train.py annotate` or `feedback import` makes"
        )
    return file


def make_account(common: Common, settings: SignIn) -> None:
    """Let somebody sign in on the page; asks for the password."""
    from reward_models.feedback import Accounts
    from reward_models.feedback.web import set_up_account

    with Accounts(store_file(common, settings.store)) as accounts:
        account = set_up_account(accounts, settings.name)
    say(f"{account.name} can sign in; answers will know them as {account.pseudonym}")


def import_answers(common: Common, settings: Import) -> None:
    """Take up answers from a file: records (.jsonl) or ratings (.csv)."""
    from reward_models.feedback import FeedbackStore, read_feedback, read_ratings_csv

    if settings.file.suffix == ".csv":
        records = read_ratings_csv(settings.file, settings.scale)
    else:
        records = read_feedback(settings.file)
    with FeedbackStore(store_file(common, settings.store)) as store:
        say(f"{store.import_records(records)} new answers of {len(records)}")


def export_answers(common: Common, settings: Export) -> None:
    """Write the answers to a file: records (.jsonl), or ratings (.csv)."""
    from reward_models.feedback import FeedbackStore, write_feedback, write_ratings_csv

    kind = settings.kind
    if settings.file.suffix == ".csv":
        if kind not in (None, "rating"):
            raise ValueError(
                f"expected a .jsonl file for {kind}s, got {settings.file}: a .csv "
                "holds ratings only"
            )
        kind = "rating"
    if settings.file.exists() and not common.overwrite:
        raise FileExistsError(f"{settings.file} exists already: pass --overwrite true")
    with FeedbackStore(store_file(common, settings.store, there=True)) as store:
        records = store.export(kind, settings.ties)
    write = write_ratings_csv if settings.file.suffix == ".csv" else write_feedback
    say(f"{len(records)} answers: {write(settings.file, records)}")


def forget(common: Common, settings: Forget) -> None:
    """Erase one person's answers, name and password, in the files of a loop's rounds too."""
    from reward_models.feedback import Accounts, FeedbackStore, read_feedback, write_feedback

    file = store_file(common, settings.store, there=True)
    with FeedbackStore(file) as store, Accounts(file) as accounts:
        account = accounts.find(settings.name)
        pseudonym = settings.name if account is None else account.pseudonym
        gone = "" if account is None else f", and the account {account.name}"
        say(f"{store.forget(settings.name)} answers erased{gone}")
    for written in sorted(folder_of(common).glob("round-*/feedback.jsonl")):
        records = read_feedback(written)
        kept = [record for record in records if record.annotator != pseudonym]
        if len(kept) < len(records):
            say(f"{len(records) - len(kept)} of them were in {write_feedback(written, kept)} too")


def worth(common: Common, settings: Worth) -> None:
    """Say how many more answers are worth it; leaves learning-curve.png and learning-curve.json.

    Reward models are fitted on an eighth, a quarter, half and all of the answers, measured on the
    same held-out ones, and the curve is continued.
    """
    from collections import Counter

    from reward_models import LearnedRewardModel
    from reward_models.feedback import FeedbackStore
    from reward_models.fitting import split
    from reward_models.learning_curve import in_words, learning_curve
    from reward_models.plots import plot_learning_curve

    set_up(common)
    with FeedbackStore(store_file(common, settings.store, there=True)) as store:
        kinds = Counter(answer.task.kind for answer in store.answers())
        kind = settings.kind or (kinds.most_common(1)[0][0] if kinds else None)
        records = store.export(kind)
    learned, held_out = split(records, settings.held_out, common.seed)
    if len(learned) < LEAST_ANSWERS:
        raise ValueError(
            f"expected {LEAST_ANSWERS} {kind or 'answer'}s or more to learn from, for a curve, got "
            f"{len(learned)} and {len(held_out)} held out"
        )
    measure: Any = f"{kind}s"
    base, bar = named_model(settings.model), progress(4, "fitting")
    curve = learning_curve(
        lambda seed: LearnedRewardModel.from_pretrained(base, device_of(common), seed=seed),
        learned,
        held_out,
        [len(learned) // part for part in (8, 4, 2, 1)],
        measure,
        settings.repeats,
        common.seed,
        on_point=lambda _: bar.update(),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
    )
    bar.close()
    said = in_words(curve, len(records), settings.least_gain)
    folder = folder_of(common)
    plot_learning_curve(curve, folder / "learning-curve.png")
    facts = {"answers": len(records), "least_gain": settings.least_gain, "said": said}
    write_text(folder / "learning-curve.json", json.dumps(facts | asdict(curve), indent=1))
    say(said)


LEAST_ANSWERS = 32
"""So many to learn from, for a curve: its first point has an eighth of them."""


def compare(common: Common, settings: Compare) -> None:
    """Say how often one policy's completions are better than another's: judge, reward, people."""
    import numpy as np

    from reward_models import load_reward_model
    from reward_models.evaluation import share_interval
    from reward_models.feedback import FeedbackStore, tasks_side_by_side
    from reward_models.feedback.agreement import win_rates, with_equal_pairs
    from text_env.prompts import load_prompts

    set_up(common)
    folder, policies = folder_of(common), (settings.first, settings.second)
    settings = as_in_ppo(Path(settings.first).parent, settings)
    prompts = load_prompts(settings.prompts or data(common) / "test_prompts.jsonl")
    prompts = some_prompts(prompts, settings.n_prompts, common.seed)
    mine, theirs = (samples_of(common, settings, lm, prompts, 1) for lm in policies)
    asked = [prompt for prompt, texts in mine.items() for _ in texts]
    sides = [[text for texts in side.values() for text in texts] for side in (mine, theirs)]
    same = np.array([one == two for one, two in zip(*sides, strict=True)])
    found: dict[str, Any] = {}
    for name in ("judge", "reward_model"):
        if (folder / name).exists():
            model = load_reward_model(folder / name, device_of(common))
            one, two = (model.score(asked, texts) for texts in sides)
            tie = same | (one == two)  # equal texts are, whatever is in their batches
            wins = float(np.sum((one > two) & ~tie) + 0.5 * np.sum(tie))
            found[name] = [*share_interval(wins, len(asked)), len(asked)]
    file = settings.store or folder / "compare.sqlite"  # nothing is learned from these answers
    if settings.ask:
        with FeedbackStore(file, common.seed) as store:
            new = store.add(tasks_side_by_side(mine, theirs, policies))
        say(f"{new} new tasks: python train.py annotate --run {folder} --store {file}")
    if file.exists():
        with FeedbackStore(file) as store:
            rates = {
                (r.origin, r.against): with_equal_pairs(r.rate, int(same.sum()), len(asked))
                for r in win_rates(store.answers())
            }
        if policies in rates:
            found["people"] = list(rates[policies])
        elif policies[::-1] in rates:  # rates are of the first by name
            share, low, high, n = rates[policies[::-1]]
            found["people"] = [1 - share, 1 - high, 1 - low, n]
    if not found:
        raise ValueError(f"expected a judge or reward_model in {folder}, or answers; found none")
    say(f"{settings.first} is better than {settings.second}, on {len(asked)} prompts:")
    if same.any():
        say(f"  {same.sum()} of the pairs are equal: half a win each; people are not asked them")
    for name, (share, low, high, n) in found.items():
        say(f"  {name}: {share:.2f} [{low:.2f}, {high:.2f}] of {n}")
    rows = [
        {"prompt": prompt, "first": one, "second": two}
        for prompt, one, two in zip(asked, *sides, strict=True)
    ]
    result = {"policies": policies, "win_rate": found, "equal": int(same.sum())}
    write_text(
        folder / "compare.json",
        json.dumps(result | {"samples": rows}, indent=1, ensure_ascii=False),
    )


def loop(common: Common, settings: Loop) -> None:
    """Go round: sample, ask people, fit a reward model, PPO from the last policy, evaluate.

    A round is a folder of the run. What is there is not done again, so a loop that was stopped, by
    people who have not answered yet or by anything else, goes on where it was, with the settings
    that it began with (config-loop.yaml).
    """
    folder = folder_of(common)
    policy = prepare_loop(common, settings)
    first = settings.ppo.reference or policy
    told: dict[str, Any] = {"prompts": settings.ppo.prompts, "vocabulary": settings.ppo.vocabulary}
    if settings.ppo.prompts is None:
        told = {"prompts": data(common) / "prompts.jsonl"}
        told["vocabulary"] = settings.ppo.vocabulary or data(common) / "language.jsonl"
    tests = settings.evaluate.prompts or data(common) / "test_prompts.jsonl"
    settings = replace(
        settings,
        ppo=replace(settings.ppo, reference=first, **told),
        evaluate=replace(
            settings.evaluate, prompts=tests, reference=first, judge=str(folder / "judge")
        ),
    )
    ensemble = None
    for number in range(1, settings.rounds + 1):
        turn = replace(common, run=folder / f"round-{number}", seed=common.seed + number)
        here = folder_of(turn)
        here.mkdir(exist_ok=True)
        say(f"==== round {number}")
        records = ask_about(turn, settings, policy, ensemble)
        if records is None:
            return
        model, trained = here / "reward_model", here / "policy"
        if not is_done(turn, "reward"):
            reward(turn, replace(settings.reward, feedback=records, judge_feedback=None))
        if not is_done(turn, "ppo"):
            how = replace(settings.ppo, policy=policy, reward_model=str(model))
            if any(here.glob("ppo.unfinished/checkpoints/step-*")):
                how = as_begun(turn, replace(how, resume=here), asked=("resume",))
            ppo(turn, how)
        if not is_done(turn, "evaluate"):
            evaluate(turn, settings.evaluate)
        policy, ensemble = str(trained), model if settings.reward.members > 1 else None
        write_loop_report(folder, number)
    say(f"Report: {folder / 'loop.md'}")


def ask_about(common: Common, settings: Loop, policy: str, ensemble: Path | None) -> Path | None:
    """Sample from a round's policy and have people compare the samples.

    Returns:
        The file of all answers so far; None while the round has not enough.
    """
    from reward_models.feedback import FeedbackStore, tasks_from_completions, write_feedback
    from text_env.prompts import load_prompts

    here, source = folder_of(common), settings.ppo.prompts
    assert source is not None
    asked, records, n = here / "asked.json", here / "feedback.jsonl", settings.comparisons
    if records.exists():
        return records
    several = settings.overlap_annotators if settings.overlap_share else 1
    if settings.people == "simulated":
        several = min(several, settings.simulated.annotators)
    with FeedbackStore(here.parent / "feedback.sqlite", common.seed) as store:
        if not asked.exists():
            set_up(common)
            how = Writing(**{f.name: getattr(settings.ppo, f.name) for f in fields(Writing)})
            prompts = some_prompts(load_prompts(source), n, common.seed)
            pairs = math.ceil(n / len(prompts)) * (2 if ensemble else 1)  # some to choose from
            samples = samples_of(common, how, policy, prompts, 2 * pairs)
            tasks = tasks_from_completions(samples, "comparison", here.name)
            random.Random(common.seed).shuffle(tasks)
            if ensemble is not None:
                tasks = with_uncertainty(common, tasks, ensemble)
                tasks.sort(key=lambda task: task.uncertainty or 0.0, reverse=True)
            tasks = tasks[:n]  # what is too many now would be asked in the rounds to come
            store.add(tasks, settings.overlap_share, several)
            write_text(asked, json.dumps({"tasks": len(tasks)}))
        if settings.people == "simulated":
            simulate(common, settings.simulated, store)
        n, lacking = store.count_open(here.name, several)
        if lacking:
            share = f"; {settings.overlap_share:.0%} of them need {several} people's" * (
                several > 1
            )
            say(
                f"{n - lacking} of {n} comparisons have all their answers{share}: "
                f"python train.py annotate --run {here.parent}; then call the loop again"
                + ", with --overlap_annotators 1 if there is nobody else"
                * (several > 1)
            )
            return None
        return write_feedback(records, store.export("comparison"))


def prepare_loop(common: Common, settings: Loop) -> str:
    """Make what the rounds stand on: first policy, judge, and what simulated people answer by.

    Returns:
        The first policy, which is the reference of every round unless another is given.
    """
    folder = folder_of(common)
    if settings.ppo.policy is None and not (folder / "sft").exists():
        sft(common, settings.sft)
    if not (folder / "judge").exists():
        reward(common, settings.judge)
    if not (folder / "judge").exists():
        raise ValueError("expected judge.judge_feedback: a loop with own feedback needs a judge")
    return settings.ppo.policy or str(folder / "sft")


def simulate(common: Common, settings: Simulated, store: "FeedbackStore") -> None:
    """Let simulated people answer until nothing is left to ask, by several what several are to."""
    from reward_models import SimulatedAnnotator, load_reward_model
    from reward_models.feedback.simulated import answer_tasks

    known: Any = load_reward_model(folder_of(common).parent / "reward_model", device_of(common))
    told = asdict(settings)
    people = [
        SimulatedAnnotator(
            known, **told, seed=1000 * common.seed + i, pseudonym=f"simulated-{i + 1}"
        )
        for i in range(told.pop("annotators"))
    ]
    bar = progress(None, "answering")
    for _ in answer_tasks(store, people):
        bar.update()
    bar.close()


# --------------------------------------------------------------------------------- tuning


def tune(common: Common, settings: Tune) -> None:
    """Search the settings with which PPO does best by the judge within a KL budget.

    Leaves the folder tune. The same command goes on with a search that was stopped, and called
    several times at once, on as many processes, all work on the same one.
    """
    from agents import tuning, tuning_report
    from reward_models import LearnedRewardModel

    set_up(common)
    folder = folder_of(common) / "tune"
    judge_folder = settings.judge or str(left_by("reward", folder_of(common) / "judge"))
    judge = LearnedRewardModel.load(judge_folder, device_of(common))
    base = {name: value for name, value in asdict(settings.ppo).items() if name not in UNTUNED}
    space = tuning.read_space(settings.space, base)
    with tuning.alone(folder):
        chosen = told_to_trials(common, settings, folder)
    same = {f"ppo.{name}": str(value) for name, value in asdict(chosen).items()} | {
        "space": {name: str(distribution) for name, distribution in space.items()},
        "seed": common.seed,
        "judge": digest_of(judge_folder),
        "policy": digest_of(chosen.policy or ""),
        "reward model": digest_of_reward(common, chosen),
        **{name: getattr(settings, name) for name in MEASURING},
    }
    objective = tuning.Objective(settings.kl_budget, settings.kl_weight)
    first = tuning.values_inside(space, base)
    study = tuning.open_study(folder, same, first, settings.evaluations)

    def run_trial(trial: "Trial", place: Path) -> "TrialCallback":
        with_its_values = replace(chosen, **trial.params)
        return train_trial(common, settings, with_its_values, judge, objective, trial, place)

    def report(trial: "FrozenTrial") -> None:
        write_tuning(settings, folder, study, objective)
        row = tuning_report.row_of(trial)
        say(", ".join(f"{name} {value}" for name, value in row.items() if value != ""))

    tuning.search(study, folder, space, run_trial, settings.trials, common.seed, report)
    write_tuning(settings, folder, study, objective)
    say(tuning_report.told(study))
    say(f"Report: {folder / 'tune.md'}")
    say(f"To use it: python train.py ppo --config {folder / 'best.yaml'} --run …")


MEASURING = ("kl_budget", "kl_weight", "n_prompts", "evaluations")
"""Settings of a search that stay as they began, beside those of PPO."""

UNTUNED = (
    "policy", "reference", "reward_model", "reward", "prompts", "vocabulary", "resume", "stop_on",
    "shard", "save_every", "checkpoint_every", "checkpoint_keep", "merge_lora",
)  # fmt: skip
"""Settings of PPO that are not searched."""


def told_to_trials(common: Common, settings: Tune, folder: Path) -> PPO:
    """Return what a trial's PPO is told but for what is searched; splits the training prompts."""
    from reward_models.atomic import atomic_folder
    from text_env.prompts import load_prompts

    run_folder, given = folder_of(common), settings.ppo
    vocabulary = given.vocabulary
    if vocabulary is None and given.prompts is None:
        vocabulary = data(common) / "language.jsonl"
    learned = given.reward_model
    if learned is None and "learned" in by_name(given.reward):
        learned = str(left_by("reward", run_folder / "reward_model"))
    split = folder / "prompts"
    if not split.exists():
        rows = load_prompts(given.prompts or data(common) / "prompts.jsonl")
        known = {json.dumps(row["prompt"]): row for row in rows}
        n = min(settings.n_prompts, len(known) // 2)
        if n < 1:
            raise ValueError(
                f"expected two different prompts or more, to hold some out, got {len(known)}"
            )
        held = set(random.Random(common.seed).sample(sorted(known), n))
        with atomic_folder(split) as made:
            rest = (row for row in rows if json.dumps(row["prompt"]) not in held)
            write_jsonl(made / "train.jsonl", rest)
            write_jsonl(made / "held_out.jsonl", (known[key] for key in sorted(held)))
    return replace(
        given,
        policy=given.policy or str(left_by("sft", run_folder / "sft")),
        reward_model=learned,
        prompts=split / "train.jsonl",
        vocabulary=vocabulary,
    )


def train_trial(
    common: Common,
    how: Tune,
    settings: PPO,
    judge: "LearnedRewardModel",
    objective: "Objective",
    trial: "Trial",
    place: Path,
) -> "TrialCallback":
    """Train with a trial's settings as stage ppo does; leaves a log in its place, no weights."""
    import numpy as np
    from stable_baselines3.common.logger import Logger

    from agents import DoctorCallback
    from agents.language_model import Reference, load_named
    from agents.tuning import Measured, TrialCallback
    from agents.writing import write_episodes
    from reward_models import EachAnswer
    from text_env.prompts import load_prompts
    from text_env.vocabulary import load_tokenizer

    assert settings.policy and settings.prompts
    set_up(common)
    tokenizer = load_tokenizer(settings.policy)
    env = training_env(common, settings, tokenizer, settings.prompts, settings.vocabulary)
    model = ppo_model(common, settings, settings.policy, env)
    model.set_logger(Logger(str(place), [appending(place / "metrics.jsonl")]))
    reference = model.reference
    if reference is None:  # with kl_coef 0
        lm = load_named(settings.policy).to(model.device)
        reference = Reference(lm, model.policy).to(model.device)
    held_out = writing_env(
        common,
        Writing(**{part.name: getattr(settings, part.name) for part in fields(Writing)}),
        settings.policy,
        load_prompts(settings.prompts.with_name("held_out.jsonl")),
        EachAnswer(lambda prompts, completions, **_: judge.human_scale(prompts, completions)),
    )

    def measure(policy: "CausalLMPolicy") -> Measured:
        held_out.seed(common.seed)
        episodes = write_episodes(policy, held_out, reference)
        scores = np.array([episode["score"] for episode in episodes])
        error = scores.std(ddof=min(1, len(scores) - 1)) / math.sqrt(len(scores))
        ref_kl = np.mean([episode["ref_kl"] for episode in episodes])
        return Measured(float(scores.mean()), float(error), float(ref_kl))

    total = settings.total_timesteps
    watched = TrialCallback(trial, measure, objective, total, how.evaluations, common.seed)
    doctor = DoctorCallback(place / "doctor.jsonl", settings.stop_on)
    model.learn(total, callback=[doctor, watched])
    model.logger.close()
    return watched


def write_tuning(settings: Tune, folder: Path, study: "Study", objective: "Objective") -> None:
    """Write tune.md, tune.png, and the best settings so far, best.yaml, for stage ppo."""
    import yaml

    from agents import tuning_report
    from reward_models.atomic import atomic_file

    budget = f"{settings.ppo.total_timesteps} tokens each"
    write_text(folder / "tune.md", tuning_report.as_markdown(study, objective, budget))
    with atomic_file(folder / "tune.png") as file:
        tuning_report.picture(study).savefig(file, dpi=120, format="png")
    best = tuning_report.best_of(study)
    if best is not None:
        values = asdict(replace(settings.ppo, **best.params))
        plain = json.loads(json.dumps(values, default=str))
        said = f"# Trial {best.number} of {folder}: {', '.join(best.params)} were searched.\n"
        write_text(folder / "best.yaml", said + yaml.safe_dump(plain, sort_keys=False))


# -------------------------------------------------------------------- data, folders, models

SHARES = {
    "movies": {"language": 0.31, "reward_model": 0.32, "judge": 0.32, "test": 0.05},
    "chinese-reviews": {"language": 0.54, "reward_model": 0.22, "judge": 0.22, "test": 0.02},
}
"""How the texts are split; a model that starts from nothing needs more of the language."""
PROMPT_WORDS, PROMPT_CHARACTERS = 4, 4
"""Words of a sentence, characters of a Chinese review, that are given as a prompt."""
REFERENCE_TEXTS = 500
"""Texts, about, on which a reward model's scores are brought to mean 0 and SD 1."""
LEAST_WORDS, LEAST_CHARACTERS = 9, 12
"""Shorter texts make no prompt: too little would be left to write."""


def data(common: Common) -> Path:
    """Return the run's data folder; made, if need be, from what `common.data` names.

    It holds language.jsonl ({"text"}), reward_model.jsonl and judge.jsonl (ratings or labels),
    prompts.jsonl and test_prompts.jsonl ({"prompt"}), and source.json. The texts are split by a
    hash: none is in two parts. Training prompts are beginnings of the language part.
    """
    from reward_models import write_feedback
    from reward_models.atomic import atomic_folder
    from text_env import split_by_hash

    folder = folder_of(common) / "data"
    if not folder.exists():
        source, (records, whence, prompts_of) = common.data, SOURCES[common.data]
        say(f"What is not given comes from {whence}.")
        judged = records()
        parts = split_by_hash(judged, SHARES[source])
        test = prompts_of(parts["test"])
        with atomic_folder(folder) as made:
            write_jsonl(made / "language.jsonl", ({"text": text} for text in parts["language"]))
            for name in ("reward_model", "judge"):
                write_feedback(made / f"{name}.jsonl", (judged[text] for text in parts[name]))
            train = dict.fromkeys(prompts_of(parts["language"]))
            for prompt in test:
                train.pop(prompt, None)
            write_jsonl(made / "prompts.jsonl", ({"prompt": prompt} for prompt in train))
            write_jsonl(made / "test_prompts.jsonl", ({"prompt": prompt} for prompt in test))
            write_jsonl(made / "source.json", [{"source": source}])
        say(", ".join(f"{len(texts)} {name}" for name, texts in parts.items()) + " texts")
    return folder


def source_of(common: Common) -> str:
    """Return what the run's data folder was made from, or would be."""
    file = folder_of(common) / "data" / "source.json"
    return json.loads(file.read_text(encoding="utf-8"))["source"] if file.exists() else common.data


def movie_sentences() -> "dict[str, Feedback]":
    """Return the movie sentences and what people thought of each."""
    from reward_models.human_ratings import load_human_ratings

    rated = {tidy(item.text): item for item in load_human_ratings(("movies",))}
    return {text: replace(x.as_feedback(), completion=text) for text, x in rated.items()}


def chinese_reviews() -> "dict[str, Feedback]":
    """Return Chinese reviews and whether each is good."""
    from reward_models.chinese_reviews import load_chinese_reviews

    return {label.completion: label for label in load_chinese_reviews()}


def tidy(text: str) -> str:
    """Undo what the collection did to the sentences' quotes and dashes."""
    return re.sub(r"\s{2,}", " - ", text.replace("''", '"')).strip()


def first_words(texts: Sequence[str]) -> list[str]:
    """Return the distinct beginnings of the longer texts, in their order."""
    words = (text.split() for text in texts)
    return list(dict.fromkeys(" ".join(w[:PROMPT_WORDS]) for w in words if len(w) >= LEAST_WORDS))


def first_characters(texts: Sequence[str]) -> list[str]:
    """Return the distinct beginnings of the longer texts, in their order."""
    longer = (text for text in texts if len(text) >= LEAST_CHARACTERS)
    return list(dict.fromkeys(text[:PROMPT_CHARACTERS] for text in longer))


SOURCES: dict[str, tuple[Callable[[], "dict[str, Feedback]"], str, Callable[..., list[str]]]] = {
    "movies": (movie_sentences, "movie sentences rated by people", first_words),
    "chinese-reviews": (chinese_reviews, "Chinese reviews, good and bad", first_characters),
}
"""By name: the records by text, what to call them, and how prompts are made of texts."""


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def folder_of(common: Common) -> Path:
    """Return the run folder, which `main` has set."""
    assert common.run is not None
    return common.run


def left_by(stage_name: str, folder: Path) -> Path:
    """Return what an earlier stage left, or say which stage is missing."""
    if not folder.exists():
        raise FileNotFoundError(
            f"expected {folder}, which `python train.py {stage_name} --run {folder.parent}` makes; "
            "run that stage first, or name another input (see --help)"
        )
    return folder


@contextmanager
def stage(common: Common, name: str, go_on: bool = False) -> Iterator[tuple[dict[str, Any], Path]]:
    """Announce a stage, put its results in place when it ends well, and write down its facts.

    Until then they are in `<name>.unfinished`, which is what a failed stage leaves behind, and
    what one that goes on (`go_on`) begins with.

    Yields:
        A dict for facts, which goes to stages/<name>.json with the seconds that the stage took,
        and the folder to work in.
    """
    from reward_models.atomic import atomic_file

    if process_number() > 0:  # the first process does the bookkeeping
        set_up(common)
        yield {}, folder_of(common) / f"{name}.unfinished"
        return
    run_folder, unfinished = folder_of(common), folder_of(common) / f"{name}.unfinished"
    if not go_on:
        if any(unfinished.glob("checkpoints/step-*")) and not common.overwrite:
            raise FileExistsError(
                f"{unfinished} has checkpoints of a training that was stopped: go on with it by "
                f"`python train.py {name} --resume {run_folder}`, or pass --overwrite true"
            )
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    set_up(common)
    say(f"== {name}")
    start = time.time()
    facts: dict[str, Any] = {}
    try:
        yield facts, unfinished
        for made in MAKES[name]:
            if (unfinished / made).exists():
                put_in_place(unfinished / made, run_folder / made)
    finally:
        if not any(unfinished.iterdir()):
            unfinished.rmdir()
    facts["seconds"] = round(time.time() - start, 1)
    facts["peak_memory_gib"] = round(peak_memory() / 2**30, 2)
    (run_folder / "stages").mkdir(exist_ok=True)
    with atomic_file(run_folder / "stages" / f"{name}.json") as file:
        file.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    say(f"   {facts['seconds']:.0f} s, at most {facts['peak_memory_gib']:.1f} GiB so far")


def is_done(common: Common, name: str) -> bool:
    """Return whether a stage came to its end: its facts are written last."""
    return (folder_of(common) / "stages" / f"{name}.json").exists()


MAKES = {
    "sft": ("sft",),
    "reward": ("reward_model", "judge", "calibration.png"),
    "ppo": (
        "policy",
        "metrics.jsonl",
        "samples.jsonl",
        "doctor.jsonl",
        "tensorboard",
        "checkpoints",
    ),
    "evaluate": ("evaluation.json", "report.md", "curves.png"),
}
"""What each stage leaves in the run folder."""


def require_files(settings: Run) -> None:
    """Raise FileNotFoundError if a file that some stage is told to read is not there."""
    for part in fields(settings):
        for name, value in vars(getattr(settings, part.name)).items():
            if isinstance(value, Path) and not value.exists():
                raise FileNotFoundError(f"{part.name}.{name}: expected a file, got '{value}'")


def refuse_to_replace(common: Common, name: str) -> None:
    """Raise FileExistsError if a stage, or one of a whole run, would replace results."""
    names = list(MAKES) if name == "run" else [name]
    paths = [folder_of(common) / made for stage in names for made in MAKES.get(stage, ())]
    there = [str(path) for path in paths if path.exists()]
    if there and not common.overwrite:
        stages = list(MAKES) if name == "run" else list(MAKES)[list(MAKES).index(name) :]
        missing = [
            stage_name
            for stage_name in stages
            if not any((folder_of(common) / part).exists() for part in MAKES[stage_name])
        ]
        go_on = f"python train.py {missing[0]} --run {folder_of(common)}" if missing else ""
        if name == "ppo" and (folder_of(common) / "checkpoints").exists():
            more = f"ppo --resume {folder_of(common)} --total_timesteps MORE"
            go_on = " or ".join(["python train.py " + more, *([go_on] if missing else [])])
        raise FileExistsError(
            f"{', '.join(there)} exist already: choose another --run folder, or pass "
            "--overwrite true" + (f"; the run could go on with: {go_on}" if go_on else "")
        )


def put_in_place(new: Path, place: Path) -> None:
    """Move a file or folder to its place; what was there goes only then."""
    old = new.with_name(new.name + ".replaced")
    if place.exists():
        place.rename(old)
    new.rename(place)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def set_up(common: Common) -> None:
    """Seed everything, and set threads, before a stage computes."""
    import torch as th
    import transformers
    from stable_baselines3.common.utils import set_random_seed

    give_back_memory()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if common.threads is not None:
        th.set_num_threads(common.threads)
    set_random_seed(common.seed)


def give_back_memory() -> None:
    """Free what is used no more: models hang in cycles, and glibc keeps what they leave."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_memory() -> int:
    """Return the process's peak resident memory, bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def named_model(name: str) -> str:
    """Return the folder of an asset by its short name; any other name is a folder or hub id."""
    from reward_models import assets

    known = {"smollm2": assets.smollm2, "minilm": assets.minilm}
    return str(known[name]()) if name in known else name


def device_of(common: Common) -> "th.device":
    """Return the torch device."""
    from stable_baselines3.common.utils import get_device

    return get_device(common.device)


def dtype_of(common: Common) -> str:
    """Return the dtype to compute the LM in: bfloat16 where the hardware has it."""
    import torch as th

    if common.dtype != "auto":
        return common.dtype
    device = device_of(common)
    if device.type == "cuda":
        native = th.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = th.cpu.get_capabilities() if device.type == "cpu" else {}
        native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bfloat16" if native else "float32"


def say(text: str) -> None:
    """Print a line at once; the first process speaks for all."""
    if process_number() == 0:
        print(text, flush=True)


TORCHRUN = "TORCHELASTIC_RUN_ID"
"""The variable by which torchrun makes itself known."""


def process_number() -> int:
    """Return which of the processes that torchrun started this is; 0 without it."""
    return int(os.environ["RANK"]) if {"RANK", TORCHRUN} <= os.environ.keys() else 0


def on_first_process(function: Callable[..., int | None], *arguments: Any) -> int | None:
    """Do a stage on the first process alone, which must not look for the others meanwhile."""
    if process_number() > 0:
        return None
    if TORCHRUN not in os.environ:
        return function(*arguments)
    import torch as th

    threads = th.get_num_threads()
    th.set_num_threads(os.cpu_count() or threads)  # torchrun gives one; the others only wait now
    names = [TORCHRUN, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    names += ["MASTER_ADDR", "MASTER_PORT"]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        return function(*arguments)
    finally:
        os.environ.update(hidden)
        th.set_num_threads(threads)


# ----------------------------------------------------------------- what the stages look at


def agreement(report: dict[str, Any]) -> str:
    """Say in one line how well a fitted model agrees with held-out feedback."""
    parts = []
    for kind in ("ratings", "comparisons", "labels"):
        found = (report["held_out"] or {}).get(kind)
        if found is not None and kind == "ratings":
            parts.append(
                f"r = {found['pearson']:.3f}, pairwise accuracy {found['pairwise_accuracy']:.3f} "
                f"on {found['n']} held-out texts"
            )
        elif found is not None:
            n = found["decided"]
            parts.append(f"accuracy {found['accuracy']:.3f} on {n} held-out {kind}")
    members = report.get("members") or [report]
    seconds = sum(member["seconds"] for member in members)
    return "; ".join(parts) + f" ({members[0]['records']} records, {seconds:.0f} s)"


PEOPLE = "one half of the people with the other: r = {split_half:.2f}; a lexicon: r = {lexicon:.2f}"


def human_agreement() -> dict[str, float]:
    """Return what frames the models' r: people against people, and a plain lexicon."""
    from reward_models import LexiconSentiment
    from reward_models.assets import sentiment_lexicon
    from reward_models.evaluation import pearson
    from reward_models.human_ratings import load_human_ratings, split_half_correlation

    rated = load_human_ratings(("movies",))
    texts = [item.text for item in rated]
    scores = LexiconSentiment(sentiment_lexicon())(prompts=[""] * len(texts), completions=texts)
    return {
        "split_half": split_half_correlation(rated, repeats=3),
        "lexicon": pearson(scores, [item.mean for item in rated]),
    }


def tokens_of(vocabulary: Path | None, tokenizer: "PreTrainedTokenizerBase") -> list[int] | None:
    """Return the ids of the tokens that occur in the texts of a file; None without one: all."""
    from text_env.prompts import load_examples, parts_of

    if vocabulary is None:
        return None
    parts = [part for example in load_examples(vocabulary) for part in parts_of(example)]
    return sorted({token for ids in tokenizer(parts)["input_ids"] for token in ids})


def warm_up_and_decay(rate: float, progress: float) -> float:
    """Return the learning rate when `progress` (1 to 0) remains: up over a sixth, down to a tenth.

    SB3 asks after a rollout, so a rate that ended at 0 would waste the last update.
    """
    return rate * min(5 * (1 - progress), 0.1 + 0.9 * progress)


def judged_rollouts(judge: "LearnedRewardModel") -> "BaseCallback":
    """Return a callback that logs the judge's mean of a few episodes of each rollout."""
    from stable_baselines3.common.callbacks import BaseCallback

    from reward_models.conversations import answers_of

    class JudgedRollouts(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            episodes = getattr(self.model, "finished_episodes", [])
            if episodes:
                some = episodes[:: max(1, len(episodes) // 64)]
                answers = answers_of(some)
                ratings = judge.human_scale(answers.prompts, answers.completions)
                self.logger.record("rollout/judge_mean", float(ratings.mean()))

    return JudgedRollouts()


WARM_START, POLICY, GREEDY = "warm start", "policy", "warm start, greedy"


WritingT = TypeVar("WritingT", bound=Writing)


def as_in_ppo(folder: Path, settings: WritingT) -> WritingT:
    """Fill in how the policy of a run was trained to write, where the settings leave it open."""
    file = folder / "stages" / "ppo.json"
    trained = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    written = trained.get("writing", {})
    if isinstance(settings, Evaluate) and settings.reward is None:
        settings = replace(settings, reward=trained.get("reward"))
    fallback = {"max_new_tokens": 48, "min_new_tokens": 0, "temperature": 1.0, "vocabulary": None}
    given = {key: getattr(settings, key) for key in fallback}
    chosen = {key: value for key, value in given.items() if value is not None}
    filled = {**fallback, **written, **chosen}
    if filled["vocabulary"] is not None:
        filled["vocabulary"] = Path(filled["vocabulary"])
    return replace(settings, **filled)


def write_all(
    common: Common,
    settings: Evaluate,
    reference: str,
    policy: str,
    rewarder: Callable[..., Any],
    prompts: list[dict[str, Any]],
) -> dict[str, Episodes]:
    """Let policy, warm start and baselines each continue every prompt once.

    Returns:
        By writer, an episode per prompt: the environment's final info and `ref_kl`.
    """
    import numpy as np

    from agents.language_model import Reference
    from agents.writing import write_episodes

    env = writing_env(common, settings, policy, prompts, rewarder)

    def write(
        model: "CausalLMPolicy", reference: Reference | None, greedy: bool = False
    ) -> Episodes:
        bar.update()
        give_back_memory()  # an earlier writer's
        env.seed(common.seed)  # begins the prompts' order anew
        return write_episodes(model, env, reference, deterministic=greedy)

    warm_start = writer(common, settings, env, reference)
    frozen = Reference(warm_start.lm, warm_start)
    bar = progress(2 + settings.best_of, "writing")
    samples = [write(warm_start, None) for _ in range(settings.best_of)]
    groups = {
        WARM_START: [{**e, "ref_kl": 0.0} for e in samples[0]],
        POLICY: write(writer(common, settings, env, policy), frozen),
        GREEDY: write(warm_start, frozen, greedy=True),
    }
    if settings.best_of > 1:
        best = [max(row, key=lambda e: e["score"]) for row in zip(*samples, strict=True)]
        # The KL of best-of-n is at most log n - (n - 1)/n (Beirami et al. 2024), whatever the text.
        bound = float(np.log(settings.best_of) - (settings.best_of - 1) / settings.best_of)
        groups[f"best of {settings.best_of}"] = [{**e, "ref_kl": bound} for e in best]
    bar.close()
    return groups


def writing_env(
    common: Common, settings: Writing, lm: str, prompts: list[dict[str, Any]], reward_fn: Any
) -> "TextVecEnv":
    """Return an environment of one episode per prompt; settings are filled in (`as_in_ppo`)."""
    from text_env import TextVecEnv
    from text_env.vocabulary import load_tokenizer

    tokenizer = load_tokenizer(lm)
    return TextVecEnv(
        num_envs=len(prompts),
        autoreset=False,
        tokenizer=tokenizer,
        prompts=prompts,
        shuffle=False,
        reward_fn=reward_fn,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        allowed_token_ids=tokens_of(settings.vocabulary, tokenizer),
    )


def writer(
    common: Common, settings: Writing, env: "TextVecEnv", lm: "str | PreTrainedModel"
) -> "CausalLMPolicy":
    """Return a language model that writes in such an environment and learns nothing."""
    import numpy as np

    from agents import CausalLMPolicy

    assert settings.temperature is not None
    policy = CausalLMPolicy(
        env.observation_space,
        env.action_space,
        lambda _: 0.0,
        lm=lm,
        temperature=settings.temperature,
        trainable_layers=0,
        dtype=dtype_of(common),
    ).to(device_of(common))
    policy.allowed_tokens.copy_(policy.allowed_tokens.new_tensor(np.array(env.allowed_tokens)))
    return policy


def samples_of(
    common: Common, settings: Writing, lm: str, prompts: list[dict[str, Any]], n: int
) -> dict[str, list[str]]:
    """Let a policy continue every prompt n times; return its completions by prompt."""
    from agents.writing import write_episodes

    give_back_memory()
    env = writing_env(
        common, settings, lm, prompts, lambda prompts, completions, **_: [0.0] * len(completions)
    )
    model = writer(common, settings, env, lm)
    bar = progress(n, f"sampling {Path(lm).name}")
    written: dict[str, list[str]] = {}
    for _ in range(n):
        env.seed(common.seed)
        for episode in write_episodes(model, env):
            written.setdefault(episode["prompt"], []).append(episode["completion"])
        bar.update()
    bar.close()
    return written


def progress(total: int | None, what: str) -> Any:
    """Return a progress bar; without a total, a counter."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, leave=False)


# --------------------------------------------------------------------------------- report


def summary(facts: dict[str, Any]) -> str:
    """Say what improved, and by how much."""
    before, after = facts["measures"][WARM_START], facts["measures"][POLICY]
    key = "judge" if "judge" in after else "score"
    gain, low, high = facts["gain"][key]
    kept = after["distinct-2"][0] / max(before["distinct-2"][0], 1e-9)
    scale = facts.get("judge_scale") if key == "judge" else None
    unit = f" ({scale[0]:g} to {scale[1]:+g})" if scale else ""
    return (
        f"{key}{unit}: {before[key][0]:+.2f} -> {after[key][0]:+.2f}, "
        f"a gain of {gain:+.2f} [{low:+.2f}, {high:+.2f}] "
        f"at {after['ref_kl'][0]:.1f} nats per completion; "
        f"distinct-2 at {kept:.2f} of the warm start's"
    )


SHOWN = ("prompt", "completion", "finish_reason", "ref_kl")
"""What evaluation.json has of an episode, beside its scores and a conversation's messages."""


def write_report(
    folder: Path,
    made: Path,
    facts: dict[str, Any],
    groups: dict[str, Episodes],
    scores: dict[str, dict[str, "np.ndarray"]],
    settings: Evaluate,
) -> None:
    """Write evaluation.json, curves.png and report.md."""
    from agents.curves import training_curves
    from agents.findings import as_markdown
    from reward_models.atomic import atomic_file
    from reward_models.conversations import readable
    from reward_models.measures import measures_table, samples_table

    rows = [json.loads(line) for line in read_lines(folder / "metrics.jsonl")]
    if rows:
        with atomic_file(made / "curves.png") as file:
            training_curves(rows).savefig(file, dpi=120, format="png")
    with atomic_file(made / "evaluation.json") as file:
        episodes = {
            name: [
                {k: e[k] for k in (*SHOWN, "messages") if k in e}
                | {k: float(v[i]) for k, v in scores[name].items()}
                for i, e in enumerate(group)
            ]
            for name, group in groups.items()
        }
        text = json.dumps({**facts, "episodes": episodes}, indent=1, ensure_ascii=False)
        file.write_text(text, encoding="utf-8")
    doctor_section = []
    if (folder / "doctor.jsonl").exists():
        findings = [json.loads(line) for line in read_lines(folder / "doctor.jsonl")]
        doctor_section = ["## What the doctor found", as_markdown(findings, rows)]
    shown = {name: [readable(e) for e in groups[name]] for name in (WARM_START, POLICY)}
    key = "judge" if "judge" in scores[POLICY] else "score"
    parts = [
        "# What the run did",
        summary(facts) + ".",
        f"{len(groups[POLICY])} test prompts, each continued once by every writer; 95 % intervals "
        "in brackets. " + notes(facts, groups),
        measures_table(facts["measures"]),
        "![curves](curves.png)" if rows else "",
        *doctor_section,
        people_section(folder),
        "## Samples",
        samples_table(shown, {name: scores[name][key] for name in shown}, key, settings.n_samples),
        "## Stages",
        stages_table(folder),
    ]
    with atomic_file(made / "report.md") as file:
        file.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def people_section(folder: Path) -> str:
    """Say how the reward model agrees with each annotator and source, as Markdown.

    "" where there is one of each at most, and no picture of its calibration.
    """
    from reward_models.tables import groups_table

    file = folder / "stages" / "reward.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    held_out = facts.get("reward_model", {}).get("held_out") or {}
    drawn = (folder / "calibration.png").exists()
    parts = [
        groups_table(held_out.get("annotators", {}), "annotator"),
        groups_table(held_out.get("origins", {}), "source"),
        "![calibration](calibration.png)" if drawn else "",
    ]
    return "\n\n".join(["## The reward model and people"] * any(parts) + [p for p in parts if p])


def notes(facts: dict[str, Any], groups: Iterable[str]) -> str:
    """Say how to read the measures that there are."""
    parts = ["All scores are of prompt and completion together."]
    if facts["reward"] is not None:
        parts = [f"The score is made of {shown_terms(facts['reward'])}; terms are before weights."]
    if "judge_scale" in facts:
        scale = facts["judge_scale"]
        unit = f"on the human scale, {scale[0]:g} to {scale[1]:g}" if scale else "in logits"
        parts.append(f"The judge, {unit}, was never a reward.")
    parts.append("A greedy choice's KL is -log of the warm start's probability of the text.")
    if any(name.startswith("best of") for name in groups):
        parts.append("The KL of best-of-n is the bound log n - (n - 1)/n.")
    return " ".join(parts)


def shown_terms(terms: Terms) -> str:
    """Say which terms a reward has, with their weights and arguments."""
    shown = []
    for name, given in by_name(terms).items():
        arguments = dict(given) if isinstance(given, dict) else {"weight": given}
        weight = arguments.pop("weight", 1.0)
        further = ", ".join(f"{key} {value}" for key, value in arguments.items())
        shown.append(f"{weight:g} × {name}" + f" ({further})" * bool(further))
    return " + ".join(shown)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:  # str.splitlines would split within a line's texts
        return [line.rstrip("\n") for line in file]


def stages_table(folder: Path) -> str:
    """Say what each stage took and found, as Markdown."""
    lines = ["| stage | seconds | peak memory so far (GiB) | found |", "|---|---|---|---|"]
    for name in ("sft", "reward", "ppo"):
        file = folder / "stages" / f"{name}.json"
        if file.exists():
            facts = json.loads(file.read_text(encoding="utf-8"))
            cells = [name, f"{facts['seconds']:.0f}", f"{facts['peak_memory_gib']:.1f}"]
            lines.append("| " + " | ".join([*cells, "; ".join(found_by(facts))]) + " |")
    return "\n".join(lines)


def found_by(facts: dict[str, Any]) -> list[str]:
    """Say in a few words what a stage wrote down."""
    found = []
    if "sft" in facts:
        losses = "{loss_before:.2f} to {loss_after:.2f}".format(**facts["sft"])
        found.append(f"held-out loss {losses} nats per token")
    found += [f"{m}: {agreement(facts[m])}" for m in ("reward_model", "judge") if m in facts]
    if "people" in facts:
        found.append(PEOPLE.format(**facts["people"]))
    if "tokens" in facts:
        found.append(f"{facts['tokens']} tokens, {facts['episodes']} episodes")
    return found


def write_loop_report(folder: Path, rounds: int) -> None:
    """Write loop.md and loop.png: what each round asked for, and what came of it."""
    from reward_models.measures import with_interval
    from reward_models.plots import plot_rounds

    facts = []
    for number in range(1, rounds + 1):
        here = folder / f"round-{number}"
        found = {
            name: json.loads((here / "stages" / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("reward", "evaluate")
        }
        measured = found["evaluate"]["measures"]
        report = found["reward"]["reward_model"]["held_out"]["comparisons"]
        facts.append(
            {
                "answers": len(read_lines(here / "feedback.jsonl")),
                "accuracy": report["accuracy"],
                "before": measured[WARM_START],
                "after": measured[POLICY],
            }
        )
    names = {"judge": "judge", "ref_kl": "KL to the first, nats", "distinct-2": "distinct-2"}
    lines = [
        "# Round after round",
        "",
        "| round | answers so far | reward model, held-out accuracy | "
        + " | ".join(names.values())
        + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for number, row in enumerate([{"answers": 0, "after": facts[0]["before"]}, *facts]):
        cells = [str(number), str(row["answers"])]
        cells.append(f"{row['accuracy']:.2f}" if "accuracy" in row else "")
        cells += [with_interval(row["after"][name]) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Brackets are 95 % intervals over the test prompts.", "", "![judge](loop.png)"]
    write_text(folder / "loop.md", "\n".join(lines) + "\n")
    judged = [facts[0]["before"]["judge"], *(row["after"]["judge"] for row in facts)]
    plot_rounds([0, *(row["answers"] for row in facts)], judged, folder / "loop.png")


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    from reward_models.atomic import atomic_file

    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------- model card


def card_of(
    common: Common,
    settings: PPO,
    policy: str,
    model: "TokenPPO",
    env: "TextVecEnv",
) -> dict[str, Any]:
    """Return what the trained policy's model card says, but for what `evaluate` measures."""
    folder = folder_of(common)
    own = {
        "movies": "beginnings of movie sentences",
        "chinese-reviews": "beginnings of Chinese reviews",
    }
    source = own[source_of(common)] if settings.prompts is None else settings.prompts.name
    learned = str(settings.reward_model or folder / "reward_model")
    beta = f"{settings.kl_coef:g} score units per nat"
    if settings.target_ref_kl is not None:
        beta += f", adapted to {settings.target_ref_kl:g} nats: {model.kl.coef:.3g} at the end"
    prompt, encodes = env.task.prompts[0], model.policy.lm.config.is_encoder_decoder
    training = {
        "from": f"`{base_of(policy)}`",
        "prompts": f"{len(env.task.prompts)}, {source}",
        "reward": shown_terms(settings.reward),
        "tokens written": str(model.num_timesteps),
        "KL penalty, β": beta,
        "learning rate": f"{settings.learning_rate:g}",
        "passes over each rollout": str(settings.n_epochs),
        "layers that learned": str(settings.trainable_layers or "all"),
    }
    if "learned" in by_name(settings.reward):
        training["reward model"] = f"made from `{base_of(learned)}`"
    if settings.lora_rank is not None:
        merged = "merged in" if settings.merge_lora else "kept apart"
        training["adapters"] = f"rank {settings.lora_rank}, {merged}"
    for name in ("sft", "reward"):
        file = folder / "stages" / f"{name}.json"
        if file.exists():
            found = found_by(json.loads(file.read_text(encoding="utf-8")))
            training[{"sft": "warm start", "reward": "feedback"}[name]] = "; ".join(found)
    return {
        "base_model": base_of(policy),
        "is_adapters": settings.lora_rank is not None and not settings.merge_lora,
        "training": training,
        "is_encoder_decoder": encodes,
        "example": prompt.text if encodes or prompt.messages is None else prompt.messages,
        "sampling": {
            "do_sample": True,
            "temperature": settings.temperature,
            "min_new_tokens": settings.min_new_tokens,
            "max_new_tokens": settings.max_new_tokens,
        },
    }


RESTRICTED = (
    "It was trained with {} tokens allowed; `generate` knows nothing of it, and may write others."
)
"""A limit of a policy with a vocabulary of its own."""


def base_of(lm: str) -> str:
    """Return the hub id of what a model was made from; if that is unknown, its folder's name."""
    from huggingface_hub import ModelCard

    folder = Path(lm)
    if not folder.is_dir():
        return folder.stem if folder.suffix == ".json" else HUB_IDS.get(lm, lm)
    made_by = {"sft": "sft", "reward_model": "reward"}.get(folder.name)
    facts, card = folder.parent / "stages" / f"{made_by}.json", folder / "README.md"
    if facts.exists():
        made_from = json.loads(facts.read_text(encoding="utf-8")).get("model")
        if made_from == "sft":
            made_from = str(folder.parent / "sft")
        return base_of(made_from) if made_from else folder.name
    if card.exists() and (known := ModelCard.load(card).data.base_model):
        return known if isinstance(known, str) else known[0]
    return folder.name


HUB_IDS = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
"""Of the models that have a short name."""


def write_card(policy: Path, card: dict[str, Any], results: str = "") -> None:
    """Write a policy's model card into its folder."""
    from agents.model_card import model_card

    write_text(policy / "README.md", model_card(**card, results=results))


def complete_card(folder: Path, facts: dict[str, Any]) -> None:
    """Add to the model card of a run's policy what `evaluate` has measured."""
    from reward_models.measures import measures_table

    stage_facts = folder / "stages" / "ppo.json"
    known = json.loads(stage_facts.read_text(encoding="utf-8")) if stage_facts.exists() else {}
    if "card" not in known:
        return
    parts = [
        f"{summary(facts)}.",
        "On test prompts, 95 % intervals in brackets. " + notes(facts, facts["measures"]),
        measures_table(facts["measures"]),
    ]
    if (folder / "curves.png").exists():
        shutil.copyfile(folder / "curves.png", folder / "policy" / "curves.png")
        parts.append("![curves](curves.png)")
    write_card(folder / "policy", known["card"], "\n\n".join(parts))


# ------------------------------------------------------------------------------------ CLI

STAGES: dict[str, tuple[Callable[..., int | None], type]] = {
    "run": (run, Run),
    "sft": (sft, SFT),
    "reward": (reward, Reward),
    "ppo": (ppo, PPO),
    "evaluate": (evaluate, Evaluate),
    "check": (check, Check),
    "chat": (chat, Chat),
    "annotate": (annotate, Annotate),
    "feedback account": (make_account, SignIn),
    "feedback import": (import_answers, Import),
    "feedback export": (export_answers, Export),
    "feedback forget": (forget, Forget),
    "feedback worth": (worth, Worth),
    "compare": (compare, Compare),
    "loop": (loop, Loop),
    "tune": (tune, Tune),
}


def make_parser() -> "ArgumentParser":
    """Build the command line from the settings: one subcommand per stage."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="train.py", description=(__doc__ or "").split("\n\n")[0])
    subcommands = parser.add_subcommands(required=True, dest="stage")
    nested: dict[str, Any] = {}
    for name, (function, settings) in STAGES.items():
        command = ArgumentParser(description=function.__doc__)
        command.add_argument("--config", action="config", help="A YAML file of settings.")
        command.add_class_arguments(Common)
        command.add_class_arguments(settings, as_positional=True)
        group, _, action = name.rpartition(" ")
        if group and group not in nested:
            outer = ArgumentParser(description="Answers from elsewhere, and what becomes of them.")
            subcommands.add_subcommand(group, outer, help=outer.description)
            nested[group] = outer.add_subcommands(required=True, dest="action")
        nested.get(group, subcommands).add_subcommand(action, command, help=function.__doc__)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do a stage; return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "run")
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    began = loop_begun(parsed)
    if began is not None:  # what is not asked for otherwise is as it was
        parsed = parser.parse_args([arguments[0], "--config", str(began), *arguments[1:]])
    name, chosen = parsed.stage, parsed[parsed.stage]
    parts = parser.instantiate(parsed)[name]
    if name == "feedback":
        name, parts = f"{name} {chosen.action}", parts[chosen.action]
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read by GNU's OpenMP when torch is imported: threads wait for the next of many small
        # pieces of work awake, but only for microseconds, as longer would starve their neighbours.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    function, settings_type = STAGES[name]
    common = Common(**{f.name: parts[f.name] for f in fields(Common)})
    settings = settings_type(**{f.name: parts[f.name] for f in fields(settings_type)})
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("reward_models").setLevel(logging.INFO)
    try:
        resumes = isinstance(settings, PPO) and settings.resume is not None
        if resumes:
            common.run = resumed_run(common, settings)
            asked = parser.parse_args(arguments, defaults=False)[name]
            settings = as_begun(common, settings, asked)
        elif isinstance(settings, Run) and settings.ppo.resume is not None:
            raise ValueError("expected resume with the stage ppo, got it with run")
        if process_number() == 0 and name not in ("check", "chat"):
            common.run = run_folder(common, name)
            if not resumes:
                refuse_to_replace(common, name)
        with held(common, name):
            if began is not None:
                refuse_other_settings(began, chosen)
            if name in ("run", "loop"):
                file = "config.yaml" if name == "run" else "config-loop.yaml"
                save_config(common, file, chosen)
            if name in ("run", "ppo"):
                code = function(common, settings)
            else:
                code = on_first_process(function, common, settings)
            if name in MAKES and not resumes:
                save_config(common, f"config-{name}.yaml", chosen)
    except KeyboardInterrupt:
        say("train.py: interrupted; what earlier stages left is in place")
        return 130
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if os.environ.get("RLHF_GYM_DEBUG"):
            raise
        message = " ".join(str(error).split())
        which = f" in process {process_number()}" if TORCHRUN in os.environ else ""
        print(f"train.py {name}: error{which}: {message}", file=sys.stderr)
        print("(RLHF_GYM_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    except Exception as error:
        signum = getattr(error, "signum", None)  # StoppedBySignal, which is not imported here
        if signum is None:
            raise
        go_on = f"loop --run {common.run}" if name == "loop" else f"ppo --resume {common.run}"
        say(f"train.py {name}: {error}: python train.py {go_on}")
        return 128 + int(signum)
    return code or 0


def resumed_run(common: Common, settings: PPO) -> Path:
    """Return the run folder to go on with, which `run` may name too."""
    assert settings.resume is not None
    if common.run not in (None, settings.resume):
        raise ValueError(f"expected one run folder, got --run {common.run} and {settings.resume}")
    return settings.resume


@contextmanager
def held(common: Common, name: str) -> Iterator[None]:
    """Hold the run folder for this process, in stages that leave something in it."""
    if process_number() > 0 or name not in (*MAKES, "run", "loop"):
        yield
        return
    from agents.checkpoint_store import one_process

    with one_process(folder_of(common)):
        yield


def run_folder(common: Common, name: str) -> Path:
    """Return the run folder, made new for `run` and needed by hand for a single stage."""
    if common.run is None and name != "run":
        raise ValueError(f"expected --run FOLDER, the run that {name} belongs to, got none")
    folder = common.run or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_config(common: Common, name: str, chosen: "Namespace") -> None:
    """Write what was asked for beside the results, in the form that --config reads."""
    import yaml

    from reward_models.atomic import atomic_file

    if process_number() > 0:
        return
    with atomic_file(folder_of(common) / name) as aside:
        aside.write_text(yaml.safe_dump(as_plain(chosen), sort_keys=False), encoding="utf-8")


def as_plain(chosen: "Namespace") -> dict[str, Any]:
    """Return what was asked for as JSON knows it, but for the place."""
    values = chosen.clone().as_dict()
    values.pop("config", None)
    values |= {"run": None, "overwrite": False}
    return json.loads(json.dumps(values, default=str))


FREE_IN_LOOP = (
    *("rounds", "overlap_annotators", "threads", "device"),
    *("ppo.save_every", "ppo.checkpoint_every", "ppo.checkpoint_keep"),
)
"""Settings that may be others when a loop goes on."""
SAMPLED_WITH = (*(f"ppo.{f.name}" for f in fields(Writing)), "ppo.policy", "ppo.prompts")
"""Settings of PPO that a loop asks with, too."""
MADE_WITH = {
    "sft": ("sft",),
    "judge": ("judge",),
    "reward": ("round-*/stages/reward.json",),
    "ppo": ("round-*/stages/ppo.json", "round-*/ppo.unfinished/checkpoints/step-*"),
    "evaluate": ("round-*/stages/evaluate.json",),
}
"""What a loop has when settings of these parts have been used; of the others, any of `ASKED`."""
ASKED = ("sft", "judge", "round-*/asked.json")


def loop_begun(parsed: "Namespace") -> Path | None:
    """Return the settings that a loop began with, if it is to go on with one."""
    run = parsed[parsed.stage].run if parsed.stage == "loop" else None
    return (
        None if run is None or not (run / "config-loop.yaml").exists() else run / "config-loop.yaml"
    )


def refuse_other_settings(began: Path, chosen: "Namespace") -> None:
    """Raise ValueError if a loop is asked to go on with settings that it did not begin with.

    Those of a part that has not been done yet may be mended.
    """
    import yaml

    def is_used(name: str) -> bool:
        marks = MADE_WITH.get(name.split(".")[0], ASKED)
        marks += ASKED[2:] if name in SAMPLED_WITH else ()
        return any(any(began.parent.glob(mark)) for mark in marks)

    was = by_dotted_name(yaml.safe_load(began.read_text(encoding="utf-8")))
    now = by_dotted_name(as_plain(chosen))
    other = [
        f"{name} is {was[name]}, not {now[name]}"
        for name in now
        if name in was and now[name] != was[name] and name not in FREE_IN_LOOP and is_used(name)
    ]
    if other:
        raise ValueError(
            f"expected the settings that this loop began with, where {', '.join(other)}: leave "
            "them out to go on with it, or begin another in a folder of its own (--run)"
        )


def by_dotted_name(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested settings as one level: {"ppo": {"n_envs": 8}} is {"ppo.n_envs": 8}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        part = isinstance(value, dict)
        flat |= by_dotted_name(value, f"{before}{name}.") if part else {before + name: value}
    return flat


if __name__ == "__main__":
    code = main()
    if TORCHRUN in os.environ:
        from agents import ranks

        ranks.leave(code)
    sys.exit(code)
