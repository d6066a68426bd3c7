"""Single figures: the environment's speed alone, and the memory of a long rollout.

python -m benchmarks.parts environment         token-steps per second at 64 rows
python -m benchmarks.parts length              time per token at 32 and at 512 new tokens
python -m benchmarks.parts memory              64 rows × 512 tokens with SmolLM2-135M
python -m benchmarks.parts memory bfloat16
"""

import os
import sys
import time
from contextlib import suppress
from statistics import median

import numpy as np

from benchmarks.throughput import machine, peak_memory, say
from benchmarks.timing import Timing


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


def length(rounds: int = 3) -> None:
    """Compare 512 new tokens with 32: decoding with the same rows, updates of as many tokens."""
    import torch as th

    from benchmarks.peers import Ours, Stop
    from benchmarks.workloads import Workload

    th.set_num_threads(os.cpu_count() or 1)
    shapes = {"8 × 32": (8, 32), "128 × 32": (128, 32), "8 × 512": (8, 512)}
    peers = {
        name: Ours(Workload(name, rows, tokens, n_epochs=4), "float32")
        for name, (rows, tokens) in shapes.items()
    }
    timings: dict[str, list[Timing]] = {name: [] for name in shapes}
    for _ in range(rounds + 1):
        for name, peer in peers.items():

            def report(timing: Timing, name: str = name) -> None:
                timings[name].append(timing)
                raise Stop

            with suppress(Stop):
                peer.run(report)
    rollout, update = (
        {
            name: median([getattr(t, part) / t.tokens for t in found[1:]])
            for name, found in timings.items()
        }
        for part in ("rollout", "update")
    )
    for part, times, short in (("rollout", rollout, "8 × 32"), ("update", update, "128 × 32")):
        say(
            f"{part}: {1e3 * times['8 × 512']:.2f} ms per token at 8 × 512, "
            f"{1e3 * times[short]:.2f} at {short}: {times['8 × 512'] / times[short]:.2f} times"
        )


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
    if sys.argv[1] == "memory":
        memory(*sys.argv[2:])
    elif sys.argv[1] == "length":
        length()
    else:
        environment()
    say(machine(os.cpu_count() or 1))
