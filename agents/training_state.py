"""Everything that a TokenPPO is at a moment, as JSON and tensors, and a TokenPPO from it again.

Nothing is left to a pickle: models are rebuilt from their configurations, weights, optimizer and
rollout are tensors, the rest is numbers and text. `agents.checkpoint` brings it to the disk.
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
from stable_baselines3.common.utils import update_learning_rate
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from agents import ranks
from agents.callback_state import callback_states
from agents.checkpoint import Tensors
from agents.env_state import env_state
from agents.json_state import from_json, to_json
from agents.policy import CausalLMPolicy
from agents.random_state import random_states
from agents.schedules import describe, rebuild

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


# ------------------------------------------------------------------------------------- out


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


# -------------------------------------------------------------------------------------- in


def rebuilt_attributes(
    state: Mapping[str, Any], given: dict[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the attributes of a model that SB3's constructor would set.

    Args:
        state: The checkpoint's JSON.
        given: The caller's own arguments, which come first; those that are used are taken out.
        defaults: The algorithm's arguments of its rollout buffer.

    Raises:
        ValueError: If something cannot be rebuilt without the caller's help.
    """
    found: dict[str, Any] = {}
    for name in SETTINGS:
        stored = from_json(state["settings"][name])
        found[name] = chosen(name.removeprefix("_"), stored, given)
    for name in SCHEDULES:
        is_given = name in given
        found[name] = rebuild(name, state["schedules"][name], given.pop(name, None), is_given)
    found["rollout_buffer_kwargs"] = {
        **defaults,
        **state["buffer"]["arguments"],
        **given.pop("rollout_buffer_kwargs", {}),
    }
    policy = state["policy"]
    arguments = {name: from_json(value) for name, value in policy["arguments"].items()}
    own = given.pop("policy_kwargs", {})
    optimizer = own.get("optimizer_class") or getattr(th.optim, policy["optimizer"], None)
    if not (isinstance(optimizer, type) and issubclass(optimizer, th.optim.Optimizer)):
        raise ValueError(
            f"optimizer_class: expected load(…, policy_kwargs={{'optimizer_class': …}}) with "
            f"{policy['optimizer']}, which is none of torch's, got none"
        )
    arguments |= {"optimizer_class": optimizer, "lm": config_of(policy["lm"])}
    arguments["value_lm"] = None if policy["value_lm"] is None else config_of(policy["value_lm"])
    found["policy_kwargs"] = {**arguments, **own}
    reference = state["reference"]
    found["ref_lm"] = given.pop("ref_lm", None)
    if found["ref_lm"] is None and reference is not None:
        lm = reference["lm"]
        found["ref_lm"] = reference["source"] or (None if lm is None else config_of(lm))
    return found


def chosen(argument: str, stored: Any, given: dict[str, Any]) -> Any:
    """Return an argument's value: the caller's, taken out of `given`, or the stored."""
    value = given.pop(argument, stored)
    if value != stored:
        warnings.warn(
            f"{argument}: {stored!r} in the checkpoint, {value!r} from now on", stacklevel=5
        )
    return value


def config_of(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration that `model_settings` wrote down.

    Raises:
        ValueError: If transformers does not know its kind.
    """
    values = dict(settings["config"])
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"expected load(…, policy_kwargs={{'lm': …}}) for a model of type {kind!r}, which "
            "this version of transformers does not know, got none"
        )
    config = CONFIG_MAPPING[kind].from_dict(values)
    config._attn_implementation = settings["attention"]
    return config


def set_parameters(model: "ResumablePPO", state: Mapping[str, Any], tensors: Tensors) -> None:
    """Put weights and optimizer state into a model that has been rebuilt.

    Raises:
        ValueError: If they are another model's.
    """
    try:
        model.set_parameters(parameters_in(state, tensors), exact_match=True)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint's weights are another model's: {reason}") from error
    progress = model._current_progress_remaining
    update_learning_rate(model.policy.optimizer, model.lr_schedule(progress))
    for lm, settings in models_of(model, state):
        generation = settings["generation"]
        lm.generation_config = (
            None if generation is None else GenerationConfig.from_dict(dict(generation))
        )
    set_reference(model, state, tensors)


@th.no_grad()
def set_reference(model: "ResumablePPO", state: Mapping[str, Any], tensors: Tensors) -> None:
    """Put in place the weights that the reference does not share with the policy.

    Raises:
        ValueError: If they are another model's.
    """
    if (state["reference"] or {}).get("source"):
        return  # it was loaded by its name
    saved = with_tied(tensors.get("reference", {}), state["tied"], "reference:")
    for name, tensor in own_tensors(model).items():
        if name not in saved:
            raise ValueError(f"the checkpoint's reference model is another: it has no {name}")
        if tensor.shape != saved[name].shape:
            raise ValueError(f"the checkpoint's reference model is another, by {name}")
        if isinstance(tensor, DTensor):
            distributed = distribute_tensor(saved[name], tensor.device_mesh, tensor.placements)
            tensor.copy_(distributed)
        else:
            tensor.copy_(saved[name])


def models_of(
    model: "ResumablePPO", state: Mapping[str, Any]
) -> list[tuple[nn.Module, Mapping[str, Any]]]:
    """Return a policy's language models, each with what was written down of it."""
    found = [(model.policy.lm, state["policy"]["lm"])]
    if model.policy.value_network is not None:
        found.append((model.policy.value_network.lm, state["policy"]["value_lm"]))
    return found


def parameters_in(state: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Return SB3's state dicts, as `get_parameters` gives them, from a checkpoint."""
    optimizer: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors["optimizer"].items():
        number, _, name = key.partition(".")
        # A tensor of its own: one in the file's memory lies as it happens to lie.
        optimizer.setdefault(int(number), {})[name] = tensor.clone()
    for key, value in state["optimizer"]["scalars"].items():
        number, _, name = key.partition(".")
        optimizer.setdefault(int(number), {})[name] = from_json(value)
    groups = [{**from_json(group), "lr": 0.0} for group in state["optimizer"]["groups"]]
    return {
        "policy": with_tied(tensors["policy"], state["tied"]),
        "policy.optimizer": {"state": optimizer, "param_groups": groups},
    }


def with_tied(
    tensors: Mapping[str, th.Tensor], tied: Mapping[str, str], prefix: str = ""
) -> dict[str, th.Tensor]:
    """Return tensors under all of their names: those in `tied` that begin with `prefix`."""
    named = {
        alias.removeprefix(prefix): tensors[name]
        for alias, name in tied.items()
        if alias.startswith("reference:") == bool(prefix)
    }
    return {**tensors, **named}


def warn_of_another_machine(state: Mapping[str, Any], device: th.device) -> None:
    """Say what keeps a model from going on to the last bit."""
    there, here = state["machine"], machine(device)
    differing = [f"{k} {v} (now {here.get(k)})" for k, v in there.items() if v != here.get(k)]
    if differing:
        warnings.warn(
            "the checkpoint was written with " + ", ".join(differing) + ": training goes on, but "
            "not to the last bit as it would have",
            stacklevel=3,
        )
