"""A TokenPPO from what `agents.training_state` wrote down of one.

Models are made from their configurations, and weights and optimizer put into them. What belongs to
other hands, environment, generators and callbacks, is put in place by `agents.resumable`.
"""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch as th
from stable_baselines3.common.utils import update_learning_rate
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel

from agents.checkpoint import Tensors
from agents.json_state import from_json
from agents.schedules import rebuild
from agents.training_state import SCHEDULES, SETTINGS, machine, model_settings, own_tensors

if TYPE_CHECKING:
    from agents.resumable import ResumablePPO


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
    own = dict(given.pop("rollout_buffer_kwargs", {}))
    if "normalize_advantage" in given:  # the constructor's name for it
        own["whiten_advantages"] = given.pop("normalize_advantage")
    kept = {name: chosen(name, was, own) for name, was in state["buffer"]["arguments"].items()}
    found["rollout_buffer_kwargs"] = {**defaults, **kept, **own}
    policy, own = state["policy"], dict(given.pop("policy_kwargs", {}))
    arguments = {
        name: chosen(name, from_json(value), own) for name, value in policy["arguments"].items()
    }
    optimizer = own.pop("optimizer_class", None) or getattr(th.optim, policy["optimizer"], None)
    got = optimizer.__name__ if isinstance(optimizer, type) else "none, and torch has none"
    is_one = isinstance(optimizer, type) and issubclass(optimizer, th.optim.Optimizer)
    if not is_one or got != policy["optimizer"]:
        raise ValueError(
            f"optimizer_class: expected load(…, policy_kwargs={{'optimizer_class': …}}) with the "
            f"checkpoint's {policy['optimizer']}, got {got}"
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
    config._name_or_path = settings["name"]
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
        warn_of_another_configuration(lm, settings)
        generation = settings["generation"]
        lm.generation_config = (
            None if generation is None else GenerationConfig.from_dict(dict(generation))
        )
    set_reference(model, state, tensors)


def warn_of_another_configuration(lm: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Say in what a model that the caller gave differs from the one that was written down."""
    here, there = (
        {**s["config"], "attention": s["attention"]} for s in (model_settings(lm), settings)
    )
    other = [
        f"{name} {there.get(name)!r} in the checkpoint, {here.get(name)!r} from now on"
        for name in sorted({*here, *there} - {"architectures"})
        if here.get(name) != there.get(name)
    ]
    if other:
        warnings.warn(f"lm: another configuration, {'; '.join(other)}", stacklevel=4)


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
) -> list[tuple[PreTrainedModel, Mapping[str, Any]]]:
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
