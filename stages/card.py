"""The model card of a trained policy."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.settings import PPO, Common
from stages.data import source_of
from stages.models import base_of
from stages.report import found_by, notes, reference_in, summary
from stages.rewards import by_name, shown_terms
from stages.run_folder import folder_of, write_text

if TYPE_CHECKING:
    from agents import TokenPPO
    from text_env import TextVecEnv


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
    if settings.user_fn is not None:
        training["user's turns"] = f"`{settings.user_fn}`, {settings.max_turns} answers at most"
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
        measures_table(facts["measures"], reference_in(facts)),
    ]
    if (folder / "curves.png").exists():
        shutil.copyfile(folder / "curves.png", folder / "policy" / "curves.png")
        parts.append("![curves](curves.png)")
    write_card(folder / "policy", known["card"], "\n\n".join(parts))
