"""The command line: every stage on a user's own files and tiny local models, and its refusals."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import train
from stages.data import data

ROOT = Path(train.__file__).parent
SENTENCES = [
    f"{who} {what} a {how} {thing} that everyone will {end}."
    for who in ("The director", "This young actor", "The old studio")
    for what in ("made", "wrote")
    for how in ("good", "bad", "wonderful", "boring")
    for thing in ("film", "story")
    for end in ("love", "forget")
]
GOOD = ("good", "wonderful", "love")


def goodness(text: str) -> float:
    return float(sum(word in text for word in GOOD))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A user's folder: a language model, a reward backbone, texts, feedback and prompts."""
    folder = tmp_path_factory.mktemp("own")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<pad>", "[CLS]", "[SEP]"],
        initial_alphabet=alphabet,
    )
    words.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", model_max_length=64
    )
    tiny_llama(len(tokenizer)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    (folder / "texts.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    with (folder / "feedback.jsonl").open("w") as file:
        for text in SENTENCES:
            rating = {"rating": goodness(text), "scale": [0, 3]}
            file.write(json.dumps({"prompt": "", "completion": text, **rating}) + "\n")
    prompts = [" ".join(text.split()[:3]) for text in SENTENCES]
    (folder / "prompts.txt").write_text("\n".join(prompts[:8]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(own, tmp_path_factory) -> Path:
    """A run folder in which every stage has been done, one command each."""
    run = tmp_path_factory.mktemp("run") / "a"
    common = ["--run", str(run), "--device", "cpu", "--dtype", "float32"]
    lines = [
        f"sft --model {own}/lm --texts {own}/texts.txt --trainable_layers null --epochs 2 "
        "--learning_rate 3e-3",
        f"reward --model {own}/encoder --feedback {own}/feedback.jsonl "
        f"--judge_feedback {own}/feedback.jsonl --epochs 2 --learning_rate 1e-3",
        f"ppo --prompts {own}/prompts.txt --total_timesteps 512 --n_envs 8 --n_steps 16 "
        "--batch_size 64 --trainable_layers null --learning_rate 1e-3 --max_new_tokens 12",
        f"evaluate --prompts {own}/prompts.txt --max_new_tokens 12 --best_of 2",
    ]
    for line in lines:
        assert train.main([*line.split(), *common]) == 0, line
    return run


def test_the_run_folder_holds_what_the_readme_says(finished, capsys) -> None:
    for name in ("sft", "policy"):
        AutoModelForCausalLM.from_pretrained(finished / name)
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "sft", "reward_model", "judge", "policy", "metrics.jsonl", "samples.jsonl", "tensorboard",
        "evaluation.json", "report.md", "curves.png", "stages", "config-ppo.yaml",
    }  # fmt: skip
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert len(rows) == 4
    assert {"rollout/score_mean", "rollout/judge_mean", "rollout/ref_kl"} <= set(rows[-1])
    report = (finished / "report.md").read_text()
    assert "distinct-2" in report and "The director made" in report
    assert "## What the doctor found" in report and (finished / "doctor.jsonl").exists()
    assert all(row["doctor/first_ratio"] == 0 for row in rows)
    assert (finished / "curves.png").stat().st_size > 10_000
    found = json.loads((finished / "evaluation.json").read_text())
    assert set(found["measures"]) == {"warm start", "policy", "warm start, greedy", "best of 2"}
    assert found["judge_scale"] == [0, 3] and "0 to 3" in report
    assert found["measures"]["warm start"]["ref_kl"][0] == pytest.approx(0, abs=1e-5)
    assert found["measures"]["policy"]["ref_kl"][0] > 0


def test_a_stage_never_replaces_results_unasked(finished, own, capsys) -> None:
    line = f"evaluate --run {finished} --prompts {own}/prompts.txt --max_new_tokens 8 --best_of 1"
    before = (finished / "report.md").read_bytes()
    assert train.main(line.split()) == 1
    assert "exist already" in capsys.readouterr().err
    assert (finished / "report.md").read_bytes() == before
    assert yaml.safe_load((finished / "config-evaluate.yaml").read_text())["best_of"] == 2
    assert train.main([*line.split(), "--overwrite", "true"]) == 0
    assert (finished / "report.md").read_bytes() != before


def test_a_stage_that_fails_keeps_what_was_there(finished, own, capsys) -> None:
    before = (finished / "policy/model.safetensors").read_bytes()
    line = f"ppo --run {finished} --overwrite true --prompts {own}/nothing.txt"
    assert train.main(line.split()) == 1
    assert "nothing.txt" in capsys.readouterr().err
    assert (finished / "policy/model.safetensors").read_bytes() == before
    assert not (finished / "ppo.unfinished").exists()


def test_a_run_can_go_on_from_its_own_policy(finished, own, tmp_path) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    before = (again / "policy/model.safetensors").read_bytes()
    line = (
        f"ppo --run {again} --policy {again}/policy --prompts {own}/prompts.txt --overwrite true "
        "--max_new_tokens 8 --total_timesteps 64 --n_envs 4 --n_steps 16 --batch_size 64 "
        "--device cpu --dtype float32"
    )
    assert train.main(line.split()) == 0
    assert (again / "policy/model.safetensors").read_bytes() != before


def test_ppo_writes_whole_episodes_by_default(finished, own, tmp_path) -> None:
    line = (
        f"ppo --run {tmp_path} --policy {finished}/sft --reward_model {finished}/reward_model "
        f"--prompts {own}/prompts.txt --device cpu --dtype float32 --n_envs 6 "
        "--max_new_tokens 8 --min_new_tokens 1 --total_timesteps 80 --batch_size 64"
    )
    assert train.main(line.split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(row["rollout/episodes"] == 6 for row in rows)
    written = sum(6 * row["rollout/completion_tokens"] for row in rows)
    assert len(rows) == 2 and rows[-1]["time/total_timesteps"] == round(written)


def test_interrupted_training_leaves_its_log(finished, own, tmp_path, monkeypatch) -> None:
    from agents import SampleTextCallback

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SampleTextCallback, "_on_rollout_end", interrupt)
    again = tmp_path / "again"
    again.mkdir()
    line = (
        f"ppo --run {again} --policy {finished}/sft --reward_model {finished}/reward_model "
        f"--prompts {own}/prompts.txt --device cpu --dtype float32 --n_envs 4"
    )
    assert train.main(line.split()) == 130
    assert (again / "ppo.unfinished").exists() and not (again / "policy").exists()


def test_a_saved_config_repeats_the_stage(finished, own, tmp_path) -> None:
    again = tmp_path / "again"
    for name in ("sft", "reward_model"):
        (again / name).parent.mkdir(exist_ok=True)
        (again / name).symlink_to(finished / name)
    config = finished / "config-ppo.yaml"
    assert yaml.safe_load(config.read_text())["n_envs"] == 8
    assert train.main(["ppo", "--config", str(config), "--run", str(again)]) == 0
    a, b = ((folder / "policy/model.safetensors").read_bytes() for folder in (finished, again))
    assert a == b


def test_a_disk_that_takes_no_more_is_one_clear_line(own, tmp_path, capsys) -> None:
    """The system refuses to let any file grow past 20 kB; the model has some 150."""
    run, line = tmp_path / "run", f"sft --model {own}/lm --texts {own}/texts.txt --max_steps 1"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert train.main([*line.split(), "--run", str(run)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "could not save" in error.splitlines()[-2] and "error: " in error
    assert list(run.iterdir()) == []


BAD = {
    "unknown model": (
        "sft --model no/such-model --texts {own}/texts.txt",
        "'no/such-model'",
    ),
    "other vocabulary in sft": ("sft --model {own}/mixed --texts {own}/texts.txt", "vocabulary"),
    "no updates": (
        "sft --model {own}/lm --texts {own}/texts.txt --max_steps 0",
        "at least one update",
    ),
    "text too long for the model": (
        "ppo --policy {own}/lm --prompts {own}/prompts.txt --max_new_tokens 200",
        "has positions for",
    ),
    "truncated weights": ("ppo --policy {own}/cut --prompts {own}/prompts.txt", "causal LM"),
    "other vocabulary": ("ppo --policy {own}/mixed --prompts {own}/prompts.txt", "vocabulary"),
    "empty prompts": ("ppo --policy {own}/lm --prompts {own}/empty.txt", "at least one prompt"),
    "malformed line": ("ppo --policy {own}/lm --prompts {own}/broken.jsonl", "line 2"),
    "malformed feedback": ("reward --model {own}/encoder --feedback {own}/broken.jsonl", "line 1"),
    "missing stage": ("ppo --prompts {own}/prompts.txt", "run that stage first"),
    "missing file": ("sft --model {own}/lm --texts {own}/nothing.txt", "nothing.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(name, own, tmp_path, capsys) -> None:
    (own / "empty.txt").write_text("")
    (own / "broken.jsonl").write_text('{"prompt": "The film"}\n{"prompt": \n')
    if not (own / "mixed").exists():
        tiny_llama(50).save_pretrained(own / "mixed")
        PreTrainedTokenizerFast.from_pretrained(own / "lm").save_pretrained(own / "mixed")
    if not (own / "cut").exists():
        shutil.copytree(own / "lm", own / "cut")
        weights = (own / "cut/model.safetensors").read_bytes()
        (own / "cut/model.safetensors").write_bytes(weights[:1000])
    line, message = BAD[name]
    run = tmp_path / "run"
    arguments = [*line.format(own=own).split(), "--run", str(run)]
    if line.startswith("ppo") and "--policy" in line:
        arguments += ["--reward_model", str(own / "encoder")]
    capsys.readouterr()  # what saving those folders printed
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error.splitlines()[0] and "error: " in error
    assert list(run.iterdir()) == []


def test_a_run_looks_for_its_files_before_the_first_stage(own, tmp_path, capsys) -> None:
    line = f"run --run {tmp_path}/run --sft.texts {own}/texts.txt --evaluate.prompts {own}/nope.txt"
    assert train.main(line.split()) == 1
    error = capsys.readouterr().err
    assert "evaluate.prompts: expected a file" in error and "nope.txt" in error
    assert not (tmp_path / "run/sft").exists()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ("--total_timesteps 0 --n_steps 16", "got 0 and 0 from 0 tokens"),
        ("--total_timesteps 16 --n_steps 2", "got 0 and [1-9]+ from 16 tokens"),
    ],
)
def test_a_run_that_trained_nothing_fails(own, tmp_path, capsys, settings, found) -> None:
    line = (
        f"ppo --run {tmp_path} --policy {own}/lm --reward_model {own}/encoder --n_envs 8 "
        f"--prompts {own}/prompts.txt --batch_size 16 --max_new_tokens 12 --trainable_layers null "
        f"--device cpu --dtype float32 {settings}"
    )
    assert train.main(line.split()) == 1
    assert re.search(f"nothing was trained: .*{found}", capsys.readouterr().err)
    assert not (tmp_path / "policy").exists() and not (tmp_path / "stages").exists()


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_reward_model_that_gives_nan(own, tmp_path, capsys, on_nonfinite) -> None:
    """The stage fails either way, as nothing can be learned; with "skip" after the last token."""
    broken = BertForSequenceClassification.from_pretrained(own / "encoder")
    broken.classifier.bias.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "nan")
    for file in own.glob("encoder/*token*"):
        shutil.copy(file, tmp_path / "nan")
    line = (
        f"ppo --run {tmp_path} --policy {own}/lm --reward_model {tmp_path}/nan --n_envs 4 "
        f"--prompts {own}/prompts.txt --max_new_tokens 8 --trainable_layers null --device cpu "
        f"--dtype float32 --total_timesteps 32 --on_nonfinite {on_nonfinite}"
    )
    assert train.main(line.split()) == 1
    error = capsys.readouterr().err
    if on_nonfinite == "raise":
        assert "expected a finite number, got nan for the completion" in error
    else:
        assert "nothing was trained" in error
        row = json.loads((tmp_path / "ppo.unfinished/metrics.jsonl").read_text().splitlines()[-1])
        assert row.get("rollout/episodes", 0) == 0
    assert not (tmp_path / "policy").exists()


def test_help_is_instant_and_imports_no_torch() -> None:
    code = (
        "import sys, train\n"
        "try: train.main(['ppo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "total_timesteps" in done.stdout


def test_print_config_and_presets_are_valid(capsys) -> None:
    for preset in sorted({*(ROOT / "configs").glob("*.yaml")} - {train.Tune().space}):
        with pytest.raises(SystemExit) as stopped:
            train.main(["--config", str(preset), "--print_config"])
        assert stopped.value.code == 0
        assert "total_timesteps" in capsys.readouterr().out


def test_the_islands_never_import_one_another() -> None:
    islands = ("text_env", "reward_models", "agents")
    composed = (*islands, "stages", "configs", "train")
    for island in islands:
        for file in (ROOT / island).rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                for other in composed:
                    if other != island:
                        stripped = line.strip()
                        assert not stripped.startswith((f"import {other}", f"from {other}")), file


@pytest.mark.network
def test_the_default_data(tmp_path) -> None:
    folder = data(train.Common(run=tmp_path))
    texts: list[set[str]] = []
    for name, key in (
        ("language", "text"),
        ("reward_model", "completion"),
        ("judge", "completion"),
    ):
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
            texts.append({" ".join(json.loads(line)[key].casefold().split()) for line in file})
    assert min(map(len, texts)) > 2500
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    prompts = [
        {json.loads(line)["prompt"] for line in (folder / f"{name}.jsonl").open(encoding="utf-8")}
        for name in ("prompts", "test_prompts")
    ]
    assert min(map(len, prompts)) > 300 and not prompts[0] & prompts[1]


@pytest.mark.xdist_group("ranks")
def test_several_processes_do_the_whole_job(own, tmp_path) -> None:
    """Two processes: PPO on both, the other stages on the first, one run folder."""
    run = tmp_path / "run"
    line = (
        f"run --run {run} --device cpu --dtype float32 "
        f"--sft.model {own}/lm --sft.texts {own}/texts.txt --sft.max_steps 2 "
        f"--reward.model {own}/encoder --reward.feedback {own}/feedback.jsonl --reward.epochs 1 "
        f"--reward.judge_feedback {own}/feedback.jsonl --ppo.prompts {own}/prompts.txt "
        "--ppo.total_timesteps 300 --ppo.n_envs 16 --ppo.max_new_tokens 8 --ppo.min_new_tokens 1 "
        "--ppo.batch_size 64 --ppo.lora_rank 4 --ppo.value_network true --ppo.value_warmup 1 "
        f"--evaluate.prompts {own}/prompts.txt --evaluate.best_of 1"
    )
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--",
    ]
    command = [*start, str(ROOT / "train.py"), *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("== ppo") == 1 and done.stdout.count("== evaluate") == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert all(row["rollout/episodes"] == 16 for row in rows)
    AutoModelForCausalLM.from_pretrained(run / "policy")
    assert (run / "report.md").exists() and not list(run.glob("*.unfinished"))
