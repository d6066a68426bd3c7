"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest
from gymnasium.vector import AutoresetMode

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("autoreset", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_single_file_ppo_learns_alike_in_all_modes(autoreset) -> None:
    """Random scores 1 − 0.9⁸, 0.57 of 8: one token of ten is a c, and one ends it."""
    ppo = load("single_file_ppo")
    curve = ppo.train("vector_entry_point", autoreset, 20)
    assert curve[0] < 1.5 and curve[-1] > 4
    for mode in ("sync", "async"):
        assert ppo.train(mode, autoreset, 3) == curve[:3]


def test_multi_turn_chat_learns_to_ask_and_to_read_the_answer() -> None:
    """Who does not ask scores 0.25 at most; so does who does not read what the user says."""
    scores, episodes = load("multi_turn_chat").train(40_000)
    assert scores[0] < 0.3 and sum(scores[-5:]) / 5 > 0.7
    assert all(episode["messages"][1]["content"].startswith("?") for episode in episodes)
    assert sum(episode["score"] for episode in episodes) >= 3
