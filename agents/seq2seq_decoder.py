"""Decoding of encoder-decoders: the prompt is read once, the completion goes on in slots."""

import inspect
from typing import Any

import torch as th
from torch.nn.functional import pad
from transformers import EncoderDecoderCache
from transformers.cache_utils import Cache, DynamicLayer

from agents.decoder import CachedDecoder
from agents.sequences import PAD, lengths
from agents.states import halves, run, width


class Seq2SeqDecoder(CachedDecoder):
    """The last hidden state of every row, whose prompt an encoder has read.

    What the decoder makes of its own tokens is in the slots' columns, as in `CachedDecoder`; what
    it makes of the encoder's states, once per prompt, lies beside them.
    """

    _prompts: th.Tensor  # (n_slots, P) int64, of the observation under way
    _read: th.Tensor  # (n_slots, P) int64, 1 where there is a token of the slot's prompt

    def _forget_rows(self) -> None:
        super()._forget_rows()
        self._memory: list[DynamicLayer] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is cached, too."""
        return {**super().__getstate__(), "_memory": []}

    def held_bytes(self) -> int:
        """Return the size of keys and values, the prompts' too."""
        return super().held_bytes() + sum(m.keys.nbytes + m.values.nbytes for m in self._memory)

    def _open(self, longest: int) -> None:
        super()._open(longest)
        self._memory = []

    def _keep(self, slots: th.Tensor) -> None:
        super()._keep(slots)
        self._read = self._read[slots]
        for layer in self._memory:
            layer.keys, layer.values = layer.keys[slots], layer.values[slots]

    def _go_on(self, ids: th.Tensor, length: th.Tensor, fresh: th.Tensor) -> th.Tensor:
        self._prompts, completion = halves(self._source, ids)
        return super()._go_on(completion, lengths(completion), fresh)

    def _prefill(self, ids: th.Tensor, length: th.Tensor, rows: th.Tensor) -> None:
        """Read the prompts of `rows`, and all but the last token of their completions."""
        known = self._line_up(length, rows)
        prompt = self._prompts[rows]
        there = (prompt != PAD).long()
        own, crossed = (Cache(layers=[DynamicLayer() for _ in self._layers]) for _ in range(2))
        run(
            self.lm,
            input_ids=prompt.clamp(min=0),
            attention_mask=there,
            decoder_input_ids=ids[rows, : max(1, int(known.max()))].clamp(min=0),
            past_key_values=EncoderDecoderCache(own, crossed),
            use_cache=True,
        )
        self._take_over(own, known, rows, len(ids))
        self._remember(crossed, there, rows, len(ids))

    def _remember(self, cache: Cache, there: th.Tensor, rows: th.Tensor, n_slots: int) -> None:
        """Write what the decoder made of the prompts of `rows` to their slots.

        Args:
            cache: Keys and values (k, heads, P, dim) of each layer.
            there: (k, P) int64, 1 where there is a token.
            rows: (k,) int64, slots.
            n_slots: All slots there are.
        """
        longest = there.shape[1]
        if not self._memory:
            self._read = there.new_zeros(n_slots, 0)
            self._memory = [DynamicLayer() for _ in cache.layers]
            for slot, new in zip(self._memory, cache.layers, strict=True):
                slot.lazy_initialization(new.keys, new.values)
                slot.keys, slot.values = (
                    x.new_zeros(n_slots, x.shape[1], 0, x.shape[3]) for x in (new.keys, new.values)
                )
        more = max(0, longest - self._read.shape[1])
        self._read = pad(self._read, (0, more))
        self._read[rows] = pad(there, (0, self._read.shape[1] - longest))
        for slot, new in zip(self._memory, cache.layers, strict=True):
            slot.keys, slot.values = (pad(x, (0, 0, 0, more)) for x in (slot.keys, slot.values))
            slot.keys[rows, :, :longest] = new.keys
            slot.values[rows, :, :longest] = new.values

    def _decode(self, token: th.Tensor, length: th.Tensor) -> th.Tensor:
        """Run one token (n_slots, 1) per slot over window and prompt; return (n_slots, H)."""
        window = self._window
        column = th.arange(window.start, window.end + 1, device=token.device)
        # Of the encoder's states only the shape is asked for: keys and values are there.
        shape = (*self._read.shape, width(self.lm))
        positions = {}
        if "decoder_position_ids" in inspect.signature(self.lm.forward).parameters:
            positions["decoder_position_ids"] = length[:, None] - 1
        states = run(
            self.lm,
            encoder_outputs=(self._memory[0].keys.new_zeros(1, 1, 1).expand(shape),),
            attention_mask=self._read,
            decoder_input_ids=token,
            decoder_attention_mask=(column >= self._first[:, None]).long(),
            past_key_values=EncoderDecoderCache(self._cache, Cache(layers=self._memory)),
            use_cache=True,
            **positions,
        )
        window.end += 1
        return states[:, -1]
