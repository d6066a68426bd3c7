"""What lets a PPO be stopped between any two tokens and go on as if it never had been.

`save` and `load` have SB3's names and another format: a checkpoint folder (`agents.checkpoint`)
in the place of a zip with pickles in it. A save changes nothing in the run that makes it. What is
cached of a rollout's tokens is not stored: a model that goes on decodes the rollout's steps again,
one by one, as they were decoded first, since another way would give other last digits.
"""

import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv

from agents import ranks
from agents.buffer import TokenRolloutBuffer
from agents.callback_state import each_callback, set_callback_states
from agents.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from agents.checkpoint_store import one_before
from agents.env_state import set_env_state
from agents.json_state import from_json
from agents.kl import KLController
from agents.language_model import LM, Reference
from agents.policy import CausalLMPolicy
from agents.random_state import set_random_states
from agents.rebuilding import (
    chosen,
    parameters_in,
    rebuilt_attributes,
    set_parameters,
    set_reference,
    warn_of_another_machine,
)
from agents.training_state import COUNTERS, Stored, training_state

PICKLE = (
    "which holds pickles: loading one runs whatever code is in it. Set allow_pickle if you trust "
    "where it comes from"
)


class ResumablePPO(PPO):
    """SB3's PPO with checkpoints in the place of zips, and exact resume.

    Attributes:
        rollout_under_way: Tokens have been, or are about to be, collected that no update has seen.
    """

    policy: CausalLMPolicy
    rollout_buffer: TokenRolloutBuffer
    kl: KLController
    reference: Reference | None
    ref_lm: LM | None
    shard: bool
    finished_episodes: list[dict[str, Any]]
    policy_kwargs: dict[str, Any]
    ep_info_buffer: deque[Any] | None
    ep_success_buffer: deque[Any] | None
    _last_obs: np.ndarray | None  # type: ignore[assignment]
    _last_episode_starts: np.ndarray | None
    _num_timesteps_at_start: int
    _current_progress_remaining: float
    _tokens_before: int
    _open_kl: np.ndarray
    _num_timesteps = 0
    _stored: Stored | None = None
    _callback: BaseCallback | None = None
    _in_learn = _at_token = rollout_under_way = False
    _iterations, _log_interval = 0, 1
    _step_seen = -1  # of the rollout: between its forward pass and the next, a step is under way

    # ------------------------------------------------------------------------------ saving

    def save(
        self,
        path: Any,
        exclude: Any = None,
        include: Any = None,
        *,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint folder; when this returns, no later crash loses it.

        What it holds is exact between two tokens and between rollouts, and so in a callback's
        `_on_step` (as after the step). In `_on_rollout_end`, with several processes, and with
        environments without `get_state`, everything else is saved, and the rollout under way and
        the environments begin anew. With several processes rank 0 writes (all must call it, if
        sharded).

        Args:
            path: The folder; a checkpoint of this name is replaced.
            exclude: SB3's; there are no attributes to choose here.
            include: SB3's.
            facts: Kept with the checkpoint, JSON types; `load` compares them.

        Raises:
            TypeError: If there is something in it that JSON cannot hold.
            ValueError: If the path is none, or attributes are named.
            OSError: If it cannot be written; what was there is as it was.
        """
        if not isinstance(path, str | Path):
            raise ValueError(f"expected the path of a folder to be, got {type(path).__name__}")
        if exclude or include:
            raise ValueError(
                "expected no exclude and include, which choose what SB3's zip pickles: a "
                "checkpoint has its own format"
            )
        if ranks.rank() > 0:
            if self.shard:
                self.gather_parameters(keep=False)
            return
        with self._at_rest() as exact:
            state, tensors = training_state(self, exact, facts or {})
        write_checkpoint(path, state, tensors)

    @contextmanager
    def _at_rest(self) -> Iterator[bool]:
        """Bring the model to where it can be saved exactly, and back; say whether it is there."""
        if ranks.world_size() > 1:
            yield False
        elif not self.rollout_under_way or self._at_token or self._stored is not None:
            yield True
        elif self._step_seen < self.rollout_buffer.pos and not self.rollout_buffer.full:
            yield True  # before the first token
        elif self._step_seen == self.rollout_buffer.pos and self._callback is not None:
            with self._step_done(self._callback.locals) as exact:
                yield exact
        else:
            yield False

    @contextmanager
    def _step_done(self, loop: dict[str, Any]) -> Iterator[bool]:
        """Do what SB3's loop does after `on_step`, for as long as the context lasts.

        Args:
            loop: The loop's variables, as callbacks see them.
        """
        if any(info.get("TimeLimit.truncated") for info in loop["infos"]):
            yield False  # the loop has a value to add first
            return
        episodes, successes = self.ep_info_buffer, self.ep_success_buffer
        before = (self._last_obs, self._last_episode_starts, self.finished_episodes)
        assert episodes is not None and successes is not None
        assert self._last_obs is not None and self._last_episode_starts is not None
        self.ep_info_buffer, self.ep_success_buffer = episodes.copy(), successes.copy()
        self.finished_episodes = list(self.finished_episodes)
        self._update_info_buffer(loop["infos"], loop["dones"])
        self.rollout_buffer.add(
            self._last_obs,
            loop["actions"],
            loop["rewards"],
            self._last_episode_starts,
            loop["values"],
            loop["log_probs"],
        )
        self._last_obs, self._last_episode_starts = loop["new_obs"], loop["dones"]
        try:
            yield True
        finally:
            self.rollout_buffer.take_back()
            self.ep_info_buffer, self.ep_success_buffer = episodes, successes
            self._last_obs, self._last_episode_starts, self.finished_episodes = before

    @property
    def seconds(self) -> float:
        """How long training has taken, with what came before a checkpoint."""
        started = getattr(self, "start_time", 0) or 0
        return (time.time_ns() - started) / 1e9 if started else 0.0

    # ----------------------------------------------------------------------------- loading

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: Any,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = False,
        *,
        facts: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Make the model that was saved; it goes on with `learn(…, reset_num_timesteps=False)`.

        Where `learn` was under way, its `total_timesteps` means the total from then on.

        Args:
            path: A checkpoint folder.
            env: An environment made as the one that was trained on; it is brought to its state.
                Without one, `set_env(env, force_reset=False)` does that later.
            device: As in SB3.
            custom_objects: For zips only.
            print_system_info: For zips only.
            force_reset: Take the environment as it is, of other prompts or another number of rows
                say: training begins a new rollout in it.
            facts: Must be what was given to `save`, as far as named.
            allow_pickle: Also load a zip that SB3, or TokenPPO until 0.1, has written.
            **kwargs: Other values of the constructor's arguments than the checkpoint's. What a
                checkpoint cannot hold, a schedule that is a Python function say, is required.

        Raises:
            FileNotFoundError: If there is none.
            DamagedCheckpoint: If a file is not what was written, with its name and the checkpoint
                before, if that is whole.
            ValueError: If it is no checkpoint, or environment or arguments do not fit it.
        """
        if not _is_folder(path):
            if not allow_pickle and (not isinstance(path, str | Path) or zip_of(path).exists()):
                raise ValueError(
                    f"expected a checkpoint folder, got {path}, a file of SB3's, {PICKLE}"
                )
            if allow_pickle:
                return super().load(
                    path, env, device, custom_objects, print_system_info, True, **kwargs
                )
        state, tensors = _read(path)
        if state["algorithm"] != cls.__name__:
            raise ValueError(
                f"expected a checkpoint of {cls.__name__}, got one of {state['algorithm']}"
            )
        _compare_facts(path, state["facts"], facts or {})
        model = cls._rebuilt(state, env, device, force_reset, kwargs)
        warn_of_another_machine(state, model.device)
        if env is not None and not force_reset:
            _warn_of_new_episodes(path, state)
        model._put_back(Stored(state, tensors), force_reset)
        set_parameters(model, state, tensors)
        return model

    @classmethod
    def _rebuilt(
        cls,
        state: Mapping[str, Any],
        env: GymEnv | None,
        device: th.device | str,
        force_reset: bool,
        given: dict[str, Any],
    ) -> Self:
        """Make a model of a checkpoint's settings, with weights of its own still."""
        given = dict(given)
        policy = given.pop("policy_class", CausalLMPolicy)
        if policy.__qualname__ != state["policy"]["class"]:
            raise ValueError(
                f"expected load(…, policy_class=<{state['policy']['class']}>), as in the "
                f"checkpoint, got {policy.__qualname__}"
            )
        if env is not None:
            env = cls._wrap_env(env, state["settings"]["verbose"])
            assert isinstance(env, VecEnv)
        model = cls(policy, env, device=device, _init_setup_model=False)  # type: ignore[arg-type]
        buffer = given.pop("rollout_buffer_class", model.rollout_buffer_class)
        if buffer.__qualname__ != state["buffer"]["class"]:
            raise ValueError(
                f"expected load(…, rollout_buffer_class=<{state['buffer']['class']}>), as in the "
                f"checkpoint, got {buffer.__qualname__}"
            )
        spaces = state["spaces"]
        obs_space, action_space = _spaces(spaces)
        if env is not None:
            check_for_correct_spaces(env, obs_space, action_space)
            if env.num_envs != spaces["n_envs"] and not force_reset:
                raise ValueError(
                    f"expected an environment of {spaces['n_envs']} rows, as in the checkpoint, "
                    f"got {env.num_envs}; force_reset=True begins anew in it"
                )
        found = rebuilt_attributes(state, given, model.rollout_buffer_kwargs or {})
        model.__dict__.update(found, rollout_buffer_class=buffer)
        model.observation_space, model.action_space = obs_space, action_space
        model.n_envs = spaces["n_envs"] if env is None else env.num_envs
        kl = {
            name: chosen(argument, state["kl"][name], given)
            for name, argument in (
                ("coef", "kl_coef"), ("target", "target_ref_kl"), ("horizon", "kl_horizon"),
            )
        }  # fmt: skip
        if given:
            raise TypeError(f"expected arguments of {cls.__name__}, got {sorted(given)}")
        # A reference is made for a weight above 0; a callback may have set it to 0 since.
        model.kl = KLController(1.0, kl["target"], kl["horizon"])
        model.kl.coef = float(state["reference"] is not None)
        model._setup_model()
        model.kl.coef = kl["coef"]
        return model

    def _put_back(self, stored: Stored, force_reset: bool) -> None:
        """Set counters, statistics and, with an environment, what is under way in it."""
        state, tensors = stored
        progress = state["progress"]
        for name in COUNTERS:
            setattr(self, name, progress[name])
        self.policy.guard.n_steps = progress["optimizer_steps"]
        self._num_timesteps = self._tokens_before = progress["num_timesteps"]
        if state["rollout"] is not None:
            self._tokens_before = state["rollout"]["tokens_before"]
        if self._total_timesteps:
            self._update_current_progress_remaining(self._tokens_before, self._total_timesteps)
        if state["statistics"]["begun"]:
            self._begin_statistics()
            assert self.ep_info_buffer is not None and self.ep_success_buffer is not None
            self.ep_info_buffer.extend(from_json(state["statistics"]["episodes"]))
            self.ep_success_buffer.extend(from_json(state["statistics"]["successes"]))
        if force_reset:
            self._tokens_before = self._num_timesteps
            self._stored = Stored({**state, "environment": None, "rollout": None}, tensors)
            return
        self._stored = stored
        self._open_kl = tensors["rollout"]["open_kl"].numpy().copy()
        if state["environment"] is not None:
            self._last_obs = tensors["rollout"]["last_obs"].numpy().copy()
            starts = tensors["rollout"]["last_episode_starts"].numpy().copy()
            self._last_episode_starts = starts
        if state["rollout"] is not None:
            steps = {
                name.removeprefix("step."): tensor
                for name, tensor in tensors["rollout"].items()
                if name.startswith("step.")
            }
            self.rollout_buffer.set_state(steps)
            expected = self._tokens_before + self.rollout_buffer.n_tokens
            if self._num_timesteps != expected:
                raise ValueError(
                    f"expected {expected} tokens, which are in the checkpoint, got the number "
                    f"{self._num_timesteps}: it does not fit together"
                )
            self.finished_episodes = from_json(state["rollout"]["finished_episodes"])
            self.rollout_under_way = True
        self._set_environment()

    def _begin_statistics(self) -> None:
        self.ep_info_buffer = deque(maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)

    def _set_environment(self) -> None:
        """Bring the environment to where a loaded model left it, if it did."""
        stored = self._stored
        if stored is None or stored.state["environment"] is None or self.env is None:
            return
        set_env_state(self.env, stored.state["environment"])
        if self.env.has_attr("allowed_tokens"):
            allowed = np.array(self.env.get_attr("allowed_tokens")[0], dtype=bool)
            if not np.array_equal(allowed, stored.tensors["policy"]["allowed_tokens"].numpy()):
                raise ValueError(
                    "expected an environment that allows the tokens of the checkpoint's "
                    "vocabulary, got one that allows others; force_reset=True begins anew in it"
                )

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Set the environment, as in SB3; with `force_reset` nothing is left of the one before."""
        super().set_env(env, force_reset)
        if force_reset:
            self._begin_anew()
        else:
            self._set_environment()

    def _begin_anew(self) -> None:
        """Drop the rollout and the environment's state that a checkpoint brought."""
        self.rollout_under_way = False
        self.rollout_buffer.drop()
        if self._stored is not None:
            state = {**self._stored.state, "environment": None, "rollout": None}
            self._stored = Stored(state, self._stored.tensors)

    def _leave_rollout(self) -> None:
        """Leave a rollout that no update will see: episodes that ended in it end uncounted."""
        if self.rollout_under_way and self._last_episode_starts is not None:
            seen = self.rollout_buffer.episode_starts[: self.rollout_buffer.pos]
            self._open_kl[seen.any(axis=0) | self._last_episode_starts] = 0
        self.rollout_under_way = False

    def set_parameters(
        self,
        load_path_or_dict: str | Path | dict[str, dict],  # type: ignore[override]
        exact_match: bool = True,
        device: th.device | str = "auto",
        *,
        allow_pickle: bool = False,
    ) -> None:
        """Set SB3's state dicts, or those of a checkpoint; of a zip only with `allow_pickle`."""
        states: Any = load_path_or_dict
        if not isinstance(states, dict):
            if _is_folder(states):
                state, tensors = _read(states)
                states = parameters_in(state, tensors)
                set_reference(self, state, tensors)
            elif not allow_pickle:
                raise ValueError(
                    f"expected a checkpoint folder, got {states}, a file of SB3's, {PICKLE}"
                )
        self._set_states(states, exact_match, device)
        self.policy.forget()

    def gather_parameters(self, lm_only: bool = False, keep: bool = True) -> dict[str, Any]:
        """Bring a sharded model's state together."""
        raise NotImplementedError

    def _set_states(self, states: Any, exact_match: bool, device: th.device | str) -> None:
        super().set_parameters(states, exact_match, device)

    # ---------------------------------------------------------------------------- going on

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train, as in SB3; a loaded model goes on where it was, `total_timesteps` in all."""
        self._log_interval, self._in_learn = log_interval, True
        try:
            return super().learn(
                total_timesteps, callback, 1, tb_log_name, reset_num_timesteps, progress_bar
            )
        finally:
            self._in_learn = False
            if self._stored is None:  # else it never went on, and still can
                self._leave_rollout()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        """Set SB3's counters; those of a loaded model, whose `learn` was under way, stay."""
        if reset_num_timesteps:
            self._begin_anew()
            self._stored = None
        stored = self._stored
        going_on = stored is not None and stored.state["progress"]["in_learn"]
        before = (self._num_timesteps_at_start, self._iterations)
        if stored is not None and going_on:
            self._check_total(total_timesteps)
            total_timesteps -= self.num_timesteps  # SB3 adds it
        self._set_environment()
        total, made = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self._iterations = 0
        if stored is not None and going_on:
            self._num_timesteps_at_start, self._iterations = before
            self.start_time -= int(stored.state["progress"]["seconds"] * 1e9)
            self._num_timesteps = self._tokens_before  # the loop asks as the rollout begins
        return total, made

    def _check_total(self, total_timesteps: int) -> None:
        """Require something to do; say so if it is another total than before."""
        if total_timesteps <= self._tokens_before:
            raise ValueError(
                f"this training was stopped at {self.num_timesteps} of {self._total_timesteps} "
                f"tokens: expected total_timesteps above that, in all, got {total_timesteps}"
            )
        if total_timesteps != self._total_timesteps:
            warnings.warn(
                f"total_timesteps: {self._total_timesteps} in the checkpoint, {total_timesteps} "
                "from now on: schedules go by it",
                stacklevel=6,
            )

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log, as in SB3, whose loop counts iterations from its own start."""
        if iteration == 0:
            super().dump_logs()
            return
        self._iterations += 1
        if self._log_interval is not None and self._iterations % self._log_interval == 0:
            super().dump_logs(self._iterations)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """Set callbacks up as SB3 does, and remember them."""
        self._callback = super()._init_callback(callback, progress_bar)
        return self._callback

    def _before_token(self, *_: object) -> None:
        """Between two tokens everything is at rest: a loaded model goes on; savers may save."""
        step = self.rollout_buffer.pos
        if step == self._step_seen:  # a callback's own call of the policy
            return
        self._step_seen = step
        self._go_on()
        if ranks.world_size() > 1:
            return
        self._at_token = True
        try:
            for callback in each_callback(self._callback):
                between = getattr(callback, "between_tokens", None)
                if between is not None:
                    between()
        finally:
            self._at_token = False

    def _go_on(self) -> None:
        """Put in place what a loaded model had in other hands: generators, callbacks, the log."""
        stored, self._stored = self._stored, None
        if stored is None:
            return
        set_callback_states(self._callback, stored.state["callbacks"])
        logger: Logger = self.logger
        for key, pending in stored.state["logger"].items():
            logger.name_to_value[key] = from_json(pending["value"])
            logger.name_to_excluded[key] = from_json(pending["excluded"])
            if "count" in pending:
                logger.name_to_count[key] = pending["count"]
        set_random_states(stored.state["random"], stored.tensors["random"])

    def _excluded_save_params(self) -> list[str]:
        """Keep what belongs to a moment out of SB3's zip."""
        return [*super()._excluded_save_params(), "_stored", "_callback"]


def zip_of(path: str | Path) -> Path:
    """Return the file that SB3 would open."""
    path = Path(path)
    return path if path.exists() or path.suffix else path.with_suffix(".zip")


def _is_folder(path: Any) -> bool:
    if not isinstance(path, str | Path):
        return False
    return Path(path).is_dir() or not zip_of(path).exists()


def _read(path: str | Path) -> tuple[dict[str, Any], Any]:
    """Read a checkpoint; offer the one before if it is damaged."""
    try:
        return read_checkpoint(path)
    except DamagedCheckpoint as error:
        other = one_before(path)
        offer = f"; the one before, {other}, is whole" if other is not None else ""
        raise DamagedCheckpoint(f"{error}{offer}") from error


def _compare_facts(path: Any, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Require that what is named is as it was.

    Raises:
        ValueError: If not, with all that differs.
    """
    other = [
        f"{name}: {there.get(name)!r} there, {value!r} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if other:
        raise ValueError(f"{path}: the checkpoint is of another run; {'; '.join(other)}")


def _warn_of_new_episodes(path: Any, state: Mapping[str, Any]) -> None:
    """Say that a training does not go on exactly, as its environments are not in the checkpoint."""
    if state["environment"] is None and state["progress"]["in_learn"]:
        warnings.warn(
            f"{path} has no environments and no rollout in it: it was made by several processes, "
            "in on_rollout_end, or in environments without get_state. Training goes on from its "
            "weights and optimizer, in new episodes, not as it would have (docs/guarantees.md)",
            stacklevel=3,
        )


def _spaces(spaces: Mapping[str, Any]) -> tuple[gym.spaces.Box, gym.spaces.Discrete]:
    n_tokens, dtype = spaces["vocab_size"], np.dtype(spaces["obs_dtype"]).type
    box = gym.spaces.Box(-1, n_tokens - 1, (spaces["longest"],), dtype)
    return box, gym.spaces.Discrete(n_tokens)
