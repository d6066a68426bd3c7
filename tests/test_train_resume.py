"""`train.py ppo --resume RUN`: stopped by a signal, gone on with, and the same as never stopped."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from checkpoint_fixtures import TIMES
from test_train import own  # noqa: F401

import agents.callbacks
import train
from stages import run_folder
from stages.ppo import train_policy
from stages.resume import as_begun

COMMON = "--device cpu --dtype float32"


def line(folder: Path, run: Path, **changes) -> list[str]:
    settings = {
        "policy": folder / "lm",
        "reward_model": folder / "encoder",
        "prompts": folder / "prompts.txt",
        "total_timesteps": 256,
        "n_envs": 4,
        "n_steps": 16,
        "batch_size": 32,
        "trainable_layers": 1,
        "learning_rate": "1e-3",
        "max_new_tokens": 12,
        "checkpoint_every": 2,
        **changes,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return ["ppo", "--run", str(run), *COMMON.split(), *flags]


def rows(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in lines]


def stop_in(monkeypatch, rollout: int) -> None:
    """Send SIGTERM as a rollout ends; the next token is the next rollout's first."""
    seen = agents.callbacks.SampleTextCallback._on_rollout_end

    def then_stop(self) -> None:
        seen(self)
        if self._rollouts == rollout:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(agents.callbacks.SampleTextCallback, "_on_rollout_end", then_stop)


def test_a_stopped_run_goes_on_and_is_the_same(own, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    a, b = tmp_path / "a", tmp_path / "b"
    assert train.main(line(own, a)) == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert train.main(line(own, b)) == 143
    said = capsys.readouterr().out
    assert "stopped by SIGTERM" in said and f"python train.py ppo --resume {b}" in said
    assert not (b / "policy").exists()
    # a new training does not throw the stopped one away, nor does one of other settings go on
    assert train.main(line(own, b)) == 1
    assert "has checkpoints of a training that was stopped" in capsys.readouterr().err
    assert train.main(["ppo", "--resume", str(b), "--n_epochs", "5"]) == 1
    assert "began with, where n_epochs is 2, not 5" in capsys.readouterr().err
    assert train.main(["ppo", "--resume", str(b), "--device", "cpu"]) == 0
    assert repr(rows(a)) == repr(rows(b)) and len(rows(b)) == 4
    made = ("samples.jsonl", "doctor.jsonl", "policy/model.safetensors", "policy/config.json")
    for name in made:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert {p.name for p in a.iterdir()} >= {p.name for p in b.iterdir()} - {"config-ppo.yaml"}
    assert max(p.name for p in (b / "checkpoints").glob("step-*")) == "step-00000256"
    assert not (b / "ppo.unfinished").exists()
    assert train.main(line(own, b)) == 1
    said = f"could go on with: python train.py ppo --resume {b} --total_timesteps MORE or"
    assert said in capsys.readouterr().err
    # a finished run has nothing left to do, unless it is to have more tokens
    assert train.main(["ppo", "--resume", str(b)]) == 1
    assert "is finished, with 256 tokens: expected more" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_in(patch, 5)
        with pytest.warns(UserWarning, match="total_timesteps: 256 in the checkpoint, 384 from"):
            assert train.main(["ppo", "--resume", str(b), "--total_timesteps", "384"]) == 143
    assert json.loads((b / "stages/ppo.json").read_text())["tokens"] == 256
    # stopped once more, it knows how many tokens it is to have
    (b / "report.md").touch()
    capsys.readouterr()
    assert train.main(["ppo", "--resume", str(b)]) == 0
    assert f"{b}/report.md is of the policy before" in capsys.readouterr().out
    assert len(rows(b)) == 6 and json.loads((b / "stages/ppo.json").read_text())["tokens"] == 384
    assert rows(b)[:4] == rows(a) and not (b / "ppo.unfinished").exists()


def test_a_crash_while_results_are_put_in_place(own, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    run, whole, put = tmp_path / "run", tmp_path / "whole", run_folder.put_in_place
    assert train.main(line(own, whole, total_timesteps=128)) == 0

    def crash_at(name: str):
        def crash(new: Path, place: Path) -> None:
            if place.name == name:
                raise KeyboardInterrupt
            put(new, place)

        return crash

    began = line(own, run, total_timesteps=128)
    for name in ("policy", "samples.jsonl", "checkpoints"):
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "put_in_place", crash_at(name))
            assert train.main(began) == 130
        began = ["ppo", "--resume", str(run)]
    assert not (run / "stages/ppo.json").exists()
    with monkeypatch.context() as patch:  # behind the last of them
        patch.setattr(run_folder, "peak_memory", lambda: 1 / 0)
        assert train.main(began) == 1
    assert train.main(began) == 0
    assert repr(rows(run)) == repr(rows(whole))
    made = ("samples.jsonl", "doctor.jsonl", "policy/model.safetensors")
    for name in made:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    facts = [json.loads((folder / "stages/ppo.json").read_text()) for folder in (run, whole)]
    assert facts[0].keys() == facts[1].keys() and facts[0]["tokens"] == facts[1]["tokens"]
    assert not (run / "ppo.unfinished").exists()
    assert train.main(began) == 1
    assert "is finished, with 128 tokens: expected more" in capsys.readouterr().err


def test_several_processes_do_not_resume_and_say_why(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("agents.ranks.world_size", lambda: 2)
    monkeypatch.setattr("agents.ranks.rank", lambda: 0)
    settings = train.PPO(resume=tmp_path)
    with pytest.raises(ValueError, match=r"one process with resume, got 2: only .*guarantees\.md"):
        train_policy(train.Common(run=tmp_path), settings)
    with pytest.raises(FileNotFoundError, match="which one process makes and several do not"):
        as_begun(train.Common(), settings, asked=())


def test_settings_asked_for_are_not_taken_for_defaults(own, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    run, default = tmp_path / "run", train.PPO()
    changes = {"total_timesteps": 128, "stop_on": "[kl_runaway]"}
    with monkeypatch.context() as patch:
        stop_in(patch, 1)
        assert train.main(line(own, run, **changes)) == 143
    # 128 rows is the default, but not what the run began with
    assert train.main(["ppo", "--resume", str(run), "--n_envs", str(default.n_envs)]) == 1
    assert "began with, where n_envs is 4, not 128" in capsys.readouterr().err
    assert train.main(["ppo", "--resume", str(run), "--total_timesteps", "64"]) == 1
    assert "is stopped, with 64 tokens: expected more" in capsys.readouterr().err
    prompts = own / "prompts.txt"
    before = prompts.read_text()
    prompts.write_text(before.replace("made", "wrote"))
    assert train.main(["ppo", "--resume", str(run)]) == 1
    assert "another run; prompts of prompts.txt: " in capsys.readouterr().err
    prompts.write_text(before)
    assert train.main(["ppo", "--resume", str(run), "--stop_on=[]"]) == 0
    began = json.loads((run / "checkpoints/settings.json").read_text())["ppo"]
    assert began["stop_on"] == [] and began["total_timesteps"] == 128


@pytest.mark.slow
def test_the_doctor_of_a_stopped_run_goes_on(own, tmp_path, monkeypatch) -> None:  # noqa: F811
    a, b = tmp_path / "a", tmp_path / "b"
    settings = {"total_timesteps": 512, "learning_rate": 0.0}  # six updates show that none learns
    assert train.main(line(own, a, **settings)) == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 3)
        assert train.main(line(own, b, **settings)) == 143
    with (b / "ppo.unfinished/doctor.jsonl").open("a") as file:  # after the checkpoint, before -9
        file.write('{"name": "kl_runaway"}\n')
    assert train.main(["ppo", "--resume", str(b)]) == 0
    found = (a / "doctor.jsonl").read_text()
    assert found and (b / "doctor.jsonl").read_text() == found
    names = [json.loads(text)["name"] for text in found.splitlines()]
    for run in (a, b):
        assert json.loads((run / "stages/ppo.json").read_text())["doctor"] == names
    assert repr(rows(a)) == repr(rows(b))


@pytest.mark.slow
def test_a_run_that_the_doctor_stopped_can_go_on(own, tmp_path) -> None:  # noqa: F811
    run, stop_on = tmp_path / "run", "--stop_on=[eos_gone,constant_score,clip_fraction_zero]"
    settings = {"total_timesteps": 1024, "learning_rate": 0.0, "n_envs": 8}
    assert train.main([*line(own, run, **settings), stop_on]) == 0
    stopped_at = json.loads((run / "stages/ppo.json").read_text())["tokens"]
    assert stopped_at < 1024
    assert train.main(["ppo", "--resume", str(run), "--stop_on=[judge_falls]"]) == 0
    assert json.loads((run / "stages/ppo.json").read_text())["tokens"] >= 1024


@pytest.mark.slow
def test_other_models_are_refused_by_name(own, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    mine, run = tmp_path / "own", tmp_path / "run"
    shutil.copytree(own, mine)
    with monkeypatch.context() as patch:
        stop_in(patch, 1)
        assert train.main(line(mine, run, total_timesteps=128)) == 143
    for name, changed in (("policy", "lm"), ("reward model", "encoder"), ("tokenizer", "lm")):
        file = mine / changed / ("tokenizer.json" if name == "tokenizer" else "config.json")
        before = file.read_text()
        if name == "tokenizer":
            file.write_text(before.replace('"<eos>"', '"<end>"'))
        else:
            file.write_text(before.replace("{", "{ ", 1))
        assert train.main(["ppo", "--resume", str(run)]) == 1
        error = capsys.readouterr().err
        assert name in error.splitlines()[0], error
        file.write_text(before)
    prompts = mine / "prompts.txt"
    before = prompts.read_text()
    prompts.write_text(before.replace("made", "wrote"))
    assert train.main(["ppo", "--resume", str(run)]) == 1
    assert "prompts" in capsys.readouterr().err.splitlines()[0]
    prompts.write_text(before)
    (run / "ppo.unfinished/metrics.jsonl").write_text("")
    assert train.main(["ppo", "--resume", str(run)]) == 1
    assert "metrics.jsonl: expected at least" in capsys.readouterr().err
    assert train.main(["ppo", "--resume", str(tmp_path / "nothing")]) == 1
    assert "expected a run folder with checkpoints" in capsys.readouterr().err
