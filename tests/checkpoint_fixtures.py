"""A small training that is stopped and goes on, and what must come out the same."""

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from conftest import letter_tokenizer, tiny_gpt2
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

import text_env
from agents import TokenPPO
from agents.checkpoint import read_checkpoint

TIMES = ("time/fps", "time/time_elapsed")
"""Logged figures that are of the clock."""


def count_a(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    return [float(c.count("a")) for c in completions]


def make_env(num_envs: int = 3, **changes) -> text_env.TextVecEnv:
    settings = {
        "tokenizer": letter_tokenizer("abcdef"),
        "prompts": [">", ">>", ">a>", ">bb>"],
        "reward_fn": count_a,
        "max_new_tokens": 6,
        "min_new_tokens": 2,
        **changes,
    }
    return text_env.TextVecEnv(num_envs=num_envs, **settings)


def decay(progress: float) -> float:
    return 1e-2 * (0.1 + 0.9 * progress)


def make_model(env=None, algorithm: type[TokenPPO] = TokenPPO, **changes) -> TokenPPO:
    """3 rows of 8 steps: 24 tokens a rollout. The learning rate is a callable."""
    settings: dict[str, Any] = {
        "learning_rate": decay,
        "n_steps": 8,
        "batch_size": 12,
        "seed": 0,
        "device": "cpu",
        "target_ref_kl": 0.5,
        "kl_horizon": 20,
        **changes,
    }
    kwargs = {"lm": tiny_gpt2(9, width=16), **settings.pop("policy_kwargs", {})}
    env = env if env is not None else make_env()
    return algorithm("CausalLMPolicy", env, policy_kwargs=kwargs, **settings)


class Rows(KVWriter):
    """Keeps what is logged, but for figures of the clock."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values, key_excluded, step: int = 0) -> None:
        # Both, as what a figure is excluded from is stored too.
        self.rows.append({k: (v, key_excluded[k]) for k, v in key_values.items() if k not in TIMES})

    def close(self) -> None:
        pass


class Watch(BaseCallback):
    """Keeps every token and every finished episode; saves after given steps, without stopping."""

    def __init__(self, folder: Path, stops: list[int], at: str = "token") -> None:
        super().__init__()
        self.folder, self.stops, self.at = folder, stops, at
        self.tokens: list[list[int]] = []
        self.episodes: list[Any] = []
        self.before = {"tokens": 0, "episodes": 0}
        self.stop_now = False

    def _on_step(self) -> bool:
        self.tokens.append(self.locals["actions"].reshape(-1).tolist())
        if self.at == "step" and self.n_calls in self.stops:
            self.model.save(self.folder / str(self.n_calls))
        return True

    def between_tokens(self) -> None:
        if self.at == "token" and self.n_calls in self.stops:
            self.model.save(self.folder / str(self.n_calls))
            if self.stop_now:
                raise Stop

    def _on_rollout_end(self) -> None:
        self.episodes.append(
            [
                {k: v for k, v in plain(e).items() if k != "episode"}
                | {"episode": {k: v for k, v in plain(e).get("episode", {}).items() if k != "t"}}
                for e in self.model.finished_episodes
            ]
        )

    def get_state(self) -> dict[str, Any]:
        seen = {"tokens": len(self.tokens), "episodes": len(self.episodes)}
        return {name: self.before[name] + n for name, n in seen.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.before = state


class Stop(Exception):
    pass


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda x: np.asarray(x).tolist()))


def run(
    model: TokenPPO, total: int, callback: Watch, go_on: bool = False, *others: BaseCallback
) -> list[dict[str, Any]]:
    """Train; return what was logged."""
    rows = Rows()
    model.set_logger(Logger(None, [rows]))
    with contextlib.suppress(Stop):
        model.learn(total, callback=[*others, callback], reset_num_timesteps=not go_on)
    return rows.rows


def leaves(tree: Any, place: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yield what a state holds, with its place; a list of plain values is one item."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*place, key))
    elif isinstance(tree, list) and any(isinstance(x, dict | list) for x in tree):
        for i, value in enumerate(tree):
            yield from leaves(value, (*place, i))
    elif tree is not None and tree != []:
        yield place, tree


def perturbed(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, th.Tensor):
        if value.dtype == th.bool:
            return ~value
        return value * 1.5 + 0.01 if value.is_floating_point() else value + 1
    if isinstance(value, list):
        return [perturbed(value[0]), *value[1:]]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return value + 1 if value == value else 0.5


def result(model: TokenPPO, folder: Path, rows: list, callback: Watch) -> dict[str, Any]:
    """All that must be the same: the state at the end, the log's end, tokens and episodes."""
    model.save(folder)
    state, tensors = read_checkpoint(folder)
    return {"state": without_clock(state), "tensors": tensors, "rows": rows,
            "tokens": callback.tokens, "episodes": callback.episodes}  # fmt: skip


def without_clock(state: dict[str, Any]) -> dict[str, Any]:
    """Drop what is of the clock."""
    state = copy.deepcopy(state)
    del state["progress"]["seconds"]
    for episode in state["statistics"]["episodes"]:
        del episode["t"]
    return state


def differences(never: dict[str, Any], resumed: dict[str, Any]) -> list[str]:
    """Name what differs between a run that never stopped and the end of one that went on."""
    found = []
    for file in sorted(set(never["tensors"]) | set(resumed["tensors"])):
        a, b = never["tensors"].get(file, {}), resumed["tensors"].get(file, {})
        found += [f"{file}: {n}" for n in set(a) ^ set(b)]
        found += [f"{file}: {n}" for n in set(a) & set(b) if not same(a[n], b[n])]
    found += paths_that_differ(never["state"], resumed["state"], "state")
    for name in ("rows", "tokens", "episodes"):
        a, b = never[name], resumed[name]
        # repr: NaN is the same as NaN here
        if repr(a[len(a) - len(b) :]) != repr(b) or not b:
            found.append(name)
    return found


def same(a: th.Tensor, b: th.Tensor) -> bool:
    """Bit by bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def paths_that_differ(a: Any, b: Any, place: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [x for k in keys for x in paths_that_differ(a.get(k), b.get(k), f"{place}.{k}")]
    return [] if repr(a) == repr(b) else [place]


class Seen(BaseCallback):
    """Keeps the observations of a rollout, and those that its buffer makes of what is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def _on_rollout_start(self) -> None:
        self.seen: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.seen.append(self.model._last_obs.copy())
        return True

    def _on_rollout_end(self) -> None:
        made = self.model.rollout_buffer.observations()
        self.pairs += zip(self.seen, made, strict=True)
