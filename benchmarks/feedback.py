"""How many answers a reward model needs, and what lazy annotators cost; the people are simulated.

They choose by the mean human rating of short movie sentences:

    python -m benchmarks.feedback

Leaves in `--out` the figures of each study as JSON, and pictures of the learning curve and of the
calibration. What the numbers say is in docs/reward_models.md.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from reward_models.assets import minilm
from reward_models.atomic import atomic_file
from reward_models.feedback.records import Comparison
from reward_models.feedback.simulated import SimulatedAnnotator
from reward_models.feedback.weights import agreement_weights
from reward_models.human_ratings import load_human_ratings
from reward_models.learned import LearnedRewardModel
from reward_models.learning_curve import learning_curve
from reward_models.plots import plot_calibration, plot_learning_curve

SIZES = (150, 300, 600, 1200)
HELD_OUT = 750
LONGEST = 100
"""Characters: a half of the sentences, and a third of the work."""
FIT: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-4}


def main() -> None:
    """Run the studies that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/feedback"))
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--repeats", type=int, default=2, help="fits of each kind")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    rated = load_human_ratings(("movies",))
    score = {item.text: item.mean for item in rated if len(item.text) <= LONGEST}
    texts = np.random.default_rng(0).permutation(sorted(score)).tolist()
    held_out = answers(SimulatedAnnotator(score, seed=99), texts[: 2 * HELD_OUT])
    ceiling = np.mean([score[record.chosen] > score[record.rejected] for record in held_out])
    for name in arguments.studies:
        start = time.perf_counter()
        facts = STUDIES[name](score, texts[2 * HELD_OUT :], held_out, arguments)
        facts |= {"ceiling": float(ceiling), "seconds": time.perf_counter() - start}
        with atomic_file(arguments.out / f"{name}.json") as file:
            file.write_text(json.dumps(facts, indent=2) + "\n")


def curve(
    score: dict[str, float],
    texts: Sequence[str],
    held_out: Sequence[Comparison],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One careful annotator: accuracy against the number of answers, calibration at the largest."""
    given = answers(SimulatedAnnotator(score, seed=0), texts[: 2 * SIZES[-1]])
    found = learning_curve(
        lambda seed: unfitted(arguments, seed), given, held_out, SIZES,
        repeats=arguments.repeats, on_point=lambda point: print(point, flush=True), **FIT,
    )  # fmt: skip
    plot_learning_curve(
        found, arguments.out / "learning-curve.png", "choices between two movie sentences"
    )
    report = unfitted(arguments, 0).fit(given, held_out, **FIT).held_out
    assert report is not None and report.comparisons is not None
    plot_calibration(report.comparisons, arguments.out / "calibration.png")
    return asdict(found) | {"calibration": asdict(report.comparisons)}


def lazy_half(
    score: dict[str, float],
    texts: Sequence[str],
    held_out: Sequence[Comparison],
    arguments: argparse.Namespace,
    own: int = 50,
    shared: int = 25,
) -> dict[str, Any]:
    """Eight annotators, four of whom choose at random nine times in ten.

    Each answers `own` pairs alone and `shared` ones that all answer. All answers alike, weighted by
    agreement, and those of the careful alone, which is the best that weights could do.
    """
    accuracy: dict[str, list[float]] = {"alike": [], "weighted": [], "careful_only": []}
    weights: list[dict[str, float]] = []
    for seed in range(arguments.repeats):
        drawn = np.random.default_rng(seed).permutation(texts).tolist()
        together, drawn = drawn[: 2 * shared], drawn[2 * shared :]
        given: list[Comparison] = []
        for i in range(8):
            annotator = SimulatedAnnotator(
                score, laziness=0.9 * (i >= 4), seed=100 * seed + i, pseudonym=f"{i}"
            )
            alone = drawn[2 * own * i : 2 * own * (i + 1)]
            given += answers(annotator, together + alone)
        weights.append(agreement_weights(given))
        careful = [record for record in given if record.annotator in set("0123")]
        ways = {
            "alike": (given, None),
            "weighted": (given, weights[-1]),
            "careful_only": (careful, None),
        }
        for name, (records, known) in ways.items():
            model = unfitted(arguments, seed)
            report = model.fit(records, held_out, seed=seed, annotator_weights=known, **FIT)
            assert report.held_out is not None and report.held_out.comparisons is not None
            accuracy[name].append(report.held_out.comparisons.accuracy)
        print({name: values[-1] for name, values in accuracy.items()}, weights[-1], flush=True)
    return {"accuracy": accuracy, "weights": weights}


STUDIES = {"curve": curve, "lazy_half": lazy_half}


def answers(annotator: SimulatedAnnotator, texts: Sequence[str]) -> list[Comparison]:
    """Comparisons of neighbouring texts, each text in one pair."""
    return annotator.comparisons([""] * (len(texts) // 2), texts[::2], texts[1::2])


def unfitted(arguments: argparse.Namespace, seed: int) -> LearnedRewardModel:
    """A pretrained encoder with a new head."""
    return LearnedRewardModel.from_pretrained(minilm(), arguments.device, seed=seed)


if __name__ == "__main__":
    main()
