"""The model card of a trained policy: it parses, says what was measured, and its lines load it."""

import json
import re

from huggingface_hub import ModelCard
from test_train import own  # noqa: F401

import train
from agents.model_card import WHERE, model_card
from stages.models import digest_of
from stages.report import summary


def run_lines(card: str, folder) -> str:
    """Run the card's Python lines, and return what they print."""
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    printed: list[str] = []
    code = compile(lines.replace(WHERE, str(folder)), "card", "exec")
    exec(code, {"print": printed.append})  # noqa: S102  # they are our own
    return printed[0]


def train_in(run, own, further: str = "") -> None:  # noqa: F811
    (run / "stages").mkdir(parents=True)
    warm_start = {"model": "hub/base", "seconds": 1, "peak_memory_gib": 1}
    (run / "stages/sft.json").write_text(json.dumps(warm_start))
    if not (run / "sft").exists():
        (run / "sft").symlink_to(own / "lm")
    line = (
        f"ppo --run {run} --reward_model {own}/encoder --prompts {own}/prompts.txt --device cpu "
        "--dtype float32 --n_envs 4 --max_new_tokens 8 --total_timesteps 32 "
        f"--trainable_layers null {further}"
    )
    assert train.main(line.split()) == 0


def test_a_card_says_what_was_measured_and_how_to_load_it(own, tmp_path) -> None:  # noqa: F811
    train_in(tmp_path, own)
    first = (tmp_path / "policy/README.md").read_text()
    assert "## Results" not in first and "0.02 score units per nat" in first
    before = digest_of(tmp_path / "policy")
    line = (
        f"evaluate --run {tmp_path} --prompts {own}/prompts.txt --best_of 1 --device cpu "
        f"--reward_model {own}/encoder"
    )
    assert train.main(line.split()) == 0
    assert digest_of(tmp_path / "policy") == before  # a later training goes on from it
    text = (tmp_path / "policy/README.md").read_text()
    card = ModelCard.load(tmp_path / "policy/README.md")
    assert card.data.base_model == "hub/base" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and card.data.license is None
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary(evaluation) in text and "![curves](curves.png)" in text
    assert (tmp_path / "policy/curves.png").read_bytes() == (tmp_path / "curves.png").read_bytes()
    for said in ("0.02 score units per nat", "prompts.txt", "| tokens written | ", "distinct-2"):
        assert said in text
    assert "tokens allowed" not in text  # it may write with all of them
    assert run_lines(text, tmp_path / "policy").startswith("The director made")


def test_adapters_are_loaded_by_peft(own, tmp_path) -> None:  # noqa: F811
    train_in(tmp_path, own, f"--lora_rank 2 --merge_lora false --vocabulary {own}/texts.txt")
    card = ModelCard.load(tmp_path / "policy/README.md")
    assert (card.data.base_model, card.data.library_name) == ("hub/base", "peft")
    assert "adapter_config.json" in card.text and "rank 2, kept apart" in card.text
    assert re.search(r"trained with \d+ tokens allowed", card.text)
    assert run_lines(card.content, tmp_path / "policy").startswith("The director made")


def test_a_cell_stays_one() -> None:
    card = model_card("a/b", False, {"prompts": "x |\n y"}, "a", {"max_new_tokens": 1})
    assert "| prompts | x \\| y |" in card and ModelCard(card).data.base_model == "a/b"
