"""What is benchmarked: a model, prompts, a reward, and how much is written and learned.

Models are drawn from a config (random weights do not change the speed); prompts have the same
number of tokens in every row, so that a loop without left padding can run them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import WordPiece
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY = 4096
"""Tokens of the tiny model."""


@dataclass(frozen=True)
class Workload:
    """One setting that all peers are run in.

    Args:
        name: what it is called.
        n_prompts: rows that are written side by side.
        prompt_tokens: tokens of each prompt.
        max_new_tokens: tokens of the longest completion.
        n_epochs: passes over what was written.
        eos_share: share of the vocabulary that ends a completion, 0 for none; with random weights
            it is about the probability that a token does.
        real: SmolLM2-135M's configuration and tokenizer instead of the tiny GPT-2's.
    """

    name: str
    n_prompts: int
    max_new_tokens: int
    n_epochs: int
    prompt_tokens: int = 16
    eos_share: float = 0.0
    real: bool = False

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a completion."""
        return list(range(round(self.eos_share * VOCABULARY)))

    def model(self) -> PreTrainedModel:
        """Draw the language model, float32."""
        th.manual_seed(0)
        if self.real:
            config = AutoConfig.from_pretrained(smollm2_folder())
            return AutoModelForCausalLM.from_config(config, dtype=th.float32).eval()
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=256,
            n_layer=4,
            n_head=4,
            n_positions=1024,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return GPT2LMHeadModel(config).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer."""
        if self.real:
            return AutoTokenizer.from_pretrained(smollm2_folder())
        return word_tokenizer(VOCABULARY)

    def prompts(self) -> list[str]:
        """Return `n_prompts` different prompts of `prompt_tokens` tokens."""
        tokenizer = self.tokenizer()
        start = 1000
        ids = [
            [start + (37 * row + 11 * i) % 2000 for i in range(self.prompt_tokens)]
            for row in range(self.n_prompts)
        ]
        if not self.real:
            return [" ".join(f"w{i}" for i in row) for row in ids]
        words = [w for w, i in tokenizer.get_vocab().items() if w[0] == "Ġ" and w[1:].isalpha()]
        words = sorted(words)[:2000]
        return ["".join(" " + words[i % len(words)][1:] for i in row) for row in ids]


WORKLOADS = {
    w.name: w
    for w in (
        Workload("tiny", n_prompts=32, max_new_tokens=32, n_epochs=4),
        Workload("real", n_prompts=16, max_new_tokens=32, n_epochs=2, real=True),
        Workload("variable", n_prompts=32, max_new_tokens=64, n_epochs=4, eos_share=0.05),
        Workload("long", n_prompts=8, max_new_tokens=512, n_epochs=4),
    )
}


def word_tokenizer(n_words: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per word w0, w1, ..., words parted by spaces."""
    vocabulary = {f"w{i}": i for i in range(n_words)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = WordPiece(prefix="##")
    return PreTrainedTokenizerFast(tokenizer_object=words)


def smollm2_folder() -> str:
    """Return the folder of SmolLM2-135M, fetched once."""
    from reward_models import assets

    return str(assets.smollm2())


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Score texts by a sum over their characters: as good as free."""
    return [(sum(text.encode()) % 997) / 997 for text in completions]
