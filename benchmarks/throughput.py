"""Useful completion tokens per second, against a bare loop, generate, stock SB3 and TRL.

    python -m benchmarks.throughput                      all workloads, all peers
    python -m benchmarks.throughput --workloads tiny --peers "TokenPPO" "bare loop" --rounds 5

Each peer lives in a process of its own and does one iteration when it is its turn, so that all
see the same minutes of a noisy machine; ratios are taken round by round, to the bare loop of the
same round. A few peers at a time, so that they fit in memory together: each such group has a bare
loop of its own. Writes throughput.json, throughput.md and throughput.png.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import nan
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.timing import Timing

WORKLOADS = ("tiny", "real", "variable", "long")
PEERS = (
    "bare loop",
    "bare loop, bf16",
    "TokenPPO",
    "TokenPPO, bf16",
    "TokenPPO, cut episodes",
    "TokenPPO, cut episodes, bf16",
    "generate",
    "stock SB3 PPO",
    "TRL GRPO",
    "TRL RLOO",
)
LAST_TRL_PPO = "TRL PPO"
"""Runs where TRL 1.12 is installed, the last with a PPO trainer: `make bench-ppo`."""
BASE = "bare loop"
IMPATIENCE = 5
"""After so many times the patience, a peer from which nothing has come is stopped."""
AT_ONCE = 3
"""Peers that take turns with a bare loop."""


@dataclass
class Found:
    """What a peer showed in one workload.

    Args:
        timings: a timing per round; round 0, the warm-up, counts where it is the only one.
        ratios: speed over the bare loop's in the same round, where the peer was measured with one.
        memory: peak resident memory above the imports, bytes.
        error: why there is nothing, if so.
    """

    timings: dict[int, Timing] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    memory: int = 0
    error: str | None = None

    def counted(self) -> dict[int, Timing]:
        """Return the timings that count, by round."""
        return {r: t for r, t in self.timings.items() if r > 0} or self.timings


def work(pipe: Connection, workload: str, peer: str, threads: int) -> None:
    """Do iterations of one peer, each when told; the body of a worker process."""
    import torch as th
    import transformers

    from benchmarks.peers import PEERS, Stop
    from benchmarks.workloads import WORKLOADS

    if peer.startswith("TRL"):  # its imports are not its memory
        import datasets  # noqa: F401
        import trl  # noqa: F401
    th.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    before = peak_memory()

    def report(timing: Timing) -> None:
        pipe.send((timing, peak_memory() - before))
        if not pipe.recv():
            raise Stop

    try:
        made = PEERS[peer](WORKLOADS[workload])
        pipe.send(None)
        if pipe.recv():
            made.run(report)
    except Stop:
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def peak_memory() -> int:
    """Return the process's peak resident memory, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    workload: str, peers: Sequence[str], rounds: int, threads: int, patience: float
) -> dict[str, Found]:
    """Let the peers take turns; one round to warm up, which is not counted.

    Args:
        workload: which one.
        peers: who takes part.
        rounds: counted iterations of each.
        threads: CPU threads of each.
        patience: a peer whose first iteration takes longer than this, seconds, is not asked again;
            one of which nothing comes for `IMPATIENCE` times as long is stopped.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    found = {peer: Found() for peer in peers}
    processes = {}
    limit = IMPATIENCE * patience
    for peer in peers:
        pipe, end = context.Pipe()
        process = context.Process(target=work, args=(end, workload, peer, threads), daemon=True)
        process.start()
        end.close()
        processes[peer] = process
        if take(pipe, found[peer], limit):
            pipes[peer] = pipe
        else:
            process.kill()
    for number in range(rounds + 1):
        for peer, pipe in list(pipes.items()):
            say(f"{workload}, round {number} of {rounds}: {peer}", end="          \r")
            tell(pipe, True)
            answer = take(pipe, found[peer], limit)
            if not answer:
                processes[peer].kill()  # it may still be at work
                del pipes[peer]
                continue
            timing, found[peer].memory = answer
            found[peer].timings[number] = timing
            if number == 0 and timing.seconds > patience:
                tell(pipes.pop(peer), False)
    for pipe in pipes.values():
        tell(pipe, False)
    for process in processes.values():
        process.join(timeout=10)
        process.kill()
    compare(found)
    return found


def compare(found: dict[str, Found]) -> None:
    """Fill in the ratios to the bare loop that took turns with the others."""
    base = found[BASE].timings if BASE in found else {}
    for other in found.values():
        pairs = [(mine, base[r]) for r, mine in other.counted().items() if r in base]
        other.ratios = [speed(mine) / speed(bare) for mine, bare in pairs]


def tell(pipe: Connection, go_on: bool) -> None:
    """Tell a worker to do an iteration, or to stop; one that has died hears nothing."""
    with suppress(OSError):
        pipe.send(go_on)


def measure_in_groups(
    workload: str, peers: Sequence[str], rounds: int, threads: int, patience: float
) -> dict[str, Found]:
    """Do `measure` for a few peers at a time, each time with the bare loop if it takes part."""
    base = [BASE] if BASE in peers else []
    others = [peer for peer in peers if peer != BASE]
    groups = [others[i : i + AT_ONCE] for i in range(0, len(others), AT_ONCE)] or [[]]
    found: dict[str, Found] = {}
    for group in groups:
        found = measure(workload, [*base, *group], rounds, threads, patience) | found
    return {peer: found[peer] for peer in peers}


def take(pipe: Connection, found: Found, limit: float) -> Any:
    """Receive what a worker has to say within `limit` seconds.

    Note an error, its death or its silence, and return None then.
    """
    try:
        answer = pipe.recv() if pipe.poll(limit) else f"no iteration within {limit:.0f} s"
    except (EOFError, OSError):
        answer = "the process died: out of memory?"
    if isinstance(answer, str):
        found.error = answer
        return None
    return answer or True


def ratio(found: dict[str, Found], peer: str) -> float:
    """Return the median over the rounds of a peer's speed over the bare loop's."""
    return middle(found[peer].ratios)


def speed(timing: Timing) -> float:
    """Return useful completion tokens per second, of the whole iteration."""
    return timing.tokens / timing.seconds


def middle(values: list[float]) -> float:
    """Return the median, nan of nothing."""
    return median(values) if values else nan


def row(found: dict[str, Found], peer: str) -> list[float]:
    """Return a peer's figures: tokens/s, ratio, rollout and update tokens/s, memory in GiB."""
    timings = found[peer].counted().values()
    return [
        middle([speed(t) for t in timings]) if peer != "generate" else nan,
        ratio(found, peer) if peer != "generate" else nan,
        middle([t.tokens / t.rollout for t in timings]),
        middle([t.tokens / t.update for t in timings]),
        middle([t.bookkeeping / t.seconds for t in timings]),
        found[peer].memory / 2**30,
    ]


HEADER = ("tokens/s", "× bare loop", "rollout tokens/s", "update tokens/s", "bookkeeping", "GiB")


def table(found: dict[str, Found]) -> str:
    """Format a workload's figures as Markdown."""
    lines = ["| | " + " | ".join(HEADER) + " |", "|---|" + "---|" * len(HEADER)]
    for peer in found:
        if found[peer].error:
            lines.append(f"| {peer} | {found[peer].error} |" + " |" * (len(HEADER) - 1))
            continue
        a, b, c, d, e, f = row(found, peer)
        cells = [f"{a:,.0f}", f"{b:.2f}", f"{c:,.0f}", f"{d:,.0f}", f"{e:.1%}", f"{f:.2f}"]
        cells = ["" if "nan" in cell else cell for cell in cells]
        note = " (first iteration only)" if list(found[peer].timings) == [0] else ""
        lines.append(f"| {peer}{note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, results: dict[str, dict[str, Found]]) -> None:
    """Draw each workload's ratios to the bare loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(3.6 * len(results), 3.4), layout="constrained", squeeze=False
    )
    for axis, (workload, found) in zip(axes[0], results.items(), strict=True):
        peers = [p for p in found if p != "generate" and found[p].timings]
        values = [ratio(found, p) for p in peers]
        colours = ["#1f5fa8" if p.startswith("TokenPPO") else "#b0b7c0" for p in peers]
        bars = axis.barh(peers, values, color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=workload, xlabel="tokens/s over the bare loop's")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine(threads: int) -> str:
    """Describe the machine, its threads and its load."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    wait = os.environ.get("GOMP_SPINCOUNT") or os.environ.get("OMP_WAIT_POLICY") or "default"
    return f"{os.cpu_count()} × {model}, {threads} threads, OpenMP waiting: {wait}, load {load}"


def say(text: str, end: str = "\n") -> None:
    """Print at once."""
    print(text, end=end, flush=True)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=[*PEERS, LAST_TRL_PPO])
    parser.add_argument("--rounds", type=int, default=5, help="counted iterations of each peer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        help="seconds; a peer whose first iteration takes longer is not asked again",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"))
    chosen = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # as train.py does
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    chosen.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Found]] = {}
    parts = ["# Throughput", f"At the start: {machine(chosen.threads)}."]
    for workload in chosen.workloads:
        # Where no completion ends early, none is cut.
        same = [p.replace(", cut episodes", "") for p in chosen.peers]
        peers = chosen.peers if workload == "variable" else list(dict.fromkeys(same))
        found = measure_in_groups(workload, peers, chosen.rounds, chosen.threads, chosen.patience)
        results[workload] = found
        parts += [f"## {workload}", table(found)]
        say(f"\n{workload}\n{table(found)}\n")
    parts.append(f"At the end: {machine(chosen.threads)}.")
    draw(chosen.out / "throughput.png", results)
    text = "\n\n".join([*parts, "![ratios](throughput.png)"]) + "\n"
    (chosen.out / "throughput.md").write_text(text, encoding="utf-8")
    raw = {
        workload: {
            peer: {
                "timings": {r: t._asdict() for r, t in f.timings.items()},
                "ratios": f.ratios,
                "memory": f.memory,
                "error": f.error,
            }
            for peer, f in found.items()
        }
        for workload, found in results.items()
    }
    facts = {"machine": machine(chosen.threads), "python": sys.version, "workloads": raw}
    (chosen.out / "throughput.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    say(f"Report: {chosen.out / 'throughput.md'}")


if __name__ == "__main__":
    main()
