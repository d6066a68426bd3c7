"""People made of a formula: they answer by a known score, with the faults that people have.

With them the loop of feedback, fit and policy can be tested and studied without people; how far a
result carries over to people, they cannot tell.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from reward_models.contract import RewardFunction, checked_scores
from reward_models.feedback.records import Comparison, Label, Rating
from reward_models.feedback.store import FeedbackStore
from reward_models.feedback.tasks import Assignment, Choice


class SimulatedAnnotator:
    """Answers as someone who is the more sure the more the scores differ.

    With scores s, rationality β, tie band η and position bias b (Boltzmann-rational choice: Luce
    1959; ties: Rao & Kupper 1967; the faults are those of Lee et al. 2021, B-Pref, and b):

        P(first) = σ(β (s₁ − s₂) + b − η)        P(second) = σ(−β (s₁ − s₂) − b − η)
        P(good)  = σ(β (s − middle of the score range))
        rating   = s + normal noise, put from the score range on the scale, rounded and cut off

    The rest of the first line is ties. They are drawn as they come about: a logistic error is added
    to the difference, and what is within the band is a tie. One generator gives all answers, so
    they depend on the order of the questions.

    Args:
        score: a reward function, or the score of each text (prompt and completion joined).
        rationality: β, per unit of the score; 0 chooses at random.
        tie_band: η, log-odds; 0 for no ties.
        noise: standard deviation of the error before rating, in units of the score.
        position_bias: b, log-odds in favour of the side shown first.
        laziness: share of the answers given without reading.
        lazy_answer: what these are: "random", or the "same" button always: the first side, the
            lowest rating, good. Ties are not among them.
        scale: of ratings, whole numbers.
        score_range: the scores that belong to its ends; the default suits scores of mean 0, SD 1.
        seed: of the generator.
        pseudonym: the name on the records.
    """

    def __init__(
        self,
        score: RewardFunction | Mapping[str, float],
        *,
        rationality: float = 1.0,
        tie_band: float = 0.0,
        noise: float = 0.0,
        position_bias: float = 0.0,
        laziness: float = 0.0,
        lazy_answer: Literal["random", "same"] = "random",
        scale: tuple[int, int] = (1, 5),
        score_range: tuple[float, float] = (-2.0, 2.0),
        seed: int = 0,
        pseudonym: str = "simulated",
    ) -> None:
        for name, value in (
            ("rationality", rationality), ("tie_band", tie_band), ("noise", noise)
        ):  # fmt: skip
            if not 0 <= value < float("inf"):
                raise ValueError(f"expected {name} of 0 or more, got {value}")
        if not 0 <= laziness <= 1:
            raise ValueError(f"expected laziness from 0 to 1, got {laziness}")
        if lazy_answer not in ("random", "same"):
            raise ValueError(f"expected lazy_answer 'random' or 'same', got {lazy_answer!r}")
        for name, (low, high) in (("scale", scale), ("score_range", score_range)):
            if not low < high:
                raise ValueError(f"expected {name} [lowest, highest], got [{low}, {high}]")
        self.score = score
        self.rationality = rationality
        self.tie_band = tie_band
        self.noise = noise
        self.position_bias = position_bias
        self.laziness = laziness
        self.lazy_answer = lazy_answer
        self.scale = scale
        self.score_range = score_range
        self.pseudonym = pseudonym
        self.rng = np.random.default_rng(seed)

    def compare(self, prompt: str, first: str, second: str) -> Choice:
        """Which of two completions is better, shown in this order."""
        return self.compare_batch([prompt], [first], [second])[0]

    def rate(self, prompt: str, completion: str) -> int:
        """How good a completion is, on `scale`."""
        return self.rate_batch([prompt], [completion])[0]

    def label(self, prompt: str, completion: str) -> bool:
        """Whether a completion is good."""
        return self.label_batch([prompt], [completion])[0]

    def compare_batch(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> list[Choice]:
        """Answers to B comparisons, all lists of length B."""
        difference = self._scores(prompts, first) - self._scores(prompts, second)
        perceived = self.rationality * difference + self.position_bias
        perceived += self.rng.logistic(size=len(perceived))
        lazy = np.where(self._at_random(0, 2, len(perceived)) == 0, np.inf, -np.inf)
        perceived = np.where(self._lazy(len(perceived)), lazy, perceived)
        return [
            "tie" if abs(p) <= self.tie_band else "first" if p > 0 else "second" for p in perceived
        ]

    def rate_batch(self, prompts: Sequence[str], completions: Sequence[str]) -> list[int]:
        """Ratings of B completions."""
        scores = self._scores(prompts, completions)
        (low, high), (worst, best) = self.scale, self.score_range
        share = (scores + self.noise * self.rng.normal(size=len(scores)) - worst) / (best - worst)
        ratings = np.clip(np.round(low + share * (high - low)), low, high).astype(int)
        lazy = self._at_random(low, high + 1, len(scores))
        return np.where(self._lazy(len(scores)), lazy, ratings).tolist()

    def label_batch(self, prompts: Sequence[str], completions: Sequence[str]) -> list[bool]:
        """Labels of B completions."""
        scores = self._scores(prompts, completions)
        perceived = self.rationality * (scores - sum(self.score_range) / 2)
        good = perceived + self.rng.logistic(size=len(scores)) > 0
        lazy = self._at_random(0, 2, len(scores)) == 0
        return np.where(self._lazy(len(scores)), lazy, good).tolist()

    def comparisons(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> list[Comparison]:
        """Answers to B comparisons as records."""
        answers = self.compare_batch(prompts, first, second)
        return [
            Comparison(
                prompt,
                *((b, a) if answer == "second" else (a, b)),
                tie=answer == "tie",
                annotator=self.pseudonym,
                origin="simulated",
            )
            for prompt, a, b, answer in zip(prompts, first, second, answers, strict=True)
        ]

    def ratings(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Rating]:
        """Ratings of B completions as records."""
        answers = self.rate_batch(prompts, completions)
        return [
            Rating(prompt, text, rating, self.scale, self.pseudonym, origin="simulated")
            for prompt, text, rating in zip(prompts, completions, answers, strict=True)
        ]

    def labels(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Label]:
        """Labels of B completions as records."""
        answers = self.label_batch(prompts, completions)
        return [
            Label(prompt, text, good, self.pseudonym, origin="simulated")
            for prompt, text, good in zip(prompts, completions, answers, strict=True)
        ]

    def _scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        if len(prompts) != len(completions):
            raise ValueError(
                f"expected as many prompts as completions, got {len(prompts)} and "
                f"{len(completions)}"
            )
        if isinstance(self.score, Mapping):
            texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
            return np.array([self.score[text] for text in texts], dtype=float)
        return checked_scores(self.score(prompts=prompts, completions=completions), completions)

    def _lazy(self, n: int) -> np.ndarray:
        """Which of n answers are given without reading."""
        return self.rng.random(n) < self.laziness

    def _at_random(self, low: int, high: int, n: int) -> np.ndarray:
        """Lazy answers, whole numbers from `low` to below `high`; `low` is the "same" one."""
        drawn = self.rng.integers(low, high, n)
        return drawn if self.lazy_answer == "random" else np.full(n, low)


def answer_tasks(
    store: FeedbackStore, people: Sequence[SimulatedAnnotator]
) -> Iterator[Assignment]:
    """Let people answer what a store asks them, in turn, until it has nothing more for anybody.

    Yields:
        Each task, once its answer is in the store.
    """
    waiting = list(people)
    while waiting:
        for person in list(waiting):
            asked = store.next_task(person.pseudonym)
            if asked is None:
                waiting.remove(person)
                continue
            answer: object
            if asked.task.kind == "comparison":
                choice = person.compare(asked.task.prompt, *asked.shown)
                answer = {"first": "left", "second": "right", "tie": "tie"}[choice]
            elif asked.task.kind == "rating":
                answer = person.rate(asked.task.prompt, *asked.shown)
            else:
                answer = person.label(asked.task.prompt, *asked.shown)
            store.answer(asked.id, person.pseudonym, answer)
            yield asked
