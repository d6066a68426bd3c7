"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest
from gymnasium.vector import AutoresetMode
from test_reward_models_learned import make_backbone

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


def test_the_article_task_from_ratings_to_test_prompts(tmp_path, capsys) -> None:
    article = load("article")
    lm, encoder = (make_backbone(tmp_path / kind, kind) for kind in ("llama", "bert"))
    arguments = f"--model {lm} --encoder {encoder} --total_timesteps 64 --n_envs 4"
    before, after = article.main([*arguments.split(), "--samples", f"{tmp_path}/samples.jsonl"])
    assert 0 < before < 1 and 0 < after < 1
    assert "mean reward on 8 test prompts" in capsys.readouterr().out
    assert (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    answers = iter(["6", "", "5", "1"])
    written = article.generate(str(lm), ["the film"], n=2)
    assert article.ask(written, lambda _: next(answers)) == [5, 1]


def test_the_articles_ratings_are_whole_and_none_is_of_a_test_prompt() -> None:
    article = load("article")
    prompts, completions, scores = article.load_ratings(article.RATINGS)
    assert len(set(zip(prompts, completions, strict=True))) == len(scores) == 72
    assert set(scores) == {1, 2, 3, 4, 5} and not set(prompts) & set(article.TEST_PROMPTS)
