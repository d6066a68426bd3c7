"""Completions of a policy as it was trained to write, for evaluation and for people."""

import json
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from configs.settings import PPO, Common, Evaluate, Writing
from stages.process import (
    device_of,
    dtype_of,
    give_back_memory,
    look_here_for_modules,
    progress,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agents import CausalLMPolicy
    from reward_models.feedback import Chat
    from text_env import TextVecEnv


Episodes = list[dict[str, Any]]


def tokens_of(vocabulary: Path | None, tokenizer: "PreTrainedTokenizerBase") -> list[int] | None:
    """Return the ids of the tokens that occur in the texts of a file; None without one: all."""
    from text_env.prompts import load_examples, parts_of

    if vocabulary is None:
        return None
    parts = [part for example in load_examples(vocabulary) for part in parts_of(example)]
    return sorted({token for ids in tokenizer(parts)["input_ids"] for token in ids})


WritingT = TypeVar("WritingT", bound=Writing)


def as_in_ppo(folder: Path, settings: WritingT) -> WritingT:
    """Fill in how the policy of a run was trained to write, where the settings leave it open."""
    file = folder / "stages" / "ppo.json"
    trained = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    written = trained.get("writing", {})
    if isinstance(settings, Evaluate) and settings.reward is None:
        settings = replace(settings, reward=trained.get("reward"))
    fallback = {"max_new_tokens": 48, "min_new_tokens": 0, "temperature": 1.0}
    given = {part.name: getattr(settings, part.name) for part in fields(Writing)}
    chosen = {key: value for key, value in given.items() if value is not None}
    filled = {**fallback, **written, **chosen}
    if filled.get("vocabulary") is not None:
        filled["vocabulary"] = Path(filled["vocabulary"])
    return replace(settings, **filled)


def some_prompts(prompts: list[dict[str, Any]], n: int, seed: int) -> list[dict[str, Any]]:
    """Draw n of the prompts, all of them if there are fewer."""
    return random.Random(seed).sample(prompts, min(n, len(prompts)))


def written_with(settings: PPO | Writing, vocabulary: Path | None) -> dict[str, Any]:
    """Return how a policy writes as the run's facts keep it, for `as_in_ppo`."""
    how = {part.name: getattr(settings, part.name) for part in fields(Writing)}
    return how | {"vocabulary": str(vocabulary) if vocabulary else None}


def prompts_of(run: Path, stage_name: str) -> Path | None:
    """Return the file of prompts that a run's stage was given; None if it was given none."""
    file = run / "stages" / f"{stage_name}.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return None if facts.get("prompts") is None else Path(facts["prompts"])


def user_of(settings: PPO | Writing) -> dict[str, Any]:
    """Return what an environment is told of the user who speaks in chats of several turns."""
    if settings.user_fn is not None:
        look_here_for_modules()
    return {name: getattr(settings, name) for name in ("user_fn", "max_turns", "max_user_tokens")}


def writing_env(
    common: Common, settings: Writing, lm: str, prompts: list[dict[str, Any]], reward_fn: Any
) -> "TextVecEnv":
    """Return an environment of one episode per prompt; settings are filled in (`as_in_ppo`)."""
    from text_env import TextVecEnv
    from text_env.vocabulary import load_tokenizer

    tokenizer = load_tokenizer(lm)
    user = {} if "turns" in prompts[0] else user_of(settings)  # with turns, the data is the user
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
        **user,
    )


def writer(
    common: Common, settings: Writing, env: "TextVecEnv", lm: "str | PreTrainedModel"
) -> "CausalLMPolicy":
    """Return a language model that writes in such an environment and learns nothing."""
    assert settings.temperature is not None
    return policy_in(common, env, lm, settings.temperature, trainable_layers=0)


def policy_in(
    common: Common,
    env: "TextVecEnv",
    lm: "str | PreTrainedModel",
    temperature: float,
    **settings: Any,
) -> "CausalLMPolicy":
    """Return a policy of an environment's tokens, the allowed ones, that no algorithm trains."""
    import numpy as np

    from agents import CausalLMPolicy

    policy = CausalLMPolicy(
        env.observation_space,
        env.action_space,
        lambda _: 0.0,
        lm=lm,
        temperature=temperature,
        dtype=dtype_of(common),
        **settings,
    ).to(device_of(common))
    policy.allowed_tokens.copy_(policy.allowed_tokens.new_tensor(np.array(env.allowed_tokens)))
    return policy


class Samples(NamedTuple):
    """What a policy has written.

    Attributes:
        episodes: The environment's final information on each.
        chats: The messages that they are made of, by `as_texts`, where they are chats.
    """

    episodes: Episodes
    chats: dict[tuple[str, str], "Chat"]

    @property
    def texts(self) -> dict[str, list[str]]:
        """Completions by prompt, as a reward model learns from them."""
        from reward_models.conversations import as_texts

        texts: dict[str, list[str]] = {}
        for prompt, completion in map(as_texts, self.episodes):
            texts.setdefault(prompt, []).append(completion)
        return texts


def samples_of(
    common: Common, settings: Writing, lm: str, prompts: list[dict[str, Any]], n: int
) -> Samples:
    """Let a policy continue every prompt n times."""
    from agents.writing import write_episodes
    from reward_models.feedback import chats_of

    give_back_memory()
    env = writing_env(
        common, settings, lm, prompts, lambda prompts, completions, **_: [0.0] * len(completions)
    )
    model = writer(common, settings, env, lm)
    bar = progress(n, f"sampling {Path(lm).name}")
    written = Samples([], {})
    for _ in range(n):
        env.seed(common.seed)
        episodes = write_episodes(model, env)  # one per prompt, in their order
        written.episodes.extend(episodes)
        found = chats_of(episodes, [prompt["prompt"] for prompt in prompts])
        written.chats.update(found | written.chats)  # what came first stays
        bar.update()
    bar.close()
    return written
