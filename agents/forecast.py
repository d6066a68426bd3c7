"""How fast a run will be, and how much memory it will need: measured on a little, scaled up.

What is counted is the agent's: the reward model, Python and its libraries come on top.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th
from torch import nn
from transformers.pytorch_utils import Conv1D

from agents.checks import Verdict, Walked, whole_batch
from agents.packed import can_pack
from agents.policy import CausalLMPolicy
from agents.sequences import PAD
from agents.states import width

GIB = 2**30


class Measured(NamedTuple):
    """What a few tokens took.

    Attributes:
        decode: Tokens per second of decoding, prompts included.
        update: Tokens per second of one forward and backward pass.
        rows: Rows that were decoded side by side.
        cache_per_row: Bytes of keys and values.
        kept_per_position: Bytes that the backward pass keeps for a token of prompt or completion.
    """

    decode: float
    update: float
    rows: int
    cache_per_row: float
    kept_per_position: float


@th.no_grad()
def measure_decoding(
    policy: CausalLMPolicy, prompts: Sequence[np.ndarray], n_rows: int, n_tokens: int
) -> tuple[float, float]:
    """Decode some tokens in each of `n_rows` rows.

    Returns:
        Tokens per second, and bytes of cache per row.
    """
    obs = np.full((n_rows, policy.observation_space.shape[0]), PAD, dtype=np.int64)
    length = np.array([len(prompts[row % len(prompts)]) for row in range(n_rows)])
    for row in range(n_rows):
        obs[row, : length[row]] = prompts[row % len(prompts)]
    policy.forget()
    start = time.perf_counter()
    for step in range(n_tokens):
        tokens, _, _ = policy.forward(th.as_tensor(obs, device=policy.device))
        obs[np.arange(n_rows), length + step] = tokens.cpu().numpy()
    seconds = time.perf_counter() - start
    held = policy.decoder.held_bytes()
    policy.forget()
    return n_rows * n_tokens / max(seconds, 1e-9), held / n_rows


def measure_update(policy: CausalLMPolicy, walked: Sequence[Walked]) -> tuple[float, float]:
    """Run one forward and backward pass of a loss like PPO's, and change nothing.

    Returns:
        Completion tokens per second, and bytes kept for the backward pass per position.
    """
    batch, actions = whole_batch(policy, walked)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: th.Tensor) -> th.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = time.perf_counter()
    with th.enable_grad(), th.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        values, log_prob, entropy = policy.evaluate(batch, actions)
        loss = values.mean() - log_prob.mean() - 0.01 * entropy.mean()
    if loss.requires_grad:
        loss.backward()
    seconds = time.perf_counter() - start
    policy.optimizer.zero_grad(set_to_none=True)
    positions = int((batch.ids != PAD).sum())
    return len(actions) / max(seconds, 1e-9), sum(kept.values()) / positions


def measure(
    policy: CausalLMPolicy,
    prompts: Sequence[np.ndarray],
    walked: Sequence[Walked],
    n_rows: int,
    n_tokens: int,
) -> Measured:
    """Measure decoding and an update; see `Measured`."""
    decode, cache = measure_decoding(policy, prompts, n_rows, n_tokens)
    update, kept = measure_update(policy, walked)
    return Measured(decode, update, n_rows, cache, kept)


def check_speed(measured: Measured, n_envs: int, mean_tokens: float, n_epochs: int) -> Verdict:
    """Say what a rollout and its update will take.

    seconds = n_envs · tokens / decode + n_epochs · n_envs · tokens / update

    where the update's pass is a forward and a backward one. The reference's pass, the reward and
    the optimizer's step are not in it.

    Args:
        measured: What a few tokens took.
        n_envs: Rows of a rollout, each one completion.
        mean_tokens: Tokens of a completion.
        n_epochs: Passes over a rollout.
    """
    n_tokens = n_envs * mean_tokens
    rollout, update = n_tokens / measured.decode, n_epochs * n_tokens / measured.update
    figures = {"decode": measured.decode, "update": measured.update}
    figures |= {"rollout_seconds": rollout, "update_seconds": update}
    said = (
        f"decoding {measured.decode:.0f} tokens/s (with {measured.rows} rows), updating "
        f"{measured.update:.0f}: a rollout of {n_envs} completions of {mean_tokens:.0f} tokens "
        f"takes some {rollout:.0f} s, its update {update:.0f} s"
    )
    return Verdict("speed", "ok", said, figures)


def memory_parts(
    policy: CausalLMPolicy,
    measured: Measured,
    n_envs: int,
    minibatch_positions: float,
    rollout_positions: float,
    with_reference: bool = True,
) -> dict[str, float]:
    """Forecast the bytes of each part of a run.

    weights + reference + optimizer are there always. Besides them, either a rollout is written
    (decoder + cache + logits), or a minibatch is learned from (gradients + activations + frozen
    states); the larger of the two is the peak.

    Args:
        policy: The policy as it will be trained.
        measured: What a few tokens took.
        n_envs: Rows that are decoded side by side.
        minibatch_positions: Tokens, prompts included, of the sequences that are in memory at a
            time in the update.
        rollout_positions: Tokens of all sequences of a rollout, prompts included.
        with_reference: Whether there is a reference model: a copy of what learns, as the rest is
            shared.
    """
    lm, size = policy.lm, policy.dtype.itemsize
    learning = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    head = lm.get_output_embeddings().weight.numel()
    linear = sum(m.weight.numel() for m in lm.modules() if type(m) in (nn.Linear, Conv1D)) - head
    packs = can_pack(policy.device, policy.dtype)
    copied = linear * size if packs else 0
    if policy.dtype != th.float32:
        copied += sum(
            p.numel() * size for p in lm.parameters() if p.dtype == th.float32 and p.ndim > 1
        )
    parts = {
        "weights": sum(p.nbytes for p in policy.parameters()),
        "reference": sum(p.nbytes for p in lm.parameters() if p.requires_grad) * with_reference,
        "optimizer": 2 * 4 * learning,
        "decoder": copied + (head * size if packs else 0),
        "cache": n_envs * measured.cache_per_row,
        "logits": 3 * 4 * n_envs * min(policy.vocab_size, int(policy.allowed_tokens.sum())),
        "gradients": 4 * learning,
        "activations": minibatch_positions * measured.kept_per_position,
        "frozen states": rollout_positions * hidden_bytes(policy) if policy.n_frozen else 0,
    }
    always = parts["weights"] + parts["reference"] + parts["optimizer"]
    rollout = parts["decoder"] + parts["cache"] + parts["logits"]
    update = parts["gradients"] + parts["activations"] + parts["frozen states"]
    return {name: float(value) for name, value in parts.items()} | {
        "peak": float(always + max(rollout, update))
    }


def hidden_bytes(policy: CausalLMPolicy) -> int:
    """Return the bytes of one position's state."""
    return width(policy.lm) * policy.dtype.itemsize


def check_memory(parts: dict[str, float], there: float) -> Verdict:
    """Say what a run will need, part by part, and whether the machine has it.

    Args:
        parts: Of `memory_parts`, bytes.
        there: Bytes that the device has.
    """
    listed = ", ".join(
        f"{name} {value / GIB:.2f}"
        for name, value in sorted(parts.items(), key=lambda part: -part[1])
        if name != "peak" and value >= 0.005 * GIB
    )
    peak = parts["peak"]
    said = f"at most some {peak / GIB:.2f} GiB of {there / GIB:.0f}" + (
        f" ({listed})" if listed else ""
    )
    if peak > 0.8 * there:
        said += (
            ": fewer n_envs, micro_batch_size, gradient_checkpointing, trainable_layers or "
            "lora_rank help (docs/scaling.md)"
        )
        return Verdict("memory", "look", said, parts)
    return Verdict("memory", "ok", said, parts)


def device_memory(device: th.device) -> float:
    """Return the bytes that a device has: the machine's, or the container's, for the CPU."""
    if device.type == "cuda":
        return float(th.cuda.mem_get_info(device)[1])
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(total, float(text)) if text.isdigit() else total
