"""What a run is made of where nothing is given: texts, human feedback, prompts, split by a hash."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.settings import Common
from stages.process import say
from stages.run_folder import folder_of, write_jsonl

if TYPE_CHECKING:
    from reward_models.feedback import Feedback


SHARES = {
    "movies": {"language": 0.31, "reward_model": 0.32, "judge": 0.32, "test": 0.05},
    "chinese-reviews": {"language": 0.54, "reward_model": 0.22, "judge": 0.22, "test": 0.02},
}
"""How the texts are split; a model that starts from nothing needs more of the language."""


PROMPT_WORDS, PROMPT_CHARACTERS = 4, 4
"""Words of a sentence, characters of a Chinese review, that are given as a prompt."""


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
