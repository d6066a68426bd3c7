"""A callback that keeps a run's checkpoints, and stops a run at a signal without loss."""

import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from agents.checkpoint import read_state
from agents.checkpoint_store import CheckpointStore
from agents.resumable import ResumablePPO
from agents.saving import sync

LOGS = "logs"


class StoppedBySignal(Exception):
    """Training was stopped between two tokens, and a checkpoint made there."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; training can go on from {path}"
        )
        self.signum, self.path = signum, path


class CheckpointFolderCallback(BaseCallback):
    """Saves checkpoints between rollouts, and keeps the last few and the best.

    A checkpoint changes nothing in the run that makes it; one that goes on from it is identical.
    """

    model: ResumablePPO

    def __init__(
        self,
        folder: str | Path,
        every: int | None = 1,
        keep: int = 2,
        best_key: str | None = "rollout/score_mean",
        every_tokens: int | None = None,
        facts: Mapping[str, Any] | None = None,
        logs: Sequence[str | Path] = (),
        verbose: int = 0,
    ) -> None:
        """Save to `folder`, a `CheckpointStore`, and once more when training ends.

        Args:
            folder: Where the checkpoints are.
            every: Rollouts from one to the next; None: only at the end and when stopped.
            keep: So many of the last are kept.
            best_key: The logged figure by which one is the best: its rollout's, made with the
                weights that it holds. None keeps no best.
            every_tokens: Also save in mid-rollout, when so many tokens have been written since.
            facts: Kept with each checkpoint, for `TokenPPO.load` to compare.
            logs: Files of the run that grow by whole lines: each checkpoint knows how long they
                are, and `cut_back` shortens them to that.
            verbose: As in SB3.

        Raises:
            ValueError: If a number is out of range.
        """
        super().__init__(verbose)
        for name, number in (("every", every), ("every_tokens", every_tokens)):
            if number is not None and number < 1:
                raise ValueError(f"expected {name} >= 1, got {number}")
        self.store = CheckpointStore(folder, keep)
        self.every, self.every_tokens, self.best_key = every, every_tokens, best_key
        self.facts, self.logs = dict(facts or {}), [Path(log) for log in logs]
        self._rollouts, self._saved_at = 0, 0
        self._best: dict[str, Any] | None = None
        self._signal: int | None = None
        self._looked = False

    def _on_training_start(self) -> None:
        self._looked = False
        if self.model.num_timesteps < self._saved_at:  # another training
            self._rollouts, self._saved_at, self._best = 0, 0, None

    def _on_step(self) -> bool:
        return True

    def between_tokens(self) -> None:
        """Save here, where the model is at rest, if it is time to; stop if that is asked.

        Raises:
            FileExistsError: If the folder has checkpoints of later steps.
            StoppedBySignal: If a signal came.
        """
        if not self._looked:
            self.store.require_none_after(self.model.num_timesteps)
            self._looked = True
        if self._signal is not None:
            raise StoppedBySignal(self._signal, self.save())
        new_rollout = self.model.rollout_buffer.pos == 0
        since = self.model.num_timesteps - self._saved_at
        by_rollouts = self.every is not None and new_rollout and self._rollouts % self.every == 0
        by_tokens = self.every_tokens is not None and since >= self.every_tokens
        if since > 0 and (by_rollouts or by_tokens):
            self.save()

    def save(self) -> Path:
        """Make a checkpoint now; when this returns, no crash loses it."""
        self._saved_at = self.model.num_timesteps
        sizes = {}
        for log in self.logs:
            if log.exists():
                sync(log)
                sizes[log.name] = log.stat().st_size
        facts = {**self.facts, LOGS: sizes}
        return self.store.put(
            self.model.num_timesteps, lambda path: self.model.save(path, facts=facts)
        )

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        value = self.logger.name_to_value.get(self.best_key) if self.best_key else None
        if value is None or not math.isfinite(value):
            return
        if not self._saved_at == self.model._tokens_before > 0:
            return  # its weights are not those of a checkpoint
        if self._best is None or float(value) > self._best["value"]:
            name = self.store.path_of(self._saved_at).name
            self._best = {"checkpoint": name, "key": self.best_key, "value": float(value)}
            self.store.set_best(self._best)

    def _on_training_end(self) -> None:
        if self.model.num_timesteps != self._saved_at:
            self.save()

    def get_state(self) -> dict[str, Any]:
        """Return what has been counted, and the best so far."""
        return {"rollouts": self._rollouts, "saved_at": self._saved_at, "best": self._best}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `get_state`; a best that came later is forgotten."""
        self._rollouts, self._saved_at = state["rollouts"], state["saved_at"]
        self._best = state["best"]
        self.store.set_best(self._best)

    @contextmanager
    def stops_at_signals(
        self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)
    ) -> Iterator[None]:
        """Let the first of these signals stop training at its next token, with a checkpoint.

        A second one has its usual effect, at once. For the main thread.

        Raises:
            StoppedBySignal: From `learn`, when the checkpoint is on the disk.
        """

        def stop(signum: int, frame: FrameType | None) -> None:
            self._signal = signum
            for number, handler in before.items():
                signal.signal(number, handler)

        self._signal = None
        before = {number: signal.signal(number, stop) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def cut_back(checkpoint: str | Path, logs: Sequence[str | Path]) -> None:
    """Shorten a run's logs to what they were when a checkpoint was made.

    Raises:
        ValueError: If one is shorter than that: lines are missing.
    """
    sizes = read_state(checkpoint)["facts"].get(LOGS, {})
    for log in map(Path, logs):
        size = log.stat().st_size if log.exists() else 0
        expected = sizes.get(log.name, 0)
        if size < expected:
            raise ValueError(
                f"{log}: expected at least the {expected} bytes that {checkpoint} goes on from, "
                f"got {size}"
            )
        if size > expected:
            os.truncate(log, expected)
            sync(log)
