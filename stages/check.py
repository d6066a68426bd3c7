"""Would a run with this model and this reward work? Looked at in a minute."""

import json
import textwrap
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from configs.settings import Check, Common
from stages.models import named_model
from stages.process import say, set_up
from stages.rewards import reward_function
from stages.run_folder import folder_of, left_by, write_text
from stages.writing import Episodes, policy_in, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agents import CausalLMPolicy
    from agents.checks import Verdict
    from text_env import TextVecEnv
    from text_env.task import TextTask


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
    policy = policy_in(
        common,
        env,
        lm,
        settings.temperature,
        trainable_layers=settings.trainable_layers,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
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


def in_columns(level: str, name: str, said: str) -> str:
    """Lay out a verdict: level, name, and the sentence in lines of its own column."""
    lines = textwrap.wrap(said, 72) or [""]
    return "\n".join([f"{level:<5}  {name:<18} {lines[0]}", *(" " * 26 + x for x in lines[1:])])
