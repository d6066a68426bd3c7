"""`train.py tune`: a search on tiny models, gone on with, whose best settings stage ppo takes."""

import json
from dataclasses import asdict

import pytest
import yaml
from test_train import SENTENCES, own  # noqa: F401

import train
from agents import tuning

SPACE = "learning_rate: {low: 0.0001, high: 0.01, log: true}\nn_epochs: [1, 2]\n"


@pytest.fixture
def line(own, tmp_path) -> list[str]:  # noqa: F811
    (tmp_path / "space.yaml").write_text(SPACE)
    prompts = [" ".join(text.split()[: 3 + i % 3]) for i, text in enumerate(SENTENCES)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    return (
        f"tune --run {tmp_path}/run --space {tmp_path}/space.yaml --judge {own}/encoder "
        f"--ppo.policy {own}/lm --ppo.reward_model {own}/encoder "
        f"--ppo.prompts {tmp_path}/prompts.txt "
        "--ppo.total_timesteps 64 --ppo.n_envs 4 --ppo.batch_size 32 --ppo.trainable_layers 1 "
        "--ppo.max_new_tokens 8 --ppo.learning_rate 1e-3 --n_prompts 3 --evaluations 2 "
        "--device cpu --dtype float32"
    ).split()


def test_a_search_leaves_settings_that_ppo_takes(own, line, tmp_path, capsys) -> None:  # noqa: F811
    assert train.main([*line, "--trials", "1"]) == 0
    assert train.main([*line, "--trials", "2"]) == 0
    out, folder = capsys.readouterr().out, tmp_path / "run/tune"
    assert out.count("state complete") + out.count("state pruned") == 2 and "best.yaml" in out
    report = (folder / "tune.md").read_text()
    assert "2 trials: 64 tokens each" in report and "learning_rate" in report
    assert (folder / "tune.png").stat().st_size > 5000
    prompts = {
        name: {json.loads(row)["prompt"] for row in (folder / f"prompts/{name}.jsonl").open()}
        for name in ("train", "held_out")
    }
    assert len(prompts["held_out"]) == 3 and not prompts["held_out"] & prompts["train"]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert str(best["learning_rate"]) and best["prompts"] == f"{tmp_path}/prompts.txt"

    # A trial is the training that stage ppo does with its values: the logs are the same.
    study = tuning.open_study(folder, json.loads(settings_of(folder)), {}, 2)
    trial = study.trials[0]
    assert trial.params == {"learning_rate": 1e-3, "n_epochs": 2}
    again = (
        f"ppo --config {folder}/best.yaml --run {tmp_path}/again --learning_rate 1e-3 --n_epochs 2 "
        f"--prompts {folder}/prompts/train.jsonl --device cpu --dtype float32"
    )
    assert train.main(again.split()) == 0
    logs = [tmp_path / "again/metrics.jsonl", folder / "trials/0000/metrics.jsonl"]
    a, b = ([json.loads(row) for row in log.open()] for log in logs)
    assert [r["rollout/score_mean"] for r in a] == [r["rollout/score_mean"] for r in b]
    assert [r["rollout/ref_kl"] for r in a] == [r["rollout/ref_kl"] for r in b]
    assert not list(folder.glob("trials/*/*.safetensors"))


def settings_of(folder) -> str:
    import sqlite3

    with sqlite3.connect(folder / "study.sqlite") as db:
        query = "select value_json from study_user_attributes where key = 'settings'"
        return db.execute(query).fetchone()[0]


def test_a_search_keeps_its_settings_and_needs_a_judge(line, tmp_path, capsys) -> None:
    wrong = [word.replace("learning_rate: ", "policy: ") for word in line]
    (tmp_path / "space.yaml").write_text("policy: [a, b]\n")
    assert train.main(wrong) == 1
    assert "expected names of total_timesteps" in capsys.readouterr().err
    (tmp_path / "space.yaml").write_text(SPACE)
    at = line.index("--judge")
    assert train.main([*line[:at], *line[at + 2 :]]) == 1
    assert "train.py reward" in capsys.readouterr().err


def test_the_space_in_configs_is_one() -> None:
    base = asdict(train.PPO())
    space = tuning.read_space(train.Tune().space, base)
    assert tuning.values_inside(space, base)  # the presets' values are tried first
