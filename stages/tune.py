"""The search for better settings of PPO."""

import json
import math
import random
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.settings import PPO, Common, Tune, Writing
from stages.data import data
from stages.models import digest_of
from stages.ppo import ppo_model, training_env
from stages.process import device_of, say, set_up
from stages.resume import appending
from stages.rewards import by_name, digest_of_reward
from stages.run_folder import folder_of, left_by, write_jsonl, write_text
from stages.writing import writing_env

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

    from agents import CausalLMPolicy
    from agents.tuning import Objective, TrialCallback
    from reward_models import LearnedRewardModel


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
        say(f"== trial {trial.number}")
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
    "policy", "reference", "reward_model", "reward", "prompts", "user_fn", "max_turns",
    "max_user_tokens", "vocabulary", "resume", "stop_on", "shard", "save_every",
    "checkpoint_every", "checkpoint_keep", "merge_lora",
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
    model.learn(total, callback=[doctor, watched], progress_bar=True)
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
