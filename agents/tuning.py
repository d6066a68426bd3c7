"""Search for settings: an optuna study in a folder, whose trials are trainings that are measured.

What a trial trains, and what it is measured on, the caller knows: it hands over callables. The
study is one SQLite file. Any number of processes may work on it, and any of them may be killed: a
trial belongs to a process as long as that holds the lock on the trial's folder, which the system
releases whatever happens. Leaves out what is written about a study (`agents.tuning_report`).
"""

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch as th
import yaml

try:
    import optuna
except ImportError as error:
    raise ImportError("tuning needs optuna: pip install 'rlhf-gym[tune]'") from error
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from stable_baselines3.common.callbacks import BaseCallback

from agents.checkpoint_store import one_process
from agents.policy import CausalLMPolicy

AGAIN = "again"
"""Names, in a trial, the one whose values it tries once more, as that one's process had ended."""
AS_THEY_WERE = "as_they_were"
"""Marks the trial whose values are those from outside the search."""


class Measured(NamedTuple):
    """How a policy does on held-out prompts.

    Attributes:
        score: The judge's mean.
        error: Standard error of that mean.
        ref_kl: Mean divergence from the reference, nats per completion.
    """

    score: float
    error: float
    ref_kl: float


class Objective(NamedTuple):
    """What a search is to make large: score − weight · max(0, ref_kl − budget).

    A formula, not a constraint of optuna's, as one number can be compared in mid-training too,
    which is what pruning does.

    Attributes:
        kl_budget: Nats per completion that cost nothing.
        kl_weight: Score units that each further nat costs.
    """

    kl_budget: float
    kl_weight: float

    def __call__(self, measured: Measured) -> float:
        """Return the objective's value."""
        return measured.score - self.kl_weight * max(0.0, measured.ref_kl - self.kl_budget)


class TrialCallback(BaseCallback):
    """Measures the policy some times on the way, reports to optuna, and stops a hopeless trial.

    Measuring leaves the training's random numbers alone: a trial goes the way of the same training
    without this callback.

    Attributes:
        measured: The last measurement, None before the first.
        pruned: Whether optuna has stopped the trial.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        measure: Callable[[CausalLMPolicy], Measured],
        objective: Objective,
        total_timesteps: int,
        evaluations: int,
        seed: int = 0,
    ) -> None:
        """Watch a trial.

        Args:
            trial: The trial.
            measure: Measures a policy; called with torch's generators seeded.
            objective: What is reported, with the number of the evaluation as the step.
            total_timesteps: Tokens of the training.
            evaluations: Measurements in a whole training, evenly spread, the last at its end.
            seed: Of the measurements.
        """
        super().__init__()
        if evaluations < 1:
            raise ValueError(f"evaluations: expected at least 1, got {evaluations}")
        self.trial, self.measure, self.objective = trial, measure, objective
        self.total_timesteps, self.evaluations, self.seed = total_timesteps, evaluations, seed
        self.measured: Measured | None = None
        self.pruned = False
        self._done = 0

    def _on_step(self) -> bool:
        return not self.pruned

    def _on_rollout_start(self) -> None:  # so after an update
        due = self.evaluations * self.num_timesteps // self.total_timesteps
        if self._done < due < self.evaluations:
            self._report(due)
            self.pruned = self.trial.should_prune()

    def _on_training_end(self) -> None:
        if not self.pruned:
            self._report(self.evaluations)

    def _report(self, step: int) -> None:
        self._done = step
        with th.random.fork_rng():
            th.manual_seed(self.seed)
            self.measured = self.measure(self.model.policy)  # type: ignore[arg-type]
        value = self.objective(self.measured)
        if not math.isfinite(value):
            raise FloatingPointError(f"expected a finite measurement, got {self.measured}")
        self.trial.report(value, step)
        for name, number in self.measured._asdict().items():
            self.trial.set_user_attr(name, number)
        self.trial.set_user_attr("share", step / self.evaluations)
        for name, number in self.measured._asdict().items():
            self.logger.record(f"eval/{name}", number)


def read_space(path: str | Path, base: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Read which settings to search, and where.

    A setting's line in the YAML file is a list of values, or {low, high}, optionally with `log:
    true` or a `step`; whole numbers if both ends are.

    Args:
        path: The file.
        base: The settings that may be searched, with their values outside the search.

    Raises:
        ValueError: If it is not such a file, or a name is not that of a setting.
    """
    space = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(space, dict) or not space:
        raise ValueError(f"{path}: expected settings with what to try for each, got {space!r}")
    if unknown := sorted(str(name) for name in space if name not in base):
        raise ValueError(f"{path}: expected names of {', '.join(base)}, got {', '.join(unknown)}")
    found = {}
    for name, described in space.items():
        try:
            found[name] = _distribution(described, base[name])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return found


def _distribution(described: Any, value: Any) -> BaseDistribution:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(described, list):
        numbers = [x for x in described if isinstance(x, float)]
        if not described or any(isinstance(x, dict | list) for x in described):
            raise ValueError(f"expected plain values in the list, got {described}")
        if whole and numbers:
            raise ValueError(f"expected whole numbers, got {numbers}")
        return CategoricalDistribution(described)
    if not isinstance(described, dict) or not {"low", "high"} <= set(described):
        raise ValueError(f"expected a list, or {{low, high}}, got {described!r}")
    if unknown := sorted(set(described) - {"low", "high", "log", "step"}):
        raise ValueError(f"expected low, high, log and step, got {unknown}")
    # YAML takes 1e-4, without a point, for a text.
    ends: dict[str, Any] = {k: float(v) if isinstance(v, str) else v for k, v in described.items()}
    if all(isinstance(ends[end], int) for end in ("low", "high")):
        return IntDistribution(**ends)
    if whole:
        raise ValueError(f"expected whole numbers, got {described}")
    return FloatDistribution(**ends)


def values_inside(space: Mapping[str, BaseDistribution], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings outside the search, for a study to try first; {} if it can't have them.

    Args:
        space: What is searched.
        base: The settings and their values.
    """
    values = {name: base[name] for name in space}
    return values if all(_holds(space[name], value) for name, value in values.items()) else {}


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if not isinstance(value, int | float) or not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / (distribution.step or math.inf)
    return math.isclose(steps, round(steps), abs_tol=1e-9)


def open_study(
    folder: str | Path, settings: Mapping[str, Any], first: Mapping[str, Any], evaluations: int
) -> optuna.Study:
    """Open the study in a folder, or begin one.

    Trials are pruned by the median of the others' reports, from half of the training on.

    Args:
        folder: Holds study.sqlite.
        settings: What all trials have in common, as JSON types; they stay as they began.
        first: Values that a new study tries first; empty: it draws those too.
        evaluations: Reports of a whole trial.

    Raises:
        ValueError: If the study there began with other settings.
    """
    folder = Path(folder)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with alone(folder):
        study = optuna.create_study(
            study_name="tune",
            storage=optuna.storages.RDBStorage(
                f"sqlite:///{folder.resolve() / 'study.sqlite'}",
                engine_kwargs={"connect_args": {"timeout": 60}},  # seconds that a writer waits
            ),
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(4, n_warmup_steps=(evaluations + 1) // 2),
            load_if_exists=True,
        )
        settings = json.loads(json.dumps(settings))
        began = study.user_attrs.get("settings")
        if began is None:
            study.set_user_attr("settings", settings)
            if first:
                study.enqueue_trial(dict(first), user_attrs={AS_THEY_WERE: True})
        elif began != settings:
            names = sorted({*began, *settings})
            other = [
                f"{name} was {began.get(name)}, not {settings.get(name)}"
                for name in names
                if began.get(name) != settings.get(name)
            ]
            raise ValueError(
                f"{folder}: expected the settings that this search began with, where "
                f"{', '.join(other)}; search with others in another run folder"
            )
    return study


def search(
    study: optuna.Study,
    folder: str | Path,
    space: Mapping[str, BaseDistribution],
    run_trial: Callable[[optuna.Trial, Path], TrialCallback],
    trials: int,
    seed: int,
    report: Callable[[FrozenTrial], None],
) -> None:
    """Run trials until the study has so many, those of other processes and earlier days included.

    A trial that raises an arithmetic error, say, or takes too much memory, has failed and counts;
    if it is the first, its error is raised. One whose process has ended does not count, and the
    same values are tried again. What a trial tries depends on the seed and on the trials before,
    not on which process asks, or when it was started.

    Args:
        study: The study, from `open_study`.
        folder: Its folder; each trial has one in trials/.
        space: What to search, from `read_space`.
        run_trial: Trains with a trial's `params`, may leave files in the folder given, and returns
            the callback that has watched it.
        trials: How many the study is to have.
        seed: Of the search.
        report: Called after each trial, by one process at a time.
    """
    folder = Path(folder)
    while True:
        with ExitStack() as held:
            with alone(folder):
                trial = _next_trial(study, folder, space, trials, seed)
                if trial is None:
                    return
                place = _place(folder, trial.number)
                held.enter_context(one_process(place))
            start = time.time()
            try:
                watched = run_trial(trial, place)
            except (ArithmeticError, ValueError, RuntimeError) as error:
                trial.set_user_attr("failed_by", " ".join(str(error).split()))
                study.tell(trial, state=TrialState.FAIL)
                if not any(t.state.is_finished() for t in study.trials if t.number < trial.number):
                    raise
            else:
                trial.set_user_attr("seconds", round(time.time() - start, 1))
                if watched.pruned:
                    study.tell(trial, state=TrialState.PRUNED)
                else:
                    assert watched.measured is not None
                    study.tell(trial, watched.objective(watched.measured))
                del watched  # its model would be there beside the next trial's
        with alone(folder):
            report(study.trials[trial.number])


def trials_of(study: optuna.Study) -> list[FrozenTrial]:
    """Return a study's trials but those whose process had ended and that were begun again."""
    known = study.get_trials(deepcopy=False)
    replaced = {trial.user_attrs.get(AGAIN) for trial in known}
    return [trial for trial in known if trial.number not in replaced]


def _next_trial(
    study: optuna.Study,
    folder: Path,
    space: Mapping[str, BaseDistribution],
    trials: int,
    seed: int,
) -> optuna.Trial | None:
    """Begin a trial, after putting those whose process has ended back in line; None at the end."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        try:
            with one_process(_place(folder, trial.number)):
                if study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                    continue  # since it was listed: its process ended it, and then let go of it
                kept = {k: v for k, v in trial.user_attrs.items() if k == AS_THEY_WERE}
                study.enqueue_trial(trial.params, user_attrs={**kept, AGAIN: trial.number})
                study.tell(trial.number, state=TrialState.FAIL)
        except RuntimeError:
            continue  # its process is alive
    counted = [t for t in trials_of(study) if t.state is not TrialState.WAITING]
    if len(counted) >= trials:
        return None
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(counted))
    return study.ask(dict(space))


def _place(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04}"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here, which the system lets go of when it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "study.lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
