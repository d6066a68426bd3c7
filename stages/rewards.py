"""The reward function that settings ask for: a learned model, a metric, a function, or a sum."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.settings import PPO, Common, Terms
from stages.models import digest_of
from stages.process import device_of, dtype_of, look_here_for_modules
from stages.run_folder import folder_of, left_by


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
        look_here_for_modules()
        return load_reward(name)
    try:
        return load_reward_model(name, device_of(common))
    except OSError as error:
        known = ", ".join([*TERMS, "learned", "likelihood"])
        raise ValueError(
            f"{name}: expected one of {known}, a function as module:name, or the folder or hub id "
            f"of a reward model ({str(error).partition(chr(10))[0]})"
        ) from error


def shown_terms(terms: Terms) -> str:
    """Say which terms a reward has, with their weights and arguments."""
    shown = []
    for name, given in by_name(terms).items():
        arguments = dict(given) if isinstance(given, dict) else {"weight": given}
        weight = arguments.pop("weight", 1.0)
        further = ", ".join(f"{key} {value}" for key, value in arguments.items())
        shown.append(f"{weight:g} × {name}" + f" ({further})" * bool(further))
    return " + ".join(shown)


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
