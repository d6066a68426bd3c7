"""Each finding on made-up logs: one that has it, with numbers by hand, and ones that have not."""

from pathlib import Path

import numpy as np
import pytest

from agents.findings import (
    CHECKS,
    Limits,
    Seen,
    columns,
    duplicates,
    examine,
    rank_correlation,
    repetition,
)

DOCS = Path(__file__).parents[1] / "docs"


def rows(**series) -> list[dict[str, float]]:
    """Rows of equally long series; a single number stands for all rows."""
    n = max(len(values) for values in series.values() if isinstance(values, list))
    full = {k: v if isinstance(v, list) else [v] * n for k, v in series.items()}
    return [dict(zip(full, values, strict=True)) for values in zip(*full.values(), strict=True)]


RISING = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
FLAT = [0.5] * 6
PEAK = [1.0, 1.1, 1.2, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6]

# By name: what has it, what is said of it, its value, and what has it not.
CASES: dict[str, tuple[Seen, str, float, list[Seen]]] = {
    "first_ratio": (
        Seen(rollouts=[{"ratio_error": 3e-4, "ratio_tolerance": 1e-4}]),
        "3.0e-04 nats (tolerance 1e-04)",
        3e-4,
        [Seen(rollouts=[{"ratio_error": 9e-5, "ratio_tolerance": 1e-4}])],
    ),
    "negative_kl": (
        # z = -0.02 · √10000 / √(2 · 0.02) = -10
        Seen(rollouts=[{"k1": -0.02, "k2": 0.02, "n_tokens": 10_000}]),
        "-0.020 nats per token over 10000 tokens, 10 standard errors below 0",
        -0.02,
        [
            Seen(rollouts=[{"k1": -0.02, "k2": 2.0, "n_tokens": 10_000}]),  # z = -1
            Seen(rollouts=[{"k1": -0.02, "k2": 0.0002, "n_tokens": 400}]),  # one rare token more
            Seen(rollouts=[{"exact_kl": -5e-5}]),
        ],
    ),
    "kl_runaway": (
        # β·KL: 0 to 0.2 · 12 = 2.4; the score stays
        Seen(
            episodes=rows(
                ref_kl=[0.0, 0.0, 0.0, 10.0, 12.0, 14.0],
                score=FLAT,
                score_sd=1.0,
                kl_coef=0.2,
                length=20.0,
            )
        ),
        "the KL costs 2.40 in penalty (at the start 0.00), and the score went from 0.50 to 0.50",
        12.0,
        [
            Seen(
                episodes=rows(
                    ref_kl=[0.0, 0.0, 0.0, 10.0, 12.0, 14.0],
                    score=[0.0, 0.0, 0.0, 2.5, 3.0, 3.5],
                    score_sd=1.0,
                    kl_coef=0.2,
                    length=20.0,
                )
            ),
            Seen(episodes=rows(ref_kl=[17.0] * 3, target_ref_kl=6.0, length=20.0)),
            Seen(episodes=rows(ref_kl=[50.0] * 3, length=20.0)),
        ],
    ),
    "clip_fraction_high": (
        Seen(updates=rows(clip_fraction=[0.1, 0.4, 0.5, 0.6])),
        "50% of the tokens",
        0.5,
        [Seen(updates=rows(clip_fraction=[0.6, 0.3, 0.3, 0.3])), Seen(updates=[{}])],
    ),
    "clip_fraction_zero": (
        Seen(updates=rows(clip_fraction=[0.0] * 6, approx_kl=0.0, several_steps=1.0)),
        "in 6 updates no token was clipped",
        0.0,
        [
            Seen(updates=rows(clip_fraction=[0.0] * 6, approx_kl=1e-3, several_steps=1.0)),
            Seen(updates=rows(clip_fraction=[0.0] * 6, approx_kl=0.0, several_steps=0.0)),
            Seen(updates=rows(clip_fraction=[0.0] * 6, approx_kl=0.0)),  # the value learns alone
        ],
    ),
    "entropy_collapse": (
        Seen(updates=rows(entropy=[2.0, 2.0, 2.0, 1.0, 0.06, 0.04, 0.02])),
        "from 2.00 to 0.040 nats",
        0.04,
        [
            Seen(updates=rows(entropy=[2.0, 2.0, 2.0, 0.5, 0.4, 0.3])),
            Seen(updates=rows(entropy=[0.04] * 6)),  # always sure
            Seen(  # a small task, solved
                updates=rows(entropy=[2.0, 2.0, 2.0, 0.06, 0.04, 0.02]),
                episodes=rows(score=RISING, score_sd=0.2, length=6.0),
            ),
        ],
    ),
    "repetition": (
        Seen(episodes=rows(repetition=[0.0, 0.0, 0.03, 0.2, 0.3, 0.4], score=RISING, score_sd=0.5)),
        "from 0.01 to 0.30, while the score rose from 0.20 to 0.80",
        0.3,
        [
            Seen(episodes=rows(repetition=RISING, score=FLAT, score_sd=0.5)),
            Seen(episodes=rows(repetition=FLAT, score=RISING, score_sd=0.5)),
            Seen(episodes=rows(repetition=RISING, score=RISING, score_sd=5.0)),  # within noise
        ],
    ),
    "duplicates": (
        Seen(episodes=rows(duplicates=[0.0, 0.0, 0.0, 0.1, 0.2, 0.3], score=RISING, score_sd=0.5)),
        "from 0.00 to 0.20, while the score rose",
        0.2,
        [
            Seen(
                episodes=rows(duplicates=[0.2, 0.0, 0.1, 0.1, 0.2, 0.1], score=RISING, score_sd=1)
            ),
            Seen(episodes=rows(score=RISING, score_sd=0.5)),
        ],
    ),
    "eos_gone": (
        Seen(episodes=rows(ran_out=[0.4, 0.5, 0.6, 0.8, 0.98, 1.0, 1.0])),
        "99% of the completions ran out of tokens (at the start 50%)",
        (0.98 + 1 + 1) / 3,
        [
            Seen(episodes=rows(ran_out=[0.9] * 6)),
            Seen(episodes=rows(ran_out=[1.0] * 6, score=RISING, score_sd=0.2, length=6.0)),
        ],
    ),
    "length_drift": (
        Seen(episodes=rows(length=[10.0, 10.0, 10.0, 14.0, 20.0, 26.0])),
        "from 10.0 to 20.0 tokens",
        2.0,
        [
            Seen(episodes=rows(length=[10.0, 10.0, 10.0, 14.0, 14.0, 14.0])),
            Seen(episodes=rows(length=[10.0, 8.0, 12.0, 10.0, 9.0, 11.0])),
        ],
    ),
    "explained_variance": (
        Seen(updates=rows(explained_variance=[0.0, 0.1, 0.0, -0.4, -0.5, -0.6])),
        "-0.50 in the last updates",
        -0.5,
        [
            Seen(updates=rows(explained_variance=[-0.9, -0.5, 0.0, -0.05, 0.0, -0.1])),
            Seen(updates=rows(explained_variance=[0.0, 0.0, 0.0, 0.1, -2.4, 0.0])),  # only once
            Seen(  # all scores are the same by now
                updates=rows(explained_variance=[0.0, 0.1, 0.0, -0.4, -0.5, -0.6]),
                episodes=rows(score_sd=[0.7, 0.7, 0.7, 0.1, 0.1, 0.1]),
            ),
        ],
    ),
    "judge_falls": (
        # best (1.1 + 1.2 + 1.2) / 3, last 0.7; the noise: 5 · 0.1 / 0.954 · √(2/3) = 0.43
        Seen(episodes=rows(judge=PEAK, score=list(np.arange(10) * 0.3), score_sd=1.0)),
        "from 1.17 to 0.70, while the score rose by 1.80 to 2.40",
        1.1666667 - 0.7,
        [
            Seen(episodes=rows(judge=PEAK, score=[0.5] * 10, score_sd=1.0)),
            Seen(episodes=rows(judge=[1.2, 0.8] * 5, score=list(np.arange(10) * 0.3), score_sd=1)),
            Seen(episodes=rows(judge=PEAK[::-1], score=list(np.arange(10) * 0.3), score_sd=1.0)),
        ],
    ),
    "constant_score": (
        Seen(episodes=rows(score=[0.0] * 3, score_sd=0.0)),
        "scored the same",
        0.0,
        [
            Seen(episodes=rows(score=[0.0] * 3, score_sd=[0.0, 0.0, 0.1])),
            Seen(  # all are as good as can be
                episodes=rows(score=RISING, score_sd=[0.1, 0.1, 0.1, 0.0, 0.0, 0.0], length=6.0)
            ),
        ],
    ),
}


def test_every_finding_has_a_case_and_stands_in_the_docs() -> None:
    assert set(CASES) == set(CHECKS)
    text = (DOCS / "doctor.md").read_text(encoding="utf-8")
    for name in [*CHECKS, *vars(Limits())]:
        assert f"`{name}`" in text, name
    metrics = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert "`doctor/<name>`" in metrics and "`doctor/findings`" in metrics


@pytest.mark.parametrize("name", CASES)
def test_a_log_that_has_it_and_logs_that_have_not(name) -> None:
    sick, said, value, healthy = CASES[name]
    (finding,) = examine(sick, Limits(), 500)
    assert finding.name == name and finding.num_timesteps == 500
    assert said in finding.said and finding.value == pytest.approx(value, abs=1e-6)
    assert finding.severity == CHECKS[name].severity and finding.advice == CHECKS[name].advice
    for seen in healthy:
        assert examine(seen, Limits(), 0) == []


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (Seen(rollouts=[{"exact_kl": -2e-4}]), "exact KL to the reference is -2.0e-04"),
        (
            Seen(episodes=rows(ref_kl=[18.0, 20.0, 22.0], target_ref_kl=6.0, length=20.0)),
            "20.0 nats per completion, the target 6",
        ),
        (Seen(episodes=rows(ref_kl=[40.0] * 3, length=10.0)), "4.0 per token"),
    ],
)
def test_other_ways_to_negative_kl_and_runaway(seen, said) -> None:
    (finding,) = examine(seen, Limits(), 0)
    assert finding.name in ("negative_kl", "kl_runaway") and said in finding.said


def test_a_limit_moves_the_finding() -> None:
    seen = CASES["clip_fraction_high"][0]
    assert examine(seen, Limits(clip_high=0.55), 0) == []
    assert examine(seen, Limits(window=4, clip_high=0.39), 0)[0].value == pytest.approx(0.4)
    with pytest.raises(ValueError, match="window and min_episodes of at least 1, got 0"):
        Limits(window=0)


def test_healthy_noise_raises_no_alarm() -> None:
    """40 made-up runs whose score rises by noise and learning, looked at five times each."""
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(40):
        n, rise = 30, rng.uniform(0, 2)
        progress = np.linspace(0, 1, n)
        episodes = rows(
            score=list(rise * progress + rng.normal(0, 0.12, n)),  # 64 episodes of deviation 1
            score_sd=1.0,
            judge=list(0.5 * rise * np.minimum(1, 2 * progress) + rng.normal(0, 0.15, n)),
            ref_kl=list(4 * rise * progress + rng.normal(0, 0.2, n)),
            kl_coef=0.05,
            length=list(12 + 2 * progress + rng.normal(0, 0.5, n)),
            ran_out=list(rng.uniform(0.0, 0.6, n)),
            repetition=list(rng.uniform(0.0, 0.04, n)),
            duplicates=list(rng.uniform(0.0, 0.08, n)),
        )
        updates = rows(
            clip_fraction=list(rng.uniform(0.02, 0.3, n)),
            approx_kl=list(rng.uniform(0.001, 0.02, n)),
            entropy=list(2.5 - rise * 0.8 * progress + rng.normal(0, 0.1, n)),
            explained_variance=list(0.4 * progress + rng.normal(0, 0.04, n)),
            several_steps=1.0,
        )
        rollouts = [{"k1": rng.normal(0, 0.003), "k2": 0.01, "n_tokens": 1500, "exact_kl": 1e-6}]
        for seen_so_far in (6, 9, 12, 20, 30):
            seen = Seen(rollouts, episodes[:seen_so_far], updates[:seen_so_far])
            alarms += [finding.name for finding in examine(seen, Limits(), 0)]
    assert alarms == []


def test_series() -> None:
    assert columns([{"a": 1.0}, {"a": 2.0, "b": 3.0}], "a", "b").tolist() == [[2.0], [3.0]]
    assert columns([], "a", "b").shape == (2, 0)
    assert rank_correlation(np.array([1.0, 2.0, 4.0, 8.0])) == pytest.approx(1)
    assert rank_correlation(np.array([3.0, 3.0])) == 0 and rank_correlation(np.array([])) == 0
    # ranks 1 3 2 4 against 1 2 3 4: 1 - 6·(0 + 1 + 1 + 0) / (4·15) = 0.8
    assert rank_correlation(np.array([1.0, 5.0, 2.0, 7.0])) == pytest.approx(0.8)
    noise = np.random.default_rng(0).normal(size=3000)
    assert rank_correlation(noise + np.linspace(0, 2, 3000)) > 0.9  # of block means


def test_repetition_and_duplicates() -> None:
    # "so good so good so good": so-good-so, good-so-good, so-good-so, good-so-good: 2 of 4
    assert repetition(["so good so good so good"]) == pytest.approx(0.5)
    assert repetition(["so good so good so good", "a b c d", "aaaaaa"]) == pytest.approx(0.5 / 3)
    assert repetition(["好看好看好看"]) == pytest.approx(0.5) and repetition([]) == 0
    texts = ["a fine film indeed"] * 3 + [f"this is film number {i}" for i in range(9)]
    assert duplicates(texts) == pytest.approx(3 / 12)
    assert duplicates(["yes"] * 50) is None  # a word or two may well be the same
