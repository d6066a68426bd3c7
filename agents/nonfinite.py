"""NaN and infinity: where an update looks for them, and what it does when it finds some.

Rewards and values of a rollout are looked at by the buffer (`agents.buffer`), which knows their
sequences; here is what concerns a single minibatch, and the error that names the place.
"""

from functools import partial
from typing import Literal, get_args

import numpy as np
import torch as th

from agents.ranks import whole
from agents.sequences import PAD, TokenBatch

LARGEST = 1e15
"""Rewards, values and slopes beyond it count as infinite: sums of their squares leave float32."""

OnNonFinite = Literal["raise", "skip"]


class NonFiniteError(FloatingPointError):
    """A number that no update may see; it was found before any parameter changed.

    Attributes:
        source: What it is: "reward", "logits", "value", ...
        number: The number.
        ids: (L,) int64, the sequence that it belongs to; None if it belongs to a whole minibatch.
    """

    def __init__(self, source: str, number: float, ids: np.ndarray | None = None) -> None:
        super().__init__(source, number, ids)
        self.source, self.number, self.ids = source, number, ids
        self._place = "" if ids is None else f" in the sequence of ids {ids.tolist()}"

    def say_where(self, text: str | None, num_timesteps: int) -> None:
        """Add the sequence's text, if it is known, and the run's step, in tokens."""
        if text is not None:
            self._place = f" in the text {text if len(text) <= 80 else text[:77] + '...'!r}"
        self._place += f", at step {num_timesteps} (tokens)"

    def __str__(self) -> str:
        """Say what was found, where, and what to do."""
        broken = self.source in ("logits", "reference")  # nothing to skip
        return (
            f"{self.source}: expected finite numbers (within ±{LARGEST:g}), got {self.number}"
            f"{self._place}; no parameter was changed by it: check "
            + ("the model's weights" if broken else "the reward's scale and the learning rate")
            + ("" if broken else ', or pass on_nonfinite="skip"')
        )


def checked_choice(on_nonfinite: str, n_processes: int) -> OnNonFinite:
    """Return what to do with such numbers, if it is possible.

    Raises:
        ValueError: If it is not.
    """
    if on_nonfinite not in get_args(OnNonFinite):
        raise ValueError(f'expected on_nonfinite "raise" or "skip", got {on_nonfinite!r}')
    if on_nonfinite == "skip" and n_processes > 1:
        raise ValueError(
            f'expected on_nonfinite="raise" with {n_processes} processes, which must all take '
            'the same steps, got "skip"'
        )
    return "skip" if on_nonfinite == "skip" else "raise"


def require_finite_logits(logits: th.Tensor, ids: th.Tensor) -> None:
    """Require that rows of logits (n, A), forbidden places included, are finite.

    Args:
        logits: What the next tokens are chosen by.
        ids: (n, L) the rows' ids.

    Raises:
        NonFiniteError: If not. There is nothing to skip: the weights themselves are broken.
    """
    if not logits.numel() or bool(th.stack(logits.aminmax()).isfinite().all()):
        return
    row, place = (~logits.isfinite()).nonzero()[0].tolist()
    raise NonFiniteError("logits", float(logits[row, place]), without_padding(ids[row]))


class Guard:
    """Stands between a minibatch and the optimizer's step.

    Attributes:
        skip: Leave a minibatch with such numbers out, rather than raise.
        n_skipped: Minibatches left out.
        n_steps: Steps that were taken.
    """

    def __init__(self) -> None:
        self.skip = False
        self.n_skipped = self.n_steps = 0
        self._broken = False

    def watch(self, batch: TokenBatch, **outputs: th.Tensor) -> None:
        """Check what the loss is computed from now, and its slope in each when it is known.

        SB3's loop does not hand out the loss. It is infinite or NaN only if a slope is, since
        values and returns are bounded by `LARGEST`.

        Args:
            batch: The sequences of N tokens.
            outputs: N numbers each, by what they are.

        Raises:
            NonFiniteError: If one is not finite; of a slope, from within the backward pass.
        """
        self._broken = False  # SB3 may have stopped an epoch without a step
        for name, numbers in outputs.items():
            self._check(name, batch, numbers.detach())
            if numbers.requires_grad:
                numbers.register_hook(partial(self._check, f"slope of the loss in {name}", batch))

    def before_step(self, optimizer: th.optim.Optimizer, *_: object) -> None:
        """Let a step be taken, or not: without gradients it leaves all as it is.

        Raises:
            NonFiniteError: If a gradient is not finite.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = whole(th.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        broken, self._broken = self._broken or not bool(norm.isfinite()), False
        if not broken:
            self.n_steps += 1
            return
        if not self.skip:
            raise NonFiniteError("gradient", float(norm))
        self.n_skipped += 1
        for p in parameters:
            p.grad = None

    def _check(self, source: str, batch: TokenBatch, numbers: th.Tensor | None) -> None:
        if numbers is None:  # the loss does not depend on it
            return
        numbers = numbers.reshape(-1)
        fine = numbers.abs() <= LARGEST  # of NaN too this is false
        if bool(fine.all()):
            return
        if self.skip:
            self._broken = True
            return
        at = int((~fine).nonzero()[0])
        ids = batch.ids[batch.row[at], : int(batch.position[at]) + 1]
        raise NonFiniteError(source, float(numbers[at]), without_padding(ids))


def without_padding(ids: th.Tensor) -> np.ndarray:
    """Return a row's ids (L,), without the padding at its end."""
    row = ids.cpu().numpy().astype(np.int64)
    return row[row != PAD]
