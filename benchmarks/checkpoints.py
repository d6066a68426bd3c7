"""A checkpoint's price: seconds and megabytes of `TokenPPO.save` and `load` in the main job.

python -m benchmarks.checkpoints             SmolLM2-135M, of which the last six layers learn
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.throughput import machine, say


def seconds_of(do: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the medians of some rounds: seconds, and the processor's."""
    found = []
    for _ in range(rounds):
        start, busy = time.perf_counter(), time.process_time()
        do()
        found.append((time.perf_counter() - start, time.process_time() - busy))
    wall, processor = zip(*found, strict=True)
    return median(wall), median(processor)


def measure(lm: str | Path, trainable_layers: int | None, rounds: int = 3) -> dict[str, float]:
    """Train for one small update, so that the optimizer has its moments; then save and load.

    Args:
        lm: Folder of a causal LM with its tokenizer.
        trainable_layers: The last layers that learn; None: all.
        rounds: Of which the median is taken; each save is one of a new folder, in the system's
            folder for temporary files, and ends when it is on the disk.

    Returns:
        `save` and `load` in seconds, and as much of the processor; megabytes (10^6 bytes) of each
        file by its name, and of `all`.
    """
    from agents import TokenPPO
    from reward_models import LengthReward
    from text_env import TextVecEnv

    env = TextVecEnv(
        8, tokenizer=lm, prompts=["The film"], reward_fn=LengthReward(3), max_new_tokens=8
    )
    model = TokenPPO(
        "CausalLMPolicy",
        env,
        n_steps=8,
        batch_size=64,
        n_epochs=1,
        policy_kwargs={"lm": str(lm), "trainable_layers": trainable_layers},
        seed=0,
        device="cpu",
    )
    model.learn(64)
    with tempfile.TemporaryDirectory() as folder:
        places = iter([Path(folder) / str(number) for number in range(rounds)])
        save = seconds_of(lambda: model.save(next(places)), rounds)
        made = Path(folder) / "0"
        load = seconds_of(lambda: TokenPPO.load(made, env, "cpu"), rounds)
        sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(made.iterdir())}
    found = dict(
        zip(("save", "save, processor", "load", "load, processor"), save + load, strict=True)
    )
    return {**found, **sizes, "all": sum(sizes.values())}


def main() -> None:
    """Measure, and say what was found."""
    import train
    from reward_models.assets import smollm2

    found = measure(smollm2(), train.PPO().trainable_layers)
    for name in ("save", "load"):
        busy = found.pop(f"{name}, processor")
        say(f"{name}: {found.pop(name):.1f} s, {busy:.1f} of them of the processor")
    sizes = [f"{name} {size:.1f}" for name, size in found.items() if size >= 0.05]
    say(f"megabytes: {', '.join(sizes)}")
    say(machine(os.cpu_count() or 1))


if __name__ == "__main__":
    main()
