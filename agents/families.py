"""Which decoder fits a language model: asked of its cache, then tried.

A model that cannot be cached in any of our ways is decoded from whole sequences, which is correct
and slow, and said in a warning.
"""

import warnings

import torch as th
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from agents.decoder import CachedDecoder, Decoder, cache_of
from agents.seq2seq_decoder import Seq2SeqDecoder
from agents.sequences import PAD
from agents.state_decoder import StateDecoder
from agents.states import close, example_ids

ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)


def decoder_for(lm: PreTrainedModel, dtype: th.dtype = th.float32) -> Decoder:
    """Make the fastest decoder that gives the states that a model gives for whole sequences.

    Args:
        lm: The model, as loaded: in float32, or whatever it is live in.
        dtype: What to decode in.
    """
    kind, reason = kind_of(lm)
    if kind is not Decoder:
        reason = why_not(kind, lm)
        if reason is None:
            return kind(lm, dtype)
    warnings.warn(
        f"{type(lm).__name__} cannot be cached ({reason}): each token is computed from its whole "
        "sequence, which gives the same at the price of time (docs/models.md)",
        stacklevel=2,
    )
    decoder = Decoder(lm, dtype)
    decoder.why_uncached = reason
    return decoder


def kind_of(lm: PreTrainedModel) -> tuple[type[Decoder], str]:
    """Return the decoder for the layers that transformers would cache; if none, the reason too."""
    layers = cache_of(lm).layers
    names = sorted({type(layer).__name__ for layer in layers})
    if all(type(layer) in ATTENTION for layer in layers):
        if getattr(lm.config.get_text_config(), "attention_chunk_size", None):
            return Decoder, "its attention is cut in chunks"
        return (Seq2SeqDecoder if lm.config.is_encoder_decoder else CachedDecoder), ""
    if all(type(layer) is LinearAttentionLayer for layer in layers):
        return StateDecoder, ""
    return Decoder, f"its layers keep {' and '.join(names)}"


@th.no_grad()
def why_not(kind: type[Decoder], lm: PreTrainedModel) -> str | None:
    """Try a decoder on rows of several lengths that go on and begin anew; None if it is right."""
    decoder = kind(lm, th.float32)
    decoder.copies = False
    rows = example_ids(lm, n_tokens=6, n_rows=3)
    for lengths in ((1, 3, 2), (2, 4, 3), (3, 5, 2), (4, 6, 3)):
        ids = rows.clone()
        for row, length in zip(ids, lengths, strict=True):
            row[length:] = PAD
        try:
            found, expected = decoder.hidden(ids), Decoder.once(decoder, ids)
        except Exception as error:  # whatever a model does with a cache that is not its own
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if not close(found, expected):
            return "with a cache it gives other states than without"
    return None
