"""Tokenizers trained here (no hub), and rewards, for the tests of `text_env`."""

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "hello world, this is a film of no great worth",
    "a film about the world and the people in it",
    "the people say hello to this great film",
]


def character_tokenizer(letters: str = "abcdefgh", **special: str) -> PreTrainedTokenizerFast:
    """One token per character: `letters`, space and newline; after <pad>, <bos>, <eos>, <unk>."""
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *letters, " ", "\n"]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **special})


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token for BOS, EOS, unknown and padding, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end, pad_token=end
    )


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with "▁" for spaces, BOS, byte fallback, and a first space dropped, as in Llama."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model: dict[str, Any] = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in model["vocab"] if token != "<unk>"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def length_reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """Ten per "a", one per character."""
    return [10.0 * text.count("a") + len(text) for text in completions]


class RecordedReward:
    """`length_reward` that keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: list[Any]
    ) -> list[float]:
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return length_reward(prompts, completions)


def arguments(**changes: Any) -> dict[str, Any]:
    """A small task over characters; four prompts of two lengths."""
    defaults = {
        "tokenizer": character_tokenizer(),
        "prompts": ["ab", "cd", "efg", "h"],
        "reward_fn": length_reward,
        "max_new_tokens": 5,
    }
    return {**defaults, **changes}
