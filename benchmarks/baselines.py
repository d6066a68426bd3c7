"""Which algorithm reaches what: a grid of algorithms, tasks and seeds, and a report on it.

    python -m benchmarks.baselines --tune     choose among each algorithm's candidates
    python -m benchmarks.baselines            run the grid, write the report
        --known benchmarks/baselines-results.json     but for what was run for the README

Each run is a file under <out>/results: what is there already, with the same settings and budget, is
not run again, so that a stopped grid goes on where it was. Movie sentences need a warm start and a
reward model first, made once in <out>/movies. Writes baselines.md, .csv, .json and pictures.
Settings are in benchmarks/baselines.yaml.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

CONFIG = Path(__file__).with_suffix(".yaml")
MOVIES, OVER_OPTIMISATION = "movies", "over-optimisation"
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


def work(job: Job, movies: Path) -> dict[str, Any]:
    """Do one run, on one thread, and return its result."""
    import torch as th

    from benchmarks.algorithms import Budget

    th.set_num_threads(1)
    budget = Budget(job.tokens, job.seconds)
    if job.task in (MOVIES, OVER_OPTIMISATION):
        from benchmarks.movies import run_movies

        tuning = job.seed == TUNING_SEED
        points = run_movies(movies, job.algorithm, job.settings, job.seed, budget, tuning)
    else:
        from benchmarks.small_runs import run_small

        points = run_small(job.task, job.algorithm, job.settings, job.seed, budget)
    return {**asdict(job), "points": points}


def candidates(config: dict[str, Any]) -> Iterator[Job]:
    """Give the runs that settings are chosen by: each algorithm's candidates on each task.

    An algorithm has `settings` and `candidates` for the small tasks, or for the `tasks` that it
    names, and others for movie sentences under that name.
    """
    for task, budget in config["budgets"].items():
        for name, algorithm in config["algorithms"].items():
            if task == MOVIES or task in algorithm.get("tasks", config["budgets"]):
                told = algorithm.get(MOVIES, {"candidates": []}) if task == MOVIES else algorithm
                for i, candidate in enumerate(told["candidates"]):
                    settings = told["settings"] | candidate
                    if task == MOVIES:
                        settings["task"] = config[MOVIES]
                    yield Job(task, name, TUNING_SEED, settings, **budget, candidate=i)


def grid(
    config: dict[str, Any], chosen: dict[str, dict[str, int]], seeds: int | None = None
) -> Iterator[Job]:
    """Give the runs of the benchmark: the chosen candidates, all seeds."""
    learning = [
        job for job in candidates(config) if chosen[job.task][job.algorithm] == job.candidate
    ]
    for task, budget in config["budgets"].items():
        best_of = config["best_of"]
        if task == MOVIES:
            best_of = [max(best_of)]  # it tells of all the others
        settings = {"task": config[MOVIES]} if task == MOVIES else {}
        for name in ["random", "reference", "greedy", *(f"best of {n}" for n in best_of)]:
            yield Job(task, name, 0, settings, **budget)
        for seed in range(seeds or config["seeds"][task]):
            yield from (replace(job, seed=seed) for job in learning if job.task == task)
    further = config.get(OVER_OPTIMISATION, {})
    for beta in further.get("betas", []):
        for job in learning:
            if (job.task, job.algorithm) == (MOVIES, further["algorithm"]):
                settings = job.settings | {"measurements": further["measurements"]}
                settings["task"] = config[MOVIES] | {"beta": beta}
                changed = {key: further[key] for key in ("tokens", "seconds")}
                name = f"{job.algorithm}, β = {beta:g}"
                yield Job(OVER_OPTIMISATION, name, 0, settings, **changed)


def run(
    jobs: Sequence[Job], folder: Path, processes: int, movies: Path = Path()
) -> list[dict[str, Any]]:
    """Run the jobs that have no result yet, some at a time.

    Args:
        jobs: What to run.
        folder: Where results are and go to.
        processes: How many run at a time.
        movies: The run folder that movie sentences stand on.

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
        ProcessPoolExecutor(processes, context, end_with_parent) as pool,
        tqdm(total=len(jobs), initial=len(found), unit="run", smoothing=0) as bar,
    ):
        futures = {pool.submit(work, job, movies): job for job in todo}
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


def take_over(jobs: Sequence[Job], known: Path, folder: Path) -> None:
    """Put known results where those of the jobs are kept, if there are none yet."""
    for result in json.loads(known.read_text(encoding="utf-8")):
        for job in jobs:
            same = all(result[key] == value for key, value in asdict(job).items())
            if same and not (folder / job.file).exists():
                write(folder / job.file, result)


def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        told_of_kl = result["algorithm"].startswith("Token")
        last = result["points"][-1]
        told, untold = ("value", "reward") if "value" in last else ("gain", "score")
        measure = told if told_of_kl else untold
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
    parser.add_argument(
        "--known", type=Path, help="results of an earlier grid (baselines.json) to take over"
    )
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
    known = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    movies = given.out / MOVIES
    if MOVIES in config["budgets"]:
        from benchmarks.movies import prepare

        config[MOVIES]["fingerprint"] = prepare(movies)
    jobs = list(candidates(config))
    unknown = {job.task for job in jobs if job.algorithm not in known.get(job.task, {})}
    if unknown and not given.tune:
        sys.exit(f"expected settings of {sorted(unknown)} in {file}: run with --tune first")
    if given.tune:
        results = run(jobs, given.out / "results", given.processes, movies)
        for task, chosen in choose(results).items():
            known[task] = known.get(task, {}) | chosen
        text = "# Written by `python -m benchmarks.baselines --tune`: the number of each\n"
        text += f"# algorithm's best candidate in {given.config.name}, per task.\n"
        file.write_text(text + yaml.safe_dump(known), encoding="utf-8")
        print(f"Chosen settings: {file}")
        sys.exit(len(results) < len(jobs))
    jobs = list(grid(config, known, given.seeds))
    if given.known is not None:
        take_over(jobs, given.known, given.out / "results")
    results = run(jobs, given.out / "results", given.processes, movies)
    from benchmarks.baselines_report import write_report

    print(f"Report: {write_report(results, given.out)}")
    sys.exit(len(results) < len(jobs))


if __name__ == "__main__":
    main()
