"""Completions of a policy as it was trained to write, for evaluation and for people."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from configs.settings import Common, Evaluate, Writing
from stages.process import device_of, dtype_of, give_back_memory, progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agents import CausalLMPolicy
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
    fallback = {"max_new_tokens": 48, "min_new_tokens": 0, "temperature": 1.0, "vocabulary": None}
    given = {key: getattr(settings, key) for key in fallback}
    chosen = {key: value for key, value in given.items() if value is not None}
    filled = {**fallback, **written, **chosen}
    if filled["vocabulary"] is not None:
        filled["vocabulary"] = Path(filled["vocabulary"])
    return replace(settings, **filled)


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
