"""The checkpoints' benchmark, once, with a tiny model."""

from pathlib import Path

import pytest
from conftest import letter_tokenizer, tiny_gpt2

from benchmarks.checkpoints import measure


def test_seconds_and_megabytes_of_a_tiny_model(tmp_path: Path) -> None:
    lm = tiny_gpt2(16, width=16, layers=2)
    lm.save_pretrained(tmp_path)
    letter_tokenizer("abcdefTh film").save_pretrained(tmp_path)
    found = measure(tmp_path, trainable_layers=1, rounds=1)
    assert found["save"] > 0 and found["load"] > 0
    weights = 4 * sum(p.numel() for p in lm.parameters()) / 1e6
    assert weights < found["policy.safetensors"] < 1.5 * weights + 0.01
    files = {name: size for name, size in found.items() if "." in name}
    assert found["all"] == pytest.approx(sum(files.values()))
    assert {"optimizer.safetensors", "state.json", "manifest.json"} < set(files)
