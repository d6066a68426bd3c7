"""Tiny models and tokenizers built from configs: nothing here is downloaded."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch as th
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

th.set_num_threads(1)


def letter_tokenizer(letters: str = "abcdef", prompt: str = ">") -> PreTrainedTokenizerFast:
    """A tokenizer of one token per letter: the letters, the prompt's sign, EOS and PAD."""
    tokens = [*letters, prompt, "<eos>", "<pad>"]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    words.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def tiny_gpt2(vocab_size: int, width: int = 32, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """A GPT-2 (learned positions), weights from `seed`."""
    th.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_llama(vocab_size: int, width: int = 32, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """A Llama (rotary positions, grouped key/value heads), weights from `seed`."""
    th.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=[tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def make_lm(request):
    """Each architecture in turn: (vocab_size, ...) to a model."""
    return request.param


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer()
