"""Several processes, each with its own rows: what they must know of one another.

torchrun starts them, torch.distributed connects them, DDP or FSDP2 averages gradients. What is
here keeps a training loop that knows nothing of it right: figures per token are gathered before
the loss is computed, so that loss, early stopping and statistics are those of all ranks, and
callbacks, which run on rank 0 alone, decide for all. With one process each function is free.
"""

import gc
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch as th
import torch.distributed as dist
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import get_device
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

PATIENCE = timedelta(hours=12)
"""How long a rank waits for another, whatever for: as long as a stage or callback that rank 0 does
alone may take. One that dies is torchrun's to notice, within seconds."""


def connect(device: th.device | str) -> None:
    """Join the processes that torchrun has started, if it has and nobody did yet.

    Args:
        device: What this process computes on: "cuda" is the GPU of its number on this machine.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    on_gpu = get_device(device).type == "cuda"
    if on_gpu:
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)


def disconnect() -> None:
    """Part from the other processes, if connected; models that are not used any more go first."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a process that torchrun started, all work done, without Python's own clean-up.

    In it gloo's threads now and then abort the process ("terminate called without an active
    exception", torch 2.13), and torchrun calls the finished job failed.
    """
    if code == 0:  # else the others may be anywhere, and parting may wait for them
        disconnect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_tokens(values: th.Tensor) -> th.Tensor:
    """Put the ranks' values (N_rank, ...) together, in the order of ranks: (N, ...).

    Each rank's own part stays differentiable. Its gradient is multiplied by the number of ranks,
    as DDP and FSDP2 divide by it when they average: what is left is the gradient of a loss over
    all tokens, however they are spread.
    """
    if world_size() == 1:
        return values
    return _Gather.apply(values)


class _Gather(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: th.Tensor) -> th.Tensor:
        sizes = [int(n) for n in _all(th.tensor([len(values)], device=values.device))]
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: len(values)] = values
        parts = _all(padded)
        ctx.start, ctx.size = sum(sizes[: rank()]), len(values)
        return th.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> th.Tensor:
        return gradient[ctx.start : ctx.start + ctx.size] * world_size()


def _all(tensor: th.Tensor) -> list[th.Tensor]:
    parts = [th.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return parts


def total(value: float) -> float:
    """Return the sum of the ranks' values."""
    return sum(gather([value]))


def agree_on_parts(wanted: int, n_sequences: int) -> int:
    """Return how many parts each rank cuts its sequences into, the same number on all.

    Args:
        wanted: How many this rank would make; the greatest wish counts.
        n_sequences: How many it can make at most; the fewest count.
    """
    found = gather([(wanted, n_sequences)])
    return min(max(w for w, _ in found), min(n for _, n in found))


def gather(items: list) -> list:
    """Return all ranks' items, in the order of ranks."""
    if world_size() == 1:
        return items
    found: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(found, items)
    return [item for part in found for item in part]


@th.no_grad()
def copy_from_first(module: th.nn.Module) -> None:
    """Give parameters and buffers the values that they have on rank 0."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)


def whole(tree: Any, keep: bool = True) -> Any:
    """Replace sharded tensors by whole ones on the CPU; all ranks must call it.

    Args:
        tree: Dicts and lists of tensors.
        keep: Whether this rank wants the result; others, which only help, get None for a tensor.
    """

    def unshard(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        found = leaf.full_tensor()
        return found.cpu() if keep else None

    return tree_map(unshard, tree)


def shard_like(state: dict[str, Any], parameters: list[th.Tensor]) -> dict[str, Any]:
    """Cut an optimizer's whole state, as of `state_dict()`, as its parameters are cut."""
    cut = {}
    for i, parameter in enumerate(parameters):
        cut[i] = {
            key: distribute_tensor(value, parameter.device_mesh, parameter.placements)
            if isinstance(parameter, DTensor) and value.shape == parameter.shape
            else value
            for key, value in state["state"].get(i, {}).items()
        }
    return {**state, "state": {i: values for i, values in cut.items() if values}}


STOP, GO_ON, HELP, HELP_WITH_LM = 0, 1, 2, 3


class OneForAll(BaseCallback):
    """Calls callbacks on rank 0 alone; at each call the other ranks wait for its word.

    The word is to go on, to stop training, or, of sharded models, to help with gathering what a
    callback wants to save.
    """

    def __init__(self, callback: BaseCallback | None) -> None:
        """Wrap `callback`; None on ranks other than 0."""
        super().__init__()
        self.callback, self.busy = callback, False

    def _on_training_start(self) -> None:
        self._meet(lambda c: c.on_training_start(self.locals, self.globals))

    def _on_rollout_start(self) -> None:
        self._meet(lambda c: c.on_rollout_start())

    def _on_step(self) -> bool:
        return self._meet(lambda c: bool(c.on_step()))

    def _on_rollout_end(self) -> None:
        self._meet(lambda c: c.on_rollout_end())

    def _on_training_end(self) -> None:
        self._meet(lambda c: c.on_training_end())

    def update_child_locals(self, locals_: dict[str, Any]) -> None:
        """Let the callbacks see the training loop's variables."""
        if self.callback is not None:
            self.callback.update_locals(locals_)

    def _meet(self, call: Callable[[BaseCallback], Any]) -> bool:
        if self.callback is None:
            while (word := _pass_on(STOP)) in (HELP, HELP_WITH_LM):
                self.model.gather_parameters(word == HELP_WITH_LM, keep=False)
            return word == GO_ON
        self.busy = True
        try:
            going_on = call(self.callback) is not False
        finally:
            self.busy = False
        _pass_on(GO_ON if going_on else STOP)
        return going_on

    def ask_for_help(self, lm_only: bool) -> None:
        """Let the other ranks gather the model's parameters with rank 0, if they wait for it."""
        if self.busy:
            _pass_on(HELP_WITH_LM if lm_only else HELP)


def _pass_on(word: int) -> int:
    """Give rank 0's word to all; return it."""
    said = th.tensor([word], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(said, 0)
    return int(said)
