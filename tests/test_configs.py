"""The presets: settings that train.py knows, files that are there, data that are sound."""

import json
import re
from pathlib import Path

import pytest

import train
from configs import make_data
from reward_models import Rouge, read_feedback

ROOT = Path(train.__file__).parent
PRESETS = sorted(set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs" / "tune.yaml"})


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_can_be_read(preset: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = train.make_parser()
    chosen = parser.instantiate(parser.parse_args(["run", "--config", str(preset)]))["run"]
    settings = train.Run(chosen.sft, chosen.reward, chosen.ppo, chosen.evaluate)
    train.require_files(settings)
    if settings.sft.model.endswith(".json"):
        assert Path(settings.sft.model).is_file()


def rows_of(task: str, part: str) -> list[dict]:
    text = (ROOT / "configs" / task / f"{part}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("task", ["qa", "summaries"])
def test_the_small_data_sets_are_what_the_script_writes(tmp_path, task) -> None:
    make_data.main(tmp_path)
    seen: set[str] = set()
    for name, part in make_data.PARTS.items():
        made, kept = (place / task / f"{name}.jsonl" for place in (tmp_path, ROOT / "configs"))
        assert made.read_bytes() == kept.read_bytes(), "run configs/make_data.py"
        prompts = {row["prompt"] for row in rows_of(task, name)}
        assert len(prompts) == part.size and not prompts & seen
        seen |= prompts
    for part in ("feedback", "judge"):
        records = read_feedback(ROOT / "configs" / task / f"{part}.jsonl")
        assert all(record.chosen != record.rejected for record in records)
    assert sum(path.stat().st_size for path in (ROOT / "configs" / task).iterdir()) < 400_000


@pytest.mark.parametrize("task", ["qa", "summaries"])
def test_ppo_and_the_test_meet_words_that_no_part_before_has_shown(task) -> None:
    words = {
        part: {word for row in rows_of(task, part) for word in re.findall(r"\w+", str(row))}
        for part in ("warm_start", "train", "test")
    }
    assert {"Amal", "Arden"} <= words["warm_start"]
    assert {"Wanda", "Upwell"} <= words["train"] - words["warm_start"]
    assert {"Greta", "Girton"} <= words["test"] - words["train"] - words["warm_start"]


def test_a_copied_sentence_is_not_a_summary() -> None:
    rouge = Rouge("rouge1")
    for row in rows_of("summaries", "test"):
        report = row["prompt"].partition("\nIn one sentence:")[0]
        sentences = re.findall(r".+?[.?](?= |$)", report)
        assert 3 <= len(sentences) <= 7
        texts = [*sentences, row["reference"][0]]
        *copied, own = rouge(
            prompts=[row["prompt"]] * len(texts),
            completions=texts,
            reference=[row["reference"]] * len(texts),
        )
        assert own == 1 and max(copied) < 0.9


@pytest.mark.parametrize("task", ["qa", "summaries"])
def test_some_of_what_the_warm_start_is_shown_is_careless(task) -> None:
    shown = [row["completion"] for row in rows_of(task, "warm_start")]
    if task == "qa":
        careless = [text for text in shown if text.startswith(("That would be", "I believe"))]
        assert all(len(text.split()) <= 4 for text in shown if text not in careless)
    else:
        reports = " ".join(row["prompt"] for row in rows_of(task, "warm_start"))
        careless = [text for text in shown if re.split(r"(?<=\.) ", text)[-1] in reports]
    assert 0.2 < len(careless) / len(shown) < 0.4
