"""Everything that a TokenPPO is at a moment, as JSON and tensors.

Nothing is left to a pickle: of models the configurations are kept, weights, optimizer and rollout
are tensors, the rest is numbers and text. `agents.checkpoint` brings it to the disk, and
`agents.rebuilding` makes a TokenPPO of it again.
"""

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
import transformers
from transformers import PreTrainedModel

from agents import ranks
from agents.callback_state import callback_states
from agents.checkpoint import Tensors
from agents.env_state import env_state
from agents.json_state import to_json
from agents.policy import CausalLMPolicy
from agents.random_state import random_states
from agents.schedules import describe

if TYPE_CHECKING:
    from agents.resumable import ResumablePPO

SETTINGS = (
    "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef", "vf_coef",
    "max_grad_norm", "target_kl", "whole_episodes", "value_warmup", "on_nonfinite", "seed",
    "verbose", "tensorboard_log", "_stats_window_size",
)  # fmt: skip
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf")
COUNTERS = (
    "_n_updates", "_episode_num", "_total_timesteps", "_num_timesteps_at_start", "_iterations",
    "nonfinite_skipped",
)  # fmt: skip


class Stored(NamedTuple):
    """What a loaded model has yet to go on from: it is put in place when training does go on.

    Attributes:
        state: The checkpoint's JSON.
        tensors: Its random generators' and its rollout's tensors.
    """

    state: dict[str, Any]
    tensors: Tensors


def training_state(
    model: "ResumablePPO", exact: bool, facts: Mapping[str, Any]
) -> tuple[dict[str, Any], Tensors]:
    """Return a model's state, as JSON and tensors.

    Args:
        model: The model.
        exact: Whether it is at rest: between two tokens, or between rollouts. Else environment
            and rollout are left out.
        facts: What the caller wants to find again, JSON types.

    Raises:
        TypeError: If something of it has no JSON: a column of an episode's prompt, say.
    """
    stored = model._stored
    policy, optimizer_tensors = model.get_parameters(), {}
    optimizer: dict[str, Any] = {"groups": [], "scalars": {}}
    saved = policy["policy.optimizer"]
    for group in saved["param_groups"]:
        optimizer["groups"].append(to_json({k: v for k, v in group.items() if k != "lr"}))
    for number, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, th.Tensor):
                optimizer_tensors[f"{number}.{name}"] = value
            else:
                optimizer["scalars"][f"{number}.{name}"] = to_json(value)
    weights, tied = untied(policy["policy"])
    tensors: Tensors = {"policy": weights, "optimizer": optimizer_tensors}
    own = policy.get("reference") if model.shard else own_tensors(model)
    if own:
        tensors["reference"], tied_reference = untied(own)
        tied |= {f"reference:{alias}": name for alias, name in tied_reference.items()}
    if stored is None:
        randoms, tensors["random"] = random_states()
        callbacks, pending, seconds = callback_states(model._callback), logged(model), model.seconds
        environment, rollout, tensors["rollout"] = under_way(model, exact)
        in_learn = model._in_learn
    else:  # loaded, and not gone on yet
        randoms, callbacks = stored.state["random"], stored.state["callbacks"]
        pending, seconds = stored.state["logger"], stored.state["progress"]["seconds"]
        environment, rollout = stored.state["environment"], stored.state["rollout"]
        in_learn = stored.state["progress"]["in_learn"]
        tensors |= {name: stored.tensors[name] for name in ("random", "rollout")}
    state = {
        "algorithm": type(model).__name__,
        "machine": machine(model.device),
        "spaces": spaces_of(model),
        "settings": to_json({name: getattr(model, name) for name in SETTINGS}),
        "schedules": {name: describe(getattr(model, name)) for name in SCHEDULES},
        "buffer": buffer_settings(model),
        "policy": policy_settings(model.policy, model.policy_class),
        "reference": reference_settings(model),
        "kl": {"coef": model.kl.coef, "target": model.kl.target, "horizon": model.kl.horizon},
        "progress": {
            "num_timesteps": model.num_timesteps,
            **{name: getattr(model, name) for name in COUNTERS},
            "optimizer_steps": model.policy.guard.n_steps,
            "in_learn": in_learn,
            "seconds": seconds,
        },
        "statistics": {
            "episodes": to_json(list(model.ep_info_buffer or ())),
            "successes": to_json(list(model.ep_success_buffer or ())),
            "begun": model.ep_info_buffer is not None,
        },
        "optimizer": optimizer,
        "tied": tied,
        "random": randoms,
        "callbacks": callbacks,
        "logger": pending,
        "environment": environment,
        "rollout": rollout,
        "facts": dict(facts),
    }
    return state, tensors


def under_way(model: "ResumablePPO", exact: bool) -> tuple[Any, Any, dict[str, th.Tensor]]:
    """Return the states of the environment and of the rollout, each or None, and their tensors."""
    tensors = {"open_kl": th.from_numpy(model._open_kl.copy())}
    if not exact or model.env is None or model._last_obs is None:
        return None, None, tensors
    environment = env_state(model.env)
    if environment is None:
        return None, None, tensors
    tensors["last_obs"] = th.from_numpy(np.array(model._last_obs))
    starts = np.array(model._last_episode_starts, dtype=bool)
    tensors["last_episode_starts"] = th.from_numpy(starts)
    if not model.rollout_under_way:
        return environment, None, tensors
    buffer = model.rollout_buffer
    tensors |= {f"step.{name}": tensor for name, tensor in buffer.get_state().items()}
    if buffer.action_masks is not None and buffer.action_masks.known:
        tensors["masks"] = buffer.action_masks.table().cpu()
    episodes = to_json(model.finished_episodes, "finished_episodes")
    rollout = {"tokens_before": model._tokens_before, "finished_episodes": episodes}
    return environment, rollout, tensors


def untied(state: Mapping[str, th.Tensor]) -> tuple[dict[str, th.Tensor], dict[str, str]]:
    """Return tensors, each memory once, and the further names of some: alias to name."""
    kept: dict[str, th.Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in names:
            tied[name] = names[key]
        else:
            kept[name] = tensor
            names[key] = name
    return kept, tied


def own_tensors(model: "ResumablePPO") -> dict[str, th.Tensor]:
    """Return the reference's tensors that are not the policy's."""
    if model.reference is None:
        return {}
    found = model.reference.state_dict()
    if model.shard:
        return found
    shared = {tensor.data_ptr() for tensor in model.policy.state_dict().values()}
    return {name: t for name, t in found.items() if t.data_ptr() not in shared}


def machine(device: th.device) -> dict[str, Any]:
    """Return what bit-identity depends on, beyond the checkpoint."""
    return {
        "device": device.type,
        "instructions": th.backends.cpu.get_cpu_capability(),
        "processes": ranks.world_size(),
        "threads": th.get_num_threads(),
        "torch": th.__version__,
        "transformers": transformers.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }


def spaces_of(model: "ResumablePPO") -> dict[str, Any]:
    """Return what the spaces of token environments can differ in."""
    space = model.observation_space
    assert isinstance(space, gym.spaces.Box) and isinstance(model.action_space, gym.spaces.Discrete)
    return {
        "vocab_size": int(model.action_space.n),
        "longest": int(space.shape[0]),
        "obs_dtype": str(space.dtype),
        "n_envs": model.n_envs,
    }


def buffer_settings(model: "ResumablePPO") -> dict[str, Any]:
    """Return the rollout buffer's class, and its arguments that JSON can hold."""
    arguments = model.rollout_buffer_kwargs or {}
    plain = {k: v for k, v in arguments.items() if isinstance(v, bool | int | float | str)}
    return {"class": type(model.rollout_buffer).__qualname__, "arguments": plain}


def policy_settings(policy: CausalLMPolicy, made_of: type) -> dict[str, Any]:
    """Return what rebuilds the policy, of the class `made_of`, before its weights are there."""
    arguments = policy._get_constructor_parameters()
    plain = {
        name: to_json(arguments[name], f"policy_kwargs.{name}")
        for name in (
            "temperature", "trainable_layers", "lora", "gradient_checkpointing",
            "micro_batch_size", "dtype", "optimizer_kwargs",
        )
    }  # fmt: skip
    value = policy.value_network
    return {
        "class": made_of.__qualname__,  # FSDP2 changes the live one
        "optimizer": policy.optimizer_class.__name__,
        "arguments": plain,
        "lm": model_settings(policy.lm),
        "value_lm": None if value is None else model_settings(value.lm),
    }


def reference_settings(model: "ResumablePPO") -> dict[str, Any] | None:
    """Return which kind of reference there is, and what rebuilds one of its own."""
    if model.reference is None:
        return None
    other = None if model.ref_lm is None else model_settings(model.reference.lm)
    source = model.ref_lm or model.policy_kwargs.get("lm")
    by_name = model.shard and isinstance(source, str | Path)  # sharded weights are not gathered
    return {"lm": other, "source": str(source) if by_name else None}


def model_settings(lm: PreTrainedModel) -> dict[str, Any]:
    """Return a language model's configuration, the attention it computes by included."""
    generation = None if lm.generation_config is None else lm.generation_config.to_diff_dict()
    if generation is not None:
        generation.pop("transformers_version", None)
    config = {**lm.config.to_diff_dict(), "model_type": lm.config.model_type}
    config.pop("dtype", None)  # of the file that it came from: here it is always float32
    config.pop("transformers_version", None)
    return {
        "config": config,
        "attention": lm.config._attn_implementation,
        "generation": generation,
        "name": lm.name_or_path,  # adapters saved alone say by it where their base model is
    }


def logged(model: "ResumablePPO") -> dict[str, Any]:
    """Return what has been logged since the last line was written."""
    logger = getattr(model, "_logger", None)
    pending: dict[str, Any] = {}
    if logger is None:
        return pending
    for key, value in logger.name_to_value.items():
        try:
            plain = to_json(value, key)
        except TypeError as error:
            warnings.warn(f"not in the checkpoint: logged {error}", stacklevel=2)
            continue
        pending[key] = {"value": plain, "excluded": to_json(logger.name_to_excluded.get(key))}
        if count := logger.name_to_count.get(key):  # of a mean that is being taken
            pending[key]["count"] = count
    return pending
