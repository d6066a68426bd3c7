"""DoctorCallback: watches a run as it goes, and names what is going wrong, with what to do.

It gathers figures from the log and from finished episodes; `agents.findings` judges them.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents.buffer import TokenRolloutBuffer
from agents.findings import CHECKS, Finding, Limits, Seen, duplicates, examine, repetition
from agents.policy import CausalLMPolicy

logger = logging.getLogger(__name__)

PROBED = 4
"""Sequences of each rollout whose log-probabilities are computed again."""

NOT_SCREEN = ("stdout", "log")
"""SB3's writers of tables, which a column of zeros would fill."""


class DoctorCallback(BaseCallback):
    """Looks at each rollout and update, and says what is wrong as soon as it can be seen.

    For TokenPPO and its relatives; of other SB3 algorithms it knows the updates only. A finding
    is said once: as a warning of the logger `agents.doctor`, as TensorBoard text
    (`doctor/findings`), and as a line of `path`. For each rollout, the log says what holds:
    `doctor/<name>` is 1 or 0. Callbacks that log what it looks at (`rollout/judge_mean`) have to
    stand before it.

    Attributes:
        findings: What was found so far, each once.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        stop_on: Collection[str] = (),
        ignore: Collection[str] = (),
        verbose: int = 0,
        **limits: float,
    ) -> None:
        """Watch a run.

        Args:
            path: JSON lines file that findings are added to, made empty if there are none.
            stop_on: Findings that stop the run: at the next token, which is after the update if
                it was the rollout that showed them.
            ignore: Findings that are not looked for.
            verbose: As in SB3.
            **limits: Fields of `agents.findings.Limits`, where the defaults and their reasons
                stand.

        Raises:
            ValueError: If a name is not that of a finding, or a limit is out of range.
        """
        super().__init__(verbose)
        for argument, names in (("stop_on", stop_on), ("ignore", ignore)):
            unknown = [names] if isinstance(names, str) else sorted(set(names) - set(CHECKS))
            if unknown:
                raise ValueError(
                    f"{argument}: expected a collection of {', '.join(CHECKS)}, got {unknown}"
                )
        self.path = None if path is None else Path(path)
        self.stop_on, self.ignore = set(stop_on), set(ignore)
        self.limits = Limits(**limits)  # type: ignore[arg-type]  # window is a whole number
        self._stopping: list[str] = []  # the findings that do
        self._last_timesteps = 0
        self._forget()

    def _forget(self) -> None:
        self.findings: list[Finding] = []
        self.seen = Seen()
        self._n_updates = -1
        self._waiting: list[dict[str, Any]] = []  # of episodes too few to be judged
        self._judged: list[float] = []

    def get_state(self) -> dict[str, Any]:
        """Return what was seen and found so far, as JSON types."""
        return {
            "seen": asdict(self.seen),
            "findings": [asdict(finding) for finding in self.findings],
            "n_updates": self._n_updates,
            "waiting": list(self._waiting),
            "judged": list(self._judged),
            "last_timesteps": self._last_timesteps,
            "stopping": list(self._stopping),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`."""
        self.seen = Seen(**{key: list(rows) for key, rows in state["seen"].items()})
        self.findings = [Finding(**finding) for finding in state["findings"]]
        self._n_updates = state["n_updates"]
        self._waiting, self._judged = list(state["waiting"]), list(state["judged"])
        self._last_timesteps = state["last_timesteps"]
        self._stopping = sorted(self.stop_on & set(state["stopping"]))  # it may be another by now

    def _on_training_start(self) -> None:
        self._stopping = []
        if self.num_timesteps < self._last_timesteps:  # another run: its start is another one
            self._forget()
            self._n_updates = self._updates_logged()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()

    def _on_step(self) -> bool:
        return not self._stopping

    def _on_rollout_start(self) -> None:
        if self._look_at_update():
            self._examine()

    def _on_rollout_end(self) -> None:
        self._look_at_rollout()
        self._look_at_episodes()
        self._examine()

    def _on_training_end(self) -> None:
        if self._look_at_update():
            self._examine()
        self._stopping = []  # it has stopped: what is saved from now on may go on

    # ------------------------------------------------------------------------ the figures

    def _logged(self, **keys: str) -> dict[str, float]:
        """Return those figures that stand in SB3's log now, under names of ours."""
        log = self.logger.name_to_value
        return {name: float(log[key]) for name, key in keys.items() if is_number(log.get(key))}

    def _updates_logged(self) -> int:
        """Return what the log counts updates at; -1 if it does not say, as after `dump`."""
        return int(self._logged(n="train/n_updates").get("n", -1))

    def _look_at_update(self) -> bool:
        """Note what the last update logged; return whether there was one since."""
        row = self._logged(
            approx_kl="train/approx_kl",
            clip_fraction="train/clip_fraction",
            explained_variance="train/explained_variance",
        )
        n_updates = self._updates_logged()
        if n_updates in (-1, self._n_updates):
            return False
        self._n_updates = n_updates
        entropy = self._logged(entropy="train/entropy_loss")
        if entropy:
            row["entropy"] = -entropy["entropy"]
        if getattr(self.model, "vf_coef", 0) == 0:
            row.pop("explained_variance", None)
        rollout = self.seen.rollouts[-1] if self.seen.rollouts else {}
        if not rollout.get("value_only"):
            row["several_steps"] = float(takes_several_steps(self.model, rollout.get("n_tokens")))
        self.seen.updates.append(row)
        return True

    def _look_at_rollout(self) -> None:
        """Note what holds of single tokens."""
        row = self._logged(
            exact_kl="rollout/ref_kl_per_token_exact",
            k1="rollout/ref_kl_per_token_k1",
            k2="rollout/ref_kl_per_token_k2",
        )
        buffer = getattr(self.model, "rollout_buffer", None)
        if isinstance(buffer, TokenRolloutBuffer):
            row["n_tokens"] = float(buffer.n_tokens)
        row["value_only"] = float(getattr(self.model.policy, "value_only", False))
        probed = ratio_error(self.model)
        if probed is not None:
            row["ratio_error"], row["ratio_tolerance"] = probed
        self.seen.rollouts = [row]  # earlier ones are of no further use

    def _look_at_episodes(self) -> None:
        """Note what holds of whole completions, once enough of them have ended."""
        episodes = getattr(self.model, "finished_episodes", [])
        self._waiting += [kept(episode) for episode in episodes]
        if episodes:
            self._judged += self._logged(judge="rollout/judge_mean").values()
        if len(self._waiting) < self.limits.min_episodes:
            return
        row = summed_up(self._waiting)
        if self._judged:
            row["judge"] = float(np.mean(self._judged))
        row |= self._logged(kl_coef="train/kl_coef")
        controller = getattr(self.model, "kl", None)
        if controller is not None and controller.target is not None:
            row["target_ref_kl"] = float(controller.target)
        self.seen.episodes.append(row)
        self._waiting, self._judged = [], []

    # ----------------------------------------------------------------------- the findings

    def _examine(self) -> None:
        """Look for findings; log which hold, and say those that are new."""
        self._last_timesteps = self.num_timesteps
        held = {
            finding.name: finding
            for finding in examine(self.seen, self.limits, self.num_timesteps)
            if finding.name not in self.ignore
        }
        for name in CHECKS:
            if name not in self.ignore:
                excluded = () if name in held else NOT_SCREEN
                self.logger.record(f"doctor/{name}", float(name in held), exclude=excluded)
        known = {finding.name for finding in self.findings}
        for name, finding in held.items():
            if name not in known:
                self._say(finding)
        if stopping := sorted(self.stop_on & set(held)):
            if not self._stopping:
                logger.warning("doctor: training stops because of %s", ", ".join(stopping))
            self._stopping = stopping

    def _say(self, finding: Finding) -> None:
        """Put a new finding on the screen, into TensorBoard and into the file."""
        self.findings.append(finding)
        logger.warning(
            "doctor: %s, at %d tokens: %s. %s",
            finding.name, finding.num_timesteps, finding.said, finding.advice,
        )  # fmt: skip
        unwritten = self.logger.name_to_value.get("doctor/findings", "")
        text = f"{unwritten}**{finding.name}** ({finding.severity}): {finding.said}. "
        text += f"{finding.advice}\n\n"
        self.logger.record("doctor/findings", text, exclude=(*NOT_SCREEN, "json", "csv"))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(finding), ensure_ascii=False) + "\n")


def is_number(value: object) -> bool:
    """Say whether a logged value is a finite number."""
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


def takes_several_steps(model: BaseAlgorithm, n_tokens: float | None = None) -> bool:
    """Say whether the policy takes more than one step per rollout; else all ratios are 1.

    Args:
        model: The algorithm.
        n_tokens: Tokens of its rollout; None: as many as the buffer has places for.
    """
    epochs, batch_size = getattr(model, "n_epochs", 1), getattr(model, "batch_size", None)
    buffer = getattr(model, "rollout_buffer", None)
    if batch_size is None or buffer is None:
        return epochs > 1
    if n_tokens is None:
        n_tokens = buffer.buffer_size * buffer.n_envs
    return epochs * n_tokens > batch_size


@th.no_grad()
def ratio_error(model: BaseAlgorithm) -> tuple[float, float] | None:
    """Compute log-probabilities of a few of the rollout's sequences again.

    Returns:
        How far they lie from those that were sampled, and what is tolerated (nats): the largest
        error in float32, the mean in bfloat16. None where that cannot be asked: of other policies
        and buffers, and of sharded models, which all ranks must run at once.
    """
    policy, buffer = model.policy, getattr(model, "rollout_buffer", None)
    if not isinstance(policy, CausalLMPolicy) or not isinstance(buffer, TokenRolloutBuffer):
        return None
    if policy.sharded or not buffer.segments:
        return None
    order = buffer.by_length()
    some = order[:: max(1, len(order) // PROBED)][:PROBED]
    errors = []
    for batch, index in buffer.batches(some, buffer.n_tokens):
        at = tuple(index)
        actions = buffer.to_torch(buffer.actions[at]).long()
        found = policy.token_statistics(batch, policy.hidden_at(batch), actions)
        errors.append((found.log_prob - buffer.to_torch(buffer.log_probs[at])).abs())
    error = th.cat(errors)
    largest = error.max() if policy.dtype == th.float32 else error.mean()
    return float(largest), policy.ratio_tolerance


def kept(episode: dict[str, Any]) -> dict[str, Any]:
    """Return what the doctor needs of an episode's `info`, as JSON types."""
    numbers, texts = ("score", "n_tokens", "ref_kl"), ("finish_reason", "completion")
    found: dict[str, Any] = {name: float(episode[name]) for name in numbers if name in episode}
    return found | {name: str(episode[name]) for name in texts if name in episode}


def summed_up(episodes: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means of some episodes, under the names of `Seen.episodes`."""
    row: dict[str, float] = {}
    for name, key in (("score", "score"), ("length", "n_tokens"), ("ref_kl", "ref_kl")):
        values = [episode[key] for episode in episodes if key in episode]
        if len(values) == len(episodes):
            row[name] = float(np.mean(values))
            if name == "score":
                row["score_sd"] = float(np.std(values))
    reasons = [episode.get("finish_reason") for episode in episodes]
    if None not in reasons:
        row["ran_out"] = reasons.count("length") / len(reasons)
    texts = [episode["completion"] for episode in episodes if "completion" in episode]
    if texts:
        row["repetition"] = repetition(texts)
        if (share := duplicates(texts)) is not None:
            row["duplicates"] = share
    return row
