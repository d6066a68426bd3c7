"""One run on a small task: what is measured, and how a score becomes a share of the optimum."""

import numpy as np

from benchmarks.algorithms import LEARNERS, Budget, Curve, Settings, reference
from benchmarks.small_tasks import SMALL_TASKS, Enumeration, Policy, SmallTask

RANDOM = 0.25
"""Score of random words where completions are not enumerated; the reference's is the same."""

Point = dict[str, float]
"""What was measured: `tokens` and `seconds` of learning so far, `score` (mean), and `gain`, 0 for
the reference and 1 for the optimum of score less KL penalty. Where completions are enumerated, the
expectations are exact, and `ref_kl` (nats per completion) is there too."""


def run_small(
    name: str, algorithm: str, settings: Settings, seed: int, budget: Budget
) -> list[Point]:
    """Do a run on a small task; return what was measured as it went on."""
    task = SMALL_TASKS[name]
    untouched = task.from_lm(reference(task))
    enumeration = Enumeration(task, untouched) if task.beta > 0 else None

    def measure(policy: Policy) -> Point:
        if enumeration is None:
            return sampled(task.mean_score(policy))
        return exact(enumeration, enumeration.log_probs(policy))

    if algorithm.startswith("best of "):
        n = int(algorithm.removeprefix("best of "))
        if enumeration is None:
            found = sampled(sampled_best_of(task, untouched, n))
        else:
            found = exact(enumeration, enumeration.best_of(n))
        return [{"tokens": 0, "seconds": 0.0, **found}]
    curve = Curve(measure, budget)
    LEARNERS[algorithm](task, settings, seed, curve)
    return curve.points


def exact(enumeration: Enumeration, log_p: np.ndarray) -> Point:
    """Return expectations over all completions."""
    return {
        "score": enumeration.mean_score(log_p),
        "ref_kl": enumeration.kl(log_p),
        "gain": enumeration.gain(log_p),
    }


def sampled(score: float) -> Point:
    """Return a mean score, and where it lies between random and perfect."""
    return {"score": score, "gain": (score - RANDOM) / (1 - RANDOM)}


def sampled_best_of(task: SmallTask, policy: Policy, n: int, prompts: int = 128) -> float:
    """Return the mean score of the best of n completions that a policy writes, per prompt."""
    rounds = [task.scores(task.write(policy, prompts, seed)) for seed in range(n)]
    return float(np.max(rounds, axis=0).mean())
