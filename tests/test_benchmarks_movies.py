"""Movie sentences in the baseline benchmark, on a tiny run folder: what is written, its KL."""

import json

import numpy as np
import pytest
import torch as th
import yaml
from conftest import letter_tokenizer, tiny_gpt2
from transformers import BertConfig, BertForSequenceClassification

from agents.language_model import load_named
from benchmarks import movies
from benchmarks.algorithms import Budget, reference
from benchmarks.baselines import CONFIG, MOVIES, OVER_OPTIMISATION, candidates, grid
from benchmarks.baselines_report import write_report
from benchmarks.movies import TEMPERATURE, Movies, chance_to_be_best, run_movies

CONFIGURED = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
LETTERS = "abcdefghijklmnopqr"
V, EOS, PAD = 21, 19, 20
TOLD = {name: a[MOVIES] for name, a in CONFIGURED["algorithms"].items() if MOVIES in a}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder: some letters to write with, two reward models with random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("movies"), letter_tokenizer(LETTERS)
    tiny_gpt2(len(tokenizer), layers=7).save_pretrained(folder / "sft")
    tokenizer.save_pretrained(folder / "sft")
    for seed, name in enumerate(("reward_model", "judge")):
        th.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=1,
            pad_token_id=PAD,
        )
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    for name, rows in {
        "language": [{"text": f"{LETTERS}>"}],
        "prompts": [{"prompt": p} for p in ("a>", "b>", "cd>")],
        "test_prompts": [{"prompt": p} for p in ("e>", "fa>", "b>", "c>")],
    }.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def float32(monkeypatch) -> None:
    """Compute in float32 where the processor has bfloat16 too: figures are compared."""
    monkeypatch.setattr(movies, "dtype_of", lambda common: "float32")


@pytest.fixture
def task(folder, monkeypatch) -> Movies:
    """The task, with a lexicon of one letter."""
    monkeypatch.setattr(movies, "sentiment_lexicon", lambda: {"a": 1.0})
    return Movies(folder)


def log_ref(task: Movies, episode: dict) -> np.ndarray:
    """log π_ref at each state of an episode, (T, V), by full forward passes."""
    tokenizer, lm = letter_tokenizer(LETTERS), load_named(task.lm)
    ids = tokenizer(episode["prompt"] + episode["completion"])["input_ids"]
    ids += [EOS] * (episode["finish_reason"] == "eos")
    n_prompt = len(tokenizer(episode["prompt"])["input_ids"])
    with th.no_grad():
        logits = lm(th.tensor([ids])).logits[0, n_prompt - 1 : -1] / TEMPERATURE
    logits[:, PAD] = -th.inf  # no padding
    logits[:6, EOS] = -th.inf  # no end before six tokens
    return logits.log_softmax(dim=1).double().numpy()


def test_the_kl_of_random_letters_is_exact(task) -> None:
    for episode in task.uniform()():
        expected = 0.0
        for row in log_ref(task, episode):
            allowed = np.isfinite(row)
            expected += (-np.log(allowed.sum()) - row[allowed]).mean()
        assert episode["ref_kl"] == pytest.approx(expected, abs=1e-3)
        assert 6 <= episode["n_tokens"] <= 32


def test_the_kl_of_ranks_is_exact(task) -> None:
    task.ranks, p = 3, np.array([0.2, 0.5, 0.3])
    episodes = task.from_network(lambda features: np.tile(p, (len(features), 1)))()
    for episode in episodes:
        best = -np.sort(-log_ref(task, episode), axis=1)[:, :3]
        assert episode["ref_kl"] == pytest.approx((p * (np.log(p) - best)).sum(), abs=1e-3)


def test_the_reference_has_no_kl_and_greedy_is_greedy(task) -> None:
    warm = reference(task)
    assert [e["ref_kl"] for e in task.from_lm(warm)()] == pytest.approx([0.0] * 4, abs=1e-4)
    greedy = task.from_lm(warm, greedy=True)()
    same = task.write(lambda obs, masks, log_ref: np.eye(V)[log_ref.argmax(axis=1)])
    assert [e["completion"] for e in greedy] == [e["completion"] for e in same]
    assert [e["ref_kl"] for e in greedy] == pytest.approx([e["ref_kl"] for e in same], abs=1e-3)


def test_the_chance_to_be_the_best_by_hand() -> None:
    """Of four, two drawn: six pairs, the highest is the second in one, the third in two."""
    np.testing.assert_allclose(chance_to_be_best(4, 2), np.array([0, 1, 2, 3]) / 6)
    np.testing.assert_allclose(chance_to_be_best(4, 4), [0, 0, 0, 1])


def test_best_of_n_rises_with_n_and_has_the_known_kl(task) -> None:
    one, two, three = task.best_of(3, copies=2)
    assert one["reward"] < two["reward"] < three["reward"] and one["ref_kl"] == 0
    assert two["ref_kl"] == pytest.approx(np.log(2) - 0.5)


@pytest.mark.parametrize("name", sorted(TOLD))
def test_each_algorithm_runs_as_configured(task, folder, name) -> None:
    settings = TOLD[name]["settings"] | TOLD[name]["candidates"][0] | {"measurements": 1}
    settings["task"] = {"n_prompts": 3, "fingerprint": "x"}
    points = run_movies(folder, name, settings, 0, Budget(600, 60))
    assert points[0]["tokens"] == 0 and points[-1]["tokens"] >= 600
    assert all(np.isfinite(list(point.values())).all() for point in points)


def test_the_time_is_kept_within_a_rollout(task, folder) -> None:
    settings = TOLD["TokenPPO"]["settings"] | TOLD["TokenPPO"]["candidates"][0]
    settings["task"] = {"beta": 0.1}
    (last,) = run_movies(folder, "TokenPPO, β = 0.1", settings, 0, Budget(10**6, 1))
    assert last["tokens"] < 10**5
    assert last["value"] == pytest.approx(last["reward"] - 0.1 * last["ref_kl"])


def test_a_seed_gives_a_run_whatever_came_before_and_however_often_it_is_measured(
    task, folder
) -> None:
    settings = TOLD["TokenPPO"]["settings"] | TOLD["TokenPPO"]["candidates"][0]
    once = run_movies(folder, "TokenPPO", settings, 0, Budget(3000, 60))
    th.rand(7)
    often = run_movies(folder, "TokenPPO", settings | {"measurements": 3}, 0, Budget(3000, 60))
    assert len(once) == 1 and len(often) > 3
    assert {**often[-1], "seconds": 0} == pytest.approx({**once[-1], "seconds": 0}, abs=1e-6)


def test_settings_are_chosen_on_other_prompts(folder) -> None:
    tests = [Movies(folder, n_prompts=2, tuning=tuning).test_prompts for tuning in (False, True)]
    assert [[p["prompt"] for p in prompts] for prompts in tests] == [["e>", "fa>"], ["b>", "c>"]]


def test_no_end_costs_one(task) -> None:
    """With a budget of six tokens, before which there is no end, every completion pays."""
    task.max_new_tokens = task._texts["max_new_tokens"] = 6
    found = task.measure(task.uniform())
    assert found["reward"] == pytest.approx(found["score"] - 1)


def test_the_report_shows_movies_and_over_optimisation(tmp_path) -> None:
    """Jobs as configured, results as they might be."""
    config = CONFIGURED | {"budgets": {MOVIES: CONFIGURED["budgets"][MOVIES]}}
    chosen = {MOVIES: dict.fromkeys(TOLD, 1)}
    jobs = list(grid(config, chosen))
    assert sum(job.task == OVER_OPTIMISATION for job in jobs) == 3
    assert len(list(candidates(config))) == 2 * len(TOLD)
    point = {"reward": 1.0, "value": 0.9, "judge": 2.0, "judge_error": 0.2}
    point |= {"lexicon": 0.1, "ref_kl": 3.0, "distinct_2": 0.5, "n": 4, "seconds": 2.0}
    found = [{**job.__dict__, "points": [{"tokens": t, **point} for t in (0, 9)]} for job in jobs]
    text = write_report(found, tmp_path).read_text()
    one, two = "1.00 [1.00, 1.00]", "0.90 [0.90, 0.90]"
    assert f"| TokenPPO | {one} | {two} | 2.00 [2.00, 2.00] |" in text and "| 9* | 2 |" in text
    assert "| best of 4 | 1.00 | 0.90 | 2.00 |" in text and "error of\nabout 0.20" in text
    assert (tmp_path / "over-optimisation.png").stat().st_size > 10_000
