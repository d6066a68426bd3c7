"""The README of a trained policy's folder, as the hub shows it: where it is from, how to load it.

What the numbers are, the caller knows. The licence is left to whoever publishes the model.
"""

from collections.abc import Mapping, Sequence

from huggingface_hub import ModelCardData

WHERE = "THIS_FOLDER"
"""Stands for the folder, or the hub id that it gets, in the lines that load it."""

WHOLE = """\
from transformers import pipeline

write = pipeline("text-generation", "{where}")
print(write({example!r}, {how})[0]["generated_text"])"""

ADAPTERS = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("{where}")
write = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained("{where}"))
print(write({example!r}, {how})[0]["generated_text"])"""


def model_card(
    base_model: str,
    is_adapters: bool,
    training: Mapping[str, str],
    example: str,
    sampling: Mapping[str, float],
    results: str = "",
    limits: Sequence[str] = (),
) -> str:
    """Return a model card in Markdown, its front matter as huggingface_hub reads it.

    Args:
        base_model: Hub id of the model that it was made from, or the name of a folder.
        is_adapters: Whether the folder holds adapters alone, which peft loads onto their base.
        training: What it was trained on, and how: names and values of a table.
        example: A prompt.
        sampling: Arguments of `generate` with which it was trained.
        results: What was measured, in Markdown.
        limits: Sentences, beside those that hold for every such model.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if is_adapters else "transformers",
        pipeline_tag="text-generation",
        tags=["rlhf", "ppo", "rlhf-gym"],
    )
    how = ", ".join(f"{name}={value}" for name, value in sampling.items())
    lines = (ADAPTERS if is_adapters else WHOLE).format(where=WHERE, example=example, how=how)
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {base_model.rpartition('/')[2]}, trained by PPO",
        f"A causal language model, made from `{base_model}` by reinforcement learning from human "
        "feedback: token-level PPO against a reward model, held to where it began by a KL penalty. "
        "Trained with rlhf-gym.",
        "## Use",
        f"{WHERE} is this folder, or the hub id that you give it.",
        f"```python\n{lines}\n```",
        BASE_OF_ADAPTERS if is_adapters else "",
        "## Training",
        "\n".join(
            ["| | |", "|---|---|", *(f"| {k} | {in_cell(v)} |" for k, v in training.items())]
        ),
        *(("## Results", results) if results else ()),
        "## Limits",
        "\n".join(f"- {limit}" for limit in (*LIMITS, *limits)),
        "## Licence",
        "To be chosen by whoever publishes the model (`license:` in the front matter): the base "
        "model's licence and the terms of the data bind it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


BASE_OF_ADAPTERS = (
    "The folder holds adapters alone. They belong to the model that `base_model_name_or_path` in "
    "`adapter_config.json` names, by its path: publish that one too, and put its hub id there."
)

LIMITS = (
    "It writes what a reward model rates highly, which is not always what people would: texts that "
    "please the reward model and nobody else are the known failure of the method.",
    "It knows what its base model knows, errors and prejudices included; the reward added none of "
    "the truth and none of the safety that was not rated.",
    "The figures are of prompts like the training's, and of one run.",
)


def in_cell(text: str) -> str:
    """Return a text that stays in its table cell."""
    return " ".join(text.split()).replace("|", "\\|")
