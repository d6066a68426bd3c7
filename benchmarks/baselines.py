"""Which algorithm reaches what: a grid of algorithms, tasks and seeds, and a report on it.

    python -m benchmarks.baselines --tune     choose among each algorithm's candidates
    python -m benchmarks.baselines            run the grid, write the report

Each run is a file under <out>/results: what is there already, with the same settings and budget, is
not run again, so that a stopped grid goes on where it was. Writes baselines.md, .png, .csv and
.json. Settings are in benchmarks/baselines.yaml.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

CONFIG = Path(__file__).with_suffix(".yaml")
TUNING_SEED = 1000
"""Of the runs that settings are chosen by; others than the grid's."""


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        task: Name of the task.
        algorithm: Name of the algorithm, "best of n" for some n included.
        seed: Of everything random in it.
        settings: The algorithm's.
        tokens: It may generate.
        seconds: It may learn.
        candidate: Number of the candidate that the settings are.
    """

    task: str
    algorithm: str
    seed: int
    settings: dict[str, Any]
    tokens: int
    seconds: float
    candidate: int = 0

    @property
    def file(self) -> str:
        """Where its result is kept, within the folder of results."""
        name = "".join(c if c.isalnum() else "-" for c in self.algorithm)
        return f"{self.task}/{name}/{self.candidate}-{self.seed}.json"


def work(job: Job) -> dict[str, Any]:
    """Do one run, on one thread, and return its result."""
    import torch as th

    from benchmarks.algorithms import Budget
    from benchmarks.small_runs import run_small

    th.set_num_threads(1)
    budget = Budget(job.tokens, job.seconds)
    points = run_small(job.task, job.algorithm, job.settings, job.seed, budget)
    return {**asdict(job), "points": points}


def grid(config: dict[str, Any], chosen: dict[str, dict[str, int]], seeds: int) -> Iterator[Job]:
    """Give the runs of the benchmark: the chosen candidates, all seeds."""
    for task, budget in config["budgets"].items():
        for seed in range(seeds):
            untrained = ["random", "reference", "greedy"]
            untrained += [f"best of {n}" for n in config["best_of"]]
            for name in untrained if seed == 0 else []:
                yield Job(task, name, seed, {}, **budget)
            for name, algorithm in config["algorithms"].items():
                if task in algorithm.get("tasks", config["budgets"]):
                    i = chosen[task][name]
                    settings = algorithm["settings"] | algorithm["candidates"][i]
                    yield Job(task, name, seed, settings, **budget, candidate=i)


def candidates(config: dict[str, Any]) -> Iterator[Job]:
    """Give the runs that settings are chosen by."""
    for task, budget in config["budgets"].items():
        for name, algorithm in config["algorithms"].items():
            if task in algorithm.get("tasks", config["budgets"]):
                for i, candidate in enumerate(algorithm["candidates"]):
                    settings = algorithm["settings"] | candidate
                    yield Job(task, name, TUNING_SEED, settings, **budget, candidate=i)


def run(jobs: Sequence[Job], folder: Path, processes: int) -> list[dict[str, Any]]:
    """Run the jobs that have no result yet, some at a time.

    Args:
        jobs: What to run.
        folder: Where results are and go to.
        processes: How many run at a time.

    Returns:
        The results of all of them, in the order of the jobs, but those that failed, which are
        printed.
    """
    found: dict[str, dict[str, Any]] = {}
    todo: list[Job] = []
    for job in jobs:
        result = read(folder / job.file)
        if result is not None and all(result[k] == v for k, v in asdict(job).items()):
            found[job.file] = result
        else:
            todo.append(job)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, context) as pool,
        tqdm(total=len(jobs), initial=len(found), unit="run", smoothing=0) as bar,
    ):
        futures = {pool.submit(work, job): job for job in todo}
        for future in as_completed(futures):
            job = futures[future]
            bar.update()
            bar.set_postfix_str(f"{job.task}, {job.algorithm}, seed {job.seed}")
            try:
                result = future.result()
            except Exception as error:
                bar.write(f"{job.task}, {job.algorithm}, seed {job.seed}: {error!r}")
                continue
            write(folder / job.file, result)
            found[job.file] = result
    return [found[job.file] for job in jobs if job.file in found]


def read(file: Path) -> dict[str, Any] | None:
    """Return a result, None if there is none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a result; it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(temporary, file)


def choose(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the best candidate of each algorithm on each task, by the last measurement.

    What is measured is what the algorithm is told of: the score, less the KL penalty if it has one.
    """
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        mine = best.setdefault(result["task"], {})
        other = mine.get(result["algorithm"])
        measure = "gain" if result["algorithm"].startswith("Token") else "score"
        if other is None or result["points"][-1][measure] > other["points"][-1][measure]:
            mine[result["algorithm"]] = result
    return {
        task: {name: result["candidate"] for name, result in sorted(mine.items())}
        for task, mine in best.items()
    }


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument(
        "--chosen", type=Path, help="default: beside the config, <name>-chosen.yaml"
    )
    parser.add_argument("--tune", action="store_true", help="choose settings; no report")
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--algorithms", nargs="+", help="default: all that learn")
    parser.add_argument("--seeds", type=int, help="default: as configured")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    for kind, names in (("budgets", given.tasks), ("algorithms", given.algorithms)):
        if unknown := set(names or ()) - set(config[kind]):
            sys.exit(f"expected some of {list(config[kind])}, got {sorted(unknown)}")
        config[kind] = {name: config[kind][name] for name in names or config[kind]}
    file = given.chosen or given.config.with_name(f"{given.config.stem}-chosen.yaml")
    if given.tune:
        jobs = list(candidates(config))
        results = run(jobs, given.out / "results", given.processes)
        known = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        for task, chosen in choose(results).items():
            known[task] = known.get(task, {}) | chosen
        text = "# Written by `python -m benchmarks.baselines --tune`: the number of each\n"
        text += f"# algorithm's best candidate in {given.config.name}, per task.\n"
        file.write_text(text + yaml.safe_dump(known), encoding="utf-8")
        print(f"Chosen settings: {file}")
        sys.exit(len(results) < len(jobs))
    if not file.exists():
        sys.exit(f"expected chosen settings in {file}: run with --tune first")
    chosen = yaml.safe_load(file.read_text(encoding="utf-8"))
    jobs = list(grid(config, chosen, given.seeds or config["seeds"]))
    results = run(jobs, given.out / "results", given.processes)
    from benchmarks.baselines_report import write_report

    print(f"Report: {write_report(results, given.out)}")
    sys.exit(len(results) < len(jobs))


if __name__ == "__main__":
    main()
