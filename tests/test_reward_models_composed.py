"""Weighted sums made of plain settings."""

import numpy as np
import pytest

from reward_models import weighted_sum

BATCH = {"prompts": ["", ""], "completions": ["one two three", "two"], "reference": ["two", "two"]}


def shouting(name: str, loud: bool = False):
    return lambda completions, **_: [float(loud)] * len(completions)


def test_terms_are_made_by_name_with_their_arguments() -> None:
    settings = {
        "exact": 2,
        "rouge1": {"weight": 0.5, "column": "reference"},
        "length": {"weight": 0.1, "high": 1, "width": 1},
        "own:shouting": {"loud": True},
    }
    reward = weighted_sum(settings, shouting)
    assert reward.names == list(settings)
    texts = (BATCH[name] for name in ("prompts", "completions"))
    parts = reward.parts(*texts, {"reference": BATCH["reference"]})
    np.testing.assert_allclose(parts, [[0, 1], [0.5, 1], [-2, 0], [1, 1]])  # 1 of 3 words, of 1
    np.testing.assert_allclose(reward(**BATCH), [0.25 - 0.2 + 1, 2 + 0.5 + 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exact": "1"}, "exact: expected a number as weight, got '1'"),
        ({"exact": float("nan")}, "exact: expected a finite weight, got nan"),
        ({"length": {"hihg": 3}}, r"length: expected its settings, got {'hihg': 3}"),
        ({"length": {"low": 3, "high": 1}}, "expected 0 <= low <= high"),
        ({}, "at least one"),
    ],
)
def test_settings_that_make_no_term_are_named(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_sum(settings, shouting)


def test_the_term_that_broke_the_contract_is_named_as_in_the_settings() -> None:
    reward = weighted_sum({"mine:f": 1.0}, lambda name: lambda **_: [float("nan")] * 2)
    with pytest.raises(ValueError, match="mine:f: expected a finite score"):
        reward(**BATCH)
