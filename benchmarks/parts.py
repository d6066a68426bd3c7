"""Single figures: the environment's speed alone, and the memory of a long rollout.

python -m benchmarks.parts environment         token-steps per second at 64 rows
python -m benchmarks.parts memory              64 rows × 512 tokens with SmolLM2-135M
python -m benchmarks.parts memory bfloat16
"""

import os
import sys
import time

import numpy as np

from benchmarks.throughput import machine, peak_memory, say


def environment(rows: int = 64, steps: int = 5000) -> None:
    """Step the environment with random tokens; no model, a reward that costs nothing."""
    from benchmarks.peers import text_env
    from benchmarks.workloads import VOCABULARY, Workload

    env = text_env(Workload("environment", rows, 64, 1, eos_share=0.02))
    env.reset()
    actions = np.random.default_rng(0).integers(0, VOCABULARY, size=(steps, rows))
    start = time.perf_counter()
    for action in actions:
        env.step(action)
    seconds = time.perf_counter() - start
    say(f"environment alone: {steps * rows / seconds:,.0f} token-steps/s at {rows} rows")


def memory(dtype: str = "float32") -> None:
    """Write 64 completions of 512 tokens, reference and KL included, and read the peak."""
    import torch as th

    from agents import TokenPPO
    from benchmarks.peers import text_env
    from benchmarks.workloads import Workload

    before = peak_memory()
    workload = Workload("memory", n_prompts=64, max_new_tokens=512, n_epochs=1, real=True)
    model = TokenPPO(
        "CausalLMPolicy",
        text_env(workload, autoreset=False),
        n_steps=512,
        whole_episodes=True,
        batch_size=512,
        policy_kwargs={"lm": workload.model(), "dtype": dtype},
        seed=0,
        device="cpu",
    )
    _, callback = model._setup_learn(1)
    start = time.perf_counter()
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 512)
    seconds = time.perf_counter() - start
    peak = (peak_memory() - before) / 2**30
    vocabulary = model.policy.vocab_size
    say(
        f"64 × 512 tokens at a vocabulary of {vocabulary:,}, {dtype}: {peak:.2f} GiB above the "
        f"imports, {seconds:.0f} s, {th.get_num_threads()} threads"
    )


if __name__ == "__main__":
    environment() if sys.argv[1] == "environment" else memory(*sys.argv[2:])
    say(machine(os.cpu_count() or 1))
