"""Callbacks that put a run's text and weights where people look for them."""

import json
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from transformers import PreTrainedTokenizerBase

from agents.lora import has_adapters, merged
from agents.policy import CausalLMPolicy
from agents.saving import replaced_folder

COLUMNS = ("prompt", "completion", "score", "ref_kl")


class SampleTextCallback(BaseCallback):
    """Shows what the policy writes: a few finished episodes of a rollout, spread over its rows.

    Each goes to a line of `path` ({"num_timesteps", "prompt", "completion", "score", "ref_kl"};
    ref_kl in nats per completion, null without a reference; a conversation's "messages"), and all
    to a table under `samples/completions` in TensorBoard's text page.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        n_samples: int = 8,
        every: int = 1,
        verbose: int = 0,
    ) -> None:
        """Show `n_samples` episodes of every `every`-th rollout.

        Args:
            path: JSON lines are appended here; None writes the table only.
            n_samples: Episodes per rollout.
            every: Rollouts from one table to the next.
            verbose: As in SB3.
        """
        super().__init__(verbose)
        self.path = Path(path) if path is not None else None
        self.n_samples, self.every = n_samples, every
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        episodes = getattr(self.model, "finished_episodes", [])
        n_shown = min(self.n_samples, len(episodes))
        if (self._rollouts - 1) % self.every or n_shown < 1:
            return
        # They stand in the order of their ends: the first ones are the shortest.
        episodes = sorted(episodes, key=lambda episode: (episode["row"], episode["step"]))
        chosen = [episodes[i * len(episodes) // n_shown] for i in range(n_shown)]
        rows = [{key: episode.get(key) for key in COLUMNS} for episode in chosen]
        self.logger.record(
            "samples/completions", table(rows), exclude=("stdout", "log", "json", "csv")
        )
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for row, episode in zip(rows, chosen, strict=True):
                    line = {"num_timesteps": self.num_timesteps, **row}
                    if "messages" in episode:
                        line["messages"] = episode["messages"]
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def get_state(self) -> dict[str, int]:
        """Return how many rollouts there were, for checkpoints."""
        return {"rollouts": self._rollouts}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from `get_state`."""
        self._rollouts = state["rollouts"]


class SavePretrainedCallback(BaseCallback):
    """Saves the policy's language model for `AutoModelForCausalLM.from_pretrained`.

    The folder is replaced whole, or not at all. The value head is not part of it. Of a policy
    with adapters (`lora`) they alone are saved, for transformers or peft to put on the base
    model, or, with `merge`, the whole model as it has become.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        every: int | None = None,
        merge: bool = False,
        verbose: int = 0,
    ) -> None:
        """Save to `path` when training ends, and after every `every`-th rollout.

        Args:
            path: The folder.
            tokenizer: Saved beside the weights.
            every: Rollouts from one save to the next; None saves at the end only.
            merge: Merge adapters into a whole model.
            verbose: As in SB3.
        """
        super().__init__(verbose)
        self.path, self.tokenizer, self.every = Path(path), tokenizer, every
        self.merge = merge
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        if self.every is not None and self._rollouts % self.every == 0:
            self._save()

    def _on_training_end(self) -> None:
        self._save()

    def get_state(self) -> dict[str, int]:
        """Return how many rollouts there were, for checkpoints."""
        return {"rollouts": self._rollouts}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from `get_state`."""
        self._rollouts = state["rollouts"]

    def _save(self) -> None:
        policy = self.model.policy
        if not isinstance(policy, CausalLMPolicy):
            raise TypeError(f"expected a CausalLMPolicy to save, got {type(policy).__name__}")
        lm = merged(policy.lm) if self.merge and has_adapters(policy.lm) else policy.lm
        if lm.generation_config is not None:  # what `generate` then samples from
            lm.generation_config.update(do_sample=True, temperature=policy.temperature)
        weights = self.model.gather_parameters(lm_only=True) if policy.sharded else None
        with replaced_folder(self.path) as folder:
            lm.save_pretrained(folder, state_dict=weights)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)


class TokenProgressBar(ProgressBarCallback):
    """SB3's progress bar, counting the tokens written: held rows write none."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._start = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self._start - self.pbar.n)
        return True


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows of equal keys as a Markdown table."""
    keys = list(rows[0])
    lines = [" | ".join(keys), " | ".join("---" for _ in keys)]
    lines += [" | ".join(cell(row[key]) for key in keys) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: object) -> str:
    """Format one value so that it stays in its cell."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ⏎ ")
