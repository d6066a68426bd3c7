"""Let a policy write: one whole episode per row, with its exact divergence from a reference."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from agents.language_model import Reference, TokenModel, check_positions
from agents.masks import ActionMasks
from agents.policy import CausalLMPolicy
from agents.sequences import PAD, TokenBatch, pad_right


def write_episodes(
    policy: CausalLMPolicy,
    env: VecEnv,
    reference: Reference | None = None,
    deterministic: bool = False,
) -> list[dict[str, Any]]:
    """Run every row of `env` through one episode.

    Args:
        policy: Who writes.
        env: A text environment that holds rows at their end (`TextVecEnv(autoreset=False)`); in
            one that goes on, the first episode of each row is taken. Its prompts may be longer or
            shorter than those of the environment that the policy was made for.
        reference: What the divergence is measured to.
        deterministic: Take the likeliest token instead of sampling.

    Returns:
        The final `info` of each row, with `ref_kl` (nats, summed over the episode's states; None
        without a reference): KL(π‖π_ref) over the whole vocabulary at each state, or, where the
        choice is deterministic, −log π_ref of what was chosen.
    """
    obs = env.reset()
    assert isinstance(obs, np.ndarray)
    check_positions(policy.lm, obs.shape[1])
    policy.set_training_mode(False)
    states: list[np.ndarray] = []  # (n_envs,) per step: the column that each row's token follows
    masks = ActionMasks(env, policy.device) if env.has_attr("action_masks") else None
    mask_ids: list[np.ndarray] = []  # (n_envs,) per step
    ended: dict[int, tuple[dict[str, Any], int]] = {}  # info, steps
    while len(ended) < env.num_envs:
        allowed = None if masks is None else masks.ask().cpu().numpy()
        with th.no_grad():  # as `predict`, which would require the width that it was made for
            ids_now = th.as_tensor(obs, device=policy.device)
            tokens = policy._predict(ids_now, deterministic, allowed).cpu().numpy()
        if masks is not None:
            mask_ids.append(masks.mask_id)
        states.append((obs != PAD).sum(axis=1) - 1)
        obs, _, dones, infos = env.step(tokens)
        for row in np.flatnonzero(dones):
            ended.setdefault(int(row), (infos[row], len(states)))
    episodes = [dict(ended[row][0]) for row in range(env.num_envs)]
    ids = [_real(episode.pop("terminal_observation")) for episode in episodes]
    if reference is None:
        divergence: Sequence[float | None] = [None] * len(ids)
    else:
        at = None if masks is None else (np.stack(mask_ids), masks.table())
        columns = np.stack(states)
        own = [columns[: ended[row][1], row] for row in range(env.num_envs)]
        divergence = _divergence(policy, reference, ids, own, at, deterministic)
    for episode, ref_kl in zip(episodes, divergence, strict=True):
        episode["ref_kl"] = ref_kl
    policy.decoder.forget()
    return episodes


def _real(obs: np.ndarray) -> np.ndarray:
    return obs[obs != PAD].astype(np.int64)


@th.no_grad()
def _divergence(
    policy: TokenModel,
    reference: Reference,
    ids: list[np.ndarray],
    states: list[np.ndarray],
    masks: tuple[np.ndarray, th.Tensor] | None,
    deterministic: bool,
    batch_size: int = 32,
) -> list[float]:
    """Sum the divergence over each episode's states, some sequences of like length at a time.

    `states` are the columns that each episode's tokens follow; `masks` the indices that held,
    (T, n_envs), and the masks, (M, V) bool.
    """
    found = [0.0] * len(ids)
    order = np.argsort([len(row) for row in ids], kind="stable")
    for start in range(0, len(ids), batch_size):
        part = order[start : start + batch_size]
        counts = [len(states[i]) for i in part]
        row = np.repeat(np.arange(len(part)), counts)
        position = np.concatenate([states[i] for i in part])
        padded = pad_right([ids[i] for i in part])
        device = policy.allowed_tokens.device
        batch = TokenBatch(*(th.as_tensor(x, device=device) for x in (padded, row, position)))
        if masks is not None:
            step = np.concatenate([np.arange(count) for count in counts])
            mask_id = th.as_tensor(masks[0][step, part[row]], device=device).long()
            batch = batch._replace(mask_id=mask_id, masks=masks[1])
        tokens = batch.ids[batch.row, batch.position + 1]
        if deterministic:
            hidden = reference.hidden_at(batch)
            per_token = -reference.token_statistics(batch, hidden, tokens).log_prob
        else:
            per_token = policy.compare(batch, tokens, reference).kl
        sums = np.bincount(row, weights=per_token.double().cpu().numpy(), minlength=len(part))
        for i, value in zip(part, sums, strict=True):
            found[i] = float(value)
    return found
