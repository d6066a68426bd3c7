"""Many episodes and many environments: memory, threads and file descriptors stay level.

Measured from /proc, after a warm-up; a leak of 10 KB an episode, or of a thread or file per
environment, would be seen.
"""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import letter_tokenizer

import text_env
from reward_models import TimeLimitedReward

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")

MEMORY = 8.0
"""MiB that memory may grow by."""


def level() -> tuple[float, int, int]:
    """Resident memory (MiB), threads, open file descriptors."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return memory, threading.active_count(), len(os.listdir("/proc/self/fd"))


def arguments() -> dict:
    def score(prompts: list[str], completions: list[str], **_: list) -> list[float]:
        return [float(len(c)) for c in completions]

    return {
        "tokenizer": letter_tokenizer(),
        "prompts": [">a", ">b", ">c"],
        "reward_fn": TimeLimitedReward(score, 60),
        "max_new_tokens": 8,
    }


def write(env: text_env.TextVecEnv, n_episodes: int) -> None:
    env.seed(0)
    env.reset()
    rng = np.random.default_rng(0)
    while n_episodes > 0:
        _, _, dones, _ = env.step(rng.integers(0, 8, size=env.num_envs))
        n_episodes -= dones.sum()


def test_two_thousand_episodes() -> None:
    env = text_env.TextVecEnv(num_envs=4, **arguments())
    write(env, 300)
    before = level()
    write(env, 2000)
    after = level()
    assert after[0] - before[0] < MEMORY and after[1:] == before[1:]


@pytest.mark.parametrize("face", ["env", "vector", "sb3"])
def test_fifty_environments_made_and_closed(face: str) -> None:
    make = {
        "env": text_env.TextEnvironment,
        "vector": lambda **a: text_env.TextVectorEnv(2, **a),
        "sb3": lambda **a: text_env.TextVecEnv(2, **a),
    }[face]

    def cycle() -> None:
        env = make(**arguments())
        env.reset()
        for _ in range(20):
            env.step(0 if face == "env" else np.zeros(2, dtype=int))
            if face == "env" and not env.episodes.active[0]:
                env.reset()
        env.close()

    for _ in range(10):
        cycle()
    before = level()
    for _ in range(50):
        cycle()
    after = level()
    assert after[0] - before[0] < MEMORY and after[1:] == before[1:]
