"""The README of a trained policy's folder, as the hub shows it: where it is from, how to load it.

What the numbers are, the caller knows. The licence is left to whoever publishes the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

WHERE = "THIS_FOLDER"
"""Stands for the folder, or the hub id that it gets, in the lines that load it."""

WHOLE = """\
from transformers import pipeline

write = pipeline("text-generation", "{where}")
print(write({example!r}, {how})[0]["generated_text"]{last})"""

ADAPTERS = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("{where}")
write = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained("{where}"))
print(write({example!r}, {how})[0]["generated_text"]{last})"""

ENCODER_DECODER = """\
from {library} import {loader}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{where}")
model = {loader}.from_pretrained("{where}")
ids = model.generate(**tokenizer({example!r}, return_tensors="pt"), {how})
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""


def model_card(
    base_model: str,
    is_adapters: bool,
    training: Mapping[str, str],
    example: str | Sequence[Mapping[str, Any]],
    sampling: Mapping[str, float],
    results: str = "",
    limits: Sequence[str] = (),
    is_encoder_decoder: bool = False,
) -> str:
    """Return a model card in Markdown, its front matter as huggingface_hub reads it.

    Args:
        base_model: Hub id of the model that it was made from, or the name of a folder.
        is_adapters: Whether the folder holds adapters alone, which peft loads onto their base.
        training: What it was trained on, and how: names and values of a table.
        example: A prompt, or the messages of a chat.
        sampling: Arguments of `generate` with which it was trained.
        results: What was measured, in Markdown.
        limits: Sentences, beside those that hold for every such model.
        is_encoder_decoder: Whether an encoder reads the prompts, for which there is no pipeline.
    """
    how = ", ".join(f"{name}={value}" for name, value in sampling.items())
    lines = ENCODER_DECODER if is_encoder_decoder else ADAPTERS if is_adapters else WHOLE
    last = "" if isinstance(example, str) else '[-1]["content"]'  # the answer
    library, loader = "transformers", "AutoModelForSeq2SeqLM"
    if is_adapters:
        library, loader = "peft", "AutoPeftModelForSeq2SeqLM"
    lines = lines.format(
        where=WHERE, example=example, how=how, last=last, library=library, loader=loader
    )
    kind = "An encoder-decoder" if is_encoder_decoder else "A causal language model"
    data = ModelCardData(
        base_model=base_model,
        library_name=library,
        pipeline_tag=None if is_encoder_decoder else "text-generation",
        tags=["rlhf", "ppo", "rlhf-gym"],
    )
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {base_model.rpartition('/')[2]}, trained by PPO",
        f"{kind}, made from `{base_model}` by reinforcement learning from human "
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
