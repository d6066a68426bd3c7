"""Workers killed, stopped or raising: one error within 10 s that names worker and cause."""

import multiprocessing
import os
import signal
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv
from stable_baselines3.common.vec_env import SubprocVecEnv

from text_env.workers import WorkerError, watch, watched_subproc_vec_env


class Small(gym.Env):
    """Says its process number; raises at action 1, sleeps at action 2."""

    observation_space = gym.spaces.Box(0, 2**31, (1,), np.int64)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        return np.array([os.getpid()]), {}

    def step(self, action):
        if action == 1:
            raise ValueError("this environment is broken")
        if action == 2:
            time.sleep(60)
        return np.array([os.getpid()]), 0.0, False, False, {}


class Unmade(Small):
    def __init__(self):
        raise KeyError("no such file")


def make(kind: str, seconds: float = 10.0, env_fns=(Small, Small, Small)):
    if kind == "sb3":
        return watched_subproc_vec_env(env_fns, seconds, start_method="fork")
    return watch(AsyncVectorEnv(env_fns, context="fork", shared_memory=False), seconds)


def gone(pids: list[int]) -> bool:
    """Whether none of these processes is there, not even a zombie."""
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.fixture(params=["sb3", "gymnasium"])
def kind(request) -> str:
    return request.param


def test_a_healthy_batch_works_and_closes(kind: str) -> None:
    envs = make(kind)
    observations = envs.reset() if kind == "sb3" else envs.reset()[0]
    pids = [p.pid for p in envs.processes]
    assert observations[:, 0].tolist() == pids
    for _ in range(3):
        envs.step(np.zeros(3, dtype=int))
    envs.close()
    assert gone(pids)


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGSTOP, r"is stopped \(SIGSTOP\): no answer within 2 s"),
        ("raise", "raised ValueError: this environment is broken"),
        ("sleep", "hangs: no answer within 2 s"),
    ],
)
def test_one_error_names_worker_and_cause_and_leaves_no_orphan(kind: str, number, cause) -> None:
    envs = make(kind, seconds=2)
    envs.reset()
    pids = [p.pid for p in envs.processes]
    actions = np.zeros(3, dtype=int)
    if isinstance(number, str):
        actions[1] = {"raise": 1, "sleep": 2}[number]
    else:
        os.kill(pids[1], number)
        time.sleep(0.2)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=rf"worker 1 \(process {pids[1]}\) {cause}"):
        envs.step(actions)
    assert time.monotonic() - start < 10
    assert gone(pids)
    envs.close()
    assert time.monotonic() - start < 10


def test_a_worker_that_dies_in_reset_is_named(kind: str) -> None:
    envs = make(kind, seconds=2)
    os.kill(envs.processes[2].pid, signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(WorkerError, match=r"worker 2 .* was killed by SIGKILL"):
        envs.reset()


@pytest.mark.parametrize("bad", [0, 1])
def test_an_environment_that_cannot_be_made_is_named(bad: int) -> None:
    env_fns = [Small, Small]
    env_fns[bad] = Unmade
    before = set(multiprocessing.active_children())
    with pytest.raises(WorkerError, match=rf"worker {bad} .* raised KeyError: 'no such file'"):
        watched_subproc_vec_env(env_fns, 5, "fork", start_seconds=5)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.slow
def test_with_sb3s_own_start_method() -> None:
    envs = watched_subproc_vec_env([Small, Small])  # their start, with torch, takes longer
    pids = [p.pid for p in envs.processes]
    assert envs.reset()[:, 0].tolist() == pids
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 0 .* was killed by SIGKILL"):
        for _ in range(3):
            envs.step(np.zeros(2, dtype=int))
    assert gone(pids)


def test_other_batches_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a SubprocVecEnv or an AsyncVectorEnv"):
        watch(gym.vector.SyncVectorEnv([Small]))
    with pytest.raises(ValueError, match="seconds"):
        watched_subproc_vec_env([Small], seconds=0)


def test_what_sb3_does_by_itself() -> None:
    """The reason for all this: it waits for ever, or says nothing. It may learn to say more."""
    envs = SubprocVecEnv([Small, Small], start_method="fork")
    envs.reset()
    errors: list[Exception] = []

    def step() -> None:
        try:
            envs.step(np.zeros(2, dtype=int))
        except Exception as error:
            errors.append(error)

    os.kill(envs.processes[1].pid, signal.SIGKILL)
    time.sleep(0.2)
    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    thread.join(2)
    assert thread.is_alive()
    envs.processes[0].kill()  # which held the other end of the dead one's pipe
    thread.join(10)
    assert isinstance(errors[0], EOFError | OSError) and "worker" not in str(errors[0])
