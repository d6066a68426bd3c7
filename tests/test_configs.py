"""The presets: settings that train.py knows, files that are there, data that are sound."""

import importlib.util
import json
from pathlib import Path

import pytest

import train
from reward_models import read_feedback

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


def test_the_small_data_sets_are_what_the_script_writes(tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("make_data", ROOT / "configs/make_data.py")
    assert spec is not None and spec.loader is not None
    make_data = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_data)
    make_data.main(tmp_path)
    for task in ("qa", "summaries"):
        seen: set[str] = set()
        for part, size in make_data.SIZES.items():
            text = (tmp_path / task / f"{part}.jsonl").read_text(encoding="utf-8")
            assert text == (ROOT / "configs" / task / f"{part}.jsonl").read_text(encoding="utf-8")
            prompts = {json.loads(line)["prompt"] for line in text.splitlines()}
            assert len(prompts) == size and not prompts & seen
            seen |= prompts
        for part in ("feedback", "judge"):
            records = read_feedback(ROOT / "configs" / task / f"{part}.jsonl")
            assert all(record.chosen != record.rejected for record in records)
