"""The state of a vectorised environment, what SB3's wrappers keep of it included.

The environment's own state is what its `get_state` gives (JSON) and `set_state` takes; an
environment without them cannot go on in mid-episode.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
)

from agents.json_state import from_json, to_json

KEPT: dict[type, tuple[str, ...]] = {
    VecMonitor: ("episode_returns", "episode_lengths", "episode_count"),
    VecNormalize: ("returns",),
    Monitor: ("rewards", "total_steps"),
    gym.wrappers.TimeLimit: ("_elapsed_steps",),
}
"""What wrappers remember of the episodes under way. (Of the seconds that they took, nothing.)"""

SETTINGS: dict[type, tuple[str, ...]] = {
    VecNormalize: ("gamma", "epsilon", "clip_reward", "norm_reward", "training"),
    gym.wrappers.TimeLimit: ("_max_episode_steps",),
}
"""How wrappers were made, as far as it changes what is learned."""

STATELESS = (gym.wrappers.OrderEnforcing, gym.wrappers.PassiveEnvChecker)


def env_state(env: VecEnv) -> Any:
    """Return an environment's state as JSON; None if some part of it has no way to tell."""
    layers: list[Any] = []
    while isinstance(env, VecEnvWrapper):
        if type(env) not in (VecMonitor, VecNormalize) or getattr(env, "norm_obs", False):
            return None
        layers.append(_kept(env))
        if isinstance(env, VecNormalize):
            layers[-1]["ret_rms"] = _moments(env.ret_rms)
        env = env.venv
    if hasattr(type(env), "get_state"):
        return {"layers": layers, "rows": env.get_state()}  # type: ignore[attr-defined]
    if not isinstance(env, DummyVecEnv) or not env.has_attr("get_state"):
        return None
    chains = [_chain(row) for row in env.envs]
    if any(chain is None for chain in chains):
        return None
    inner = [[_kept(layer) for layer in chain or ()] for chain in chains]
    return {"layers": layers, "inner": inner, "rows": env.env_method("get_state")}


def set_env_state(env: VecEnv, state: Any) -> None:
    """Bring an environment, made as the one that was saved, to its state.

    Raises:
        ValueError: If it is of another make, with what differs.
    """
    env.reset()  # wrappers want one before the first step
    layers = list(state["layers"])
    while isinstance(env, VecEnvWrapper):
        if not layers or layers[0]["of"] != type(env).__name__:
            raise _of_another_make(env, layers)
        _set_kept(env, layers.pop(0))
        env = env.venv
    own = hasattr(type(env), "set_state")
    if layers or own == ("inner" in state) or not (own or isinstance(env, DummyVecEnv)):
        raise _of_another_make(env, layers)
    if own:
        env.set_state(state["rows"])  # type: ignore[attr-defined]
        return
    if len(state["rows"]) != env.num_envs:
        raise ValueError(
            f"expected an environment of {len(state['rows'])} rows, got {env.num_envs}"
        )
    for i, (row, layers) in enumerate(zip(env.envs, state["inner"], strict=True)):
        chain = _chain(row)
        if chain is None or [type(layer).__name__ for layer in chain] != [x["of"] for x in layers]:
            raise _of_another_make(row, layers)
        for layer, kept in zip(chain, layers, strict=True):
            _set_kept(layer, kept)
        env.env_method("set_state", state["rows"][i], indices=i)


def _of_another_make(env: Any, layers: list[Any]) -> ValueError:
    names = [layer["of"] for layer in layers] or "no further wrappers"
    return ValueError(
        "expected an environment of the checkpoint's make, got another: "
        f"{type(env).__name__}, where the checkpoint has {names}"
    )


def _chain(env: gym.Env) -> list[gym.Wrapper] | None:
    """Return the wrappers that remember something; None if one is not known."""
    found = []
    while isinstance(env, gym.Wrapper):
        if type(env) in KEPT:
            found.append(env)
        elif type(env) not in STATELESS:
            return None
        env = env.env
    return found


def _kept(layer: Any) -> dict[str, Any]:
    values = {name: to_json(getattr(layer, name)) for name in KEPT[type(layer)]}
    return {"of": type(layer).__name__, "settings": _settings(layer), **values}


def _settings(layer: Any) -> dict[str, Any]:
    return {name: to_json(getattr(layer, name)) for name in SETTINGS.get(type(layer), ())}


def _set_kept(layer: Any, kept: dict[str, Any]) -> None:
    if kept["settings"] != _settings(layer):
        raise ValueError(
            f"expected {type(layer).__name__} with the checkpoint's settings, {kept['settings']}, "
            f"got {_settings(layer)}"
        )
    for name in KEPT[type(layer)]:
        setattr(layer, name, from_json(kept[name]))
    if isinstance(layer, VecNormalize):
        for name, value in from_json(kept["ret_rms"]).items():
            setattr(layer.ret_rms, name, value)


def _moments(statistics: Any) -> dict[str, Any]:
    names = ("mean", "var", "count")
    return {name: to_json(np.asarray(getattr(statistics, name))) for name in names}
