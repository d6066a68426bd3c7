"""A tokenizer of one's own, learned from texts in any language: nothing is downloaded.

Byte-level, so that it knows every character of every text; for models that are built from a config.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<eos>", "<pad>")
"""The first two tokens: what ends a text, and what fills a batch."""


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Learn a byte-pair encoding: 256 bytes, and the sequences of bytes that occur most often.

    A text comes back from its tokens as it was. Spaces belong to the word behind them. The same
    texts give the same tokenizer.

    Args:
        texts: What the tokenizer is for.
        vocab_size: Tokens, V; fewer if the texts have not so many different ones. At 258 each byte
            is a token; a Chinese character is three of them.

    Raises:
        ValueError: If `vocab_size` is below 258.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(
            f"expected a vocabulary of at least {least}, the bytes and two special tokens, got "
            f"{vocab_size}"
        )
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=learned, eos_token=eos, pad_token=pad)
