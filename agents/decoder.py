"""Cached decoding for a changing batch of observations: one new token per row and step.

The decoder sees observations, as a policy does, and finds out by itself which rows go on and
which begin anew. It holds hidden states and caches only: the heads on top are the policy's.
Weights that are written to in place are noticed; other changes must be announced with `forget`.
"""

import copy
from typing import Any

import torch as th
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from agents.one_query import use_one_query_attention
from agents.packed import called_linears, can_pack, pack_linears
from agents.ranks import whole
from agents.sequences import PAD, lengths
from agents.states import run, sequence_states, shortest, width


class SlotLayer(DynamicLayer):
    """One attention layer's keys and values in preallocated slots, (n_slots, heads, width, dim).

    All rows share one window of columns [start, end); a new token is written at `end` for every
    row. What a row does not use of the window is masked by the caller.
    """

    def __init__(self, window: "Window") -> None:
        super().__init__()
        self.window = window

    def allocate(self, keys: th.Tensor, values: th.Tensor, n_slots: int) -> None:
        """Make room for `n_slots` like the given (k, heads, p, dim) keys and values."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys = keys.new_zeros(n_slots, keys.shape[1], self.window.width, keys.shape[3])
        self.values = values.new_zeros(n_slots, values.shape[1], self.window.width, values.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: th.Tensor, value_states: th.Tensor, *args: object, **kwargs: object
    ) -> tuple[th.Tensor, th.Tensor]:
        """Write the new token's (n_slots, heads, 1, dim) states; return the window with them."""
        if not self.is_initialized:
            self.allocate(key_states, value_states, key_states.shape[0])
        start, end = self.window.start, self.window.end
        self.keys[:, :, end : end + 1] = key_states
        self.values[:, :, end : end + 1] = value_states
        return self.keys[:, :, start : end + 1], self.values[:, :, start : end + 1]

    def get_seq_length(self) -> int:
        """Count the columns of the window before the new token."""
        return self.window.end - self.window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the new token meets, and their offset."""
        return self.get_seq_length() + query_length, 0

    def keep(self, slots: th.Tensor) -> None:
        """Drop all slots but these, (k,) int64."""
        if self.is_initialized:
            self.keys, self.values = self.keys[slots], self.values[slots]

    def move(self, end: int) -> None:
        """Shift the window's contents so that it ends before column `end`."""
        if self.is_initialized:
            old, length = self.window, self.window.end - self.window.start
            for states in (self.keys, self.values):
                states[:, :, end - length : end] = states[:, :, old.start : old.end].clone()


class Window:
    """The columns [start, end) that are in use, out of `width`."""

    def __init__(self, width: int) -> None:
        self.width, self.start, self.end = width, 0, 0


class Decoder:
    """The last hidden state of every row of an observation batch, each from its whole sequence.

    It serves every family of models, and those that are cached (the classes below this one) are
    held to it. A batch seen before is answered from memory.

    Attributes:
        copies: Decode with a copy of the weights where that is faster.
        why_uncached: Why the model is not cached; "" if it is.
        derived: What users made of the weights: dropped with them.
    """

    copies = True
    why_uncached = ""
    derived: dict[str, Any]
    _version: int  # of the weights that were copied

    def __init__(self, lm: PreTrainedModel, dtype: th.dtype = th.float32) -> None:
        """Decode with `lm`, or with a copy of its weights: in another dtype, or packed.

        Args:
            lm: The causal LM or encoder-decoder.
            dtype: What to compute in. The copy is made anew after `forget`; on the CPU its
                linear layers are packed (`agents.packed`).
        """
        self._source, self._dtype, self._sharded = lm, dtype, False
        self._packed: set[str] | None = None  # names of the layers to pack, once they are known
        self.forget()

    @property
    def lm(self) -> PreTrainedModel:
        """The weights that are decoded with: the model itself, or its copy."""
        return self._source if self._copy is None else self._copy

    def forget(self) -> None:
        """Drop everything: the weights have changed, or memory is needed elsewhere."""
        self._forget_rows()
        if not self._sharded:
            self._copy: PreTrainedModel | None = None

    def _forget_rows(self) -> None:
        self._ids: th.Tensor | None = None
        self._hidden: th.Tensor | None = None
        self._watched: tuple[th.Tensor, ...] = ()
        self.derived = {}

    def prepare_to_gather(self) -> None:
        """Make the copy that `gather` fills, before the model's weights are sharded."""
        self._copy = self._copied(shared=False).requires_grad_(False)
        self._sharded = True

    @th.no_grad()
    def gather(self) -> None:
        """Bring a sharded model's weights together in the copy; all ranks must call it."""
        assert self._copy is not None
        self._forget_rows()
        for new, old in zip(self._source.parameters(), self._copy.parameters(), strict=True):
            old.copy_(whole(new))

    def _copied(self, shared: bool = True) -> PreTrainedModel:
        """Copy the model in the decoder's dtype. Buffers keep theirs: positions need it."""
        # Told what each parameter's copy is, deepcopy makes none in full precision; what has
        # the dtype already may be shared.
        small = {
            id(p): p
            if shared and p.dtype == self._dtype
            else th.nn.Parameter(p.detach().to(self._dtype, copy=True), requires_grad=False)
            for p in self._source.parameters()
        }
        return copy.deepcopy(self._source, small)

    def _notice(self) -> None:
        """Forget what was made of weights that have been written to since."""
        if self._watched and sum(p._version for p in self._watched) != self._version:
            self.forget()

    def _follow(self) -> None:
        """Copy the weights as they are now, if they are to be copied."""
        if self._sharded or not self.copies:
            return
        packs = can_pack(self._source.device, self._dtype)
        self._watched = tuple(self._source.parameters())
        self._version = sum(p._version for p in self._watched)
        if self._copy is not None or (self._dtype == th.float32 and not packs):
            return
        self._copy = self._copied()
        if packs:
            if self._packed is None:
                self._packed = called_linears(self._copy)
            pack_linears(self._copy, self._packed)
        if packs and self._dtype != th.float32:
            use_one_query_attention(self._copy)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what packed weights cannot do: be copied or pickled."""
        forgotten = dict.fromkeys(("_copy", "_ids", "_hidden"))
        return {**self.__dict__, **forgotten, "_watched": (), "derived": {}}

    def takes(self, ids: th.Tensor) -> bool:
        """Say whether `hidden` may see the batch without losing what it holds for another."""
        return True

    @th.no_grad()
    def once(self, ids: th.Tensor) -> th.Tensor:
        """Return each row's last hidden state as `hidden` does, remembering nothing."""
        self._notice()
        self._follow()
        held = ids[:, 0] == PAD
        length = lengths(ids).clamp(min=1)
        states = sequence_states(self.lm, self._filled(ids[:, : int(length.max())]))
        last = states[th.arange(len(ids), device=ids.device), length - 1]
        return last.masked_fill(held[:, None], 0)

    def _filled(self, ids: th.Tensor) -> th.Tensor:
        """Give held rows a token to read: what comes of it is not used."""
        held = ids[:, 0] == PAD
        if not bool(held.any()):
            return ids
        ids = ids.clone()
        ids[held, 0] = shortest(self._source)
        return ids

    @th.no_grad()
    def hidden(self, ids: th.Tensor) -> th.Tensor:
        """Return each row's last hidden state.

        Args:
            ids: (n_rows, L) int64 observations, right-padded with -1.

        Returns:
            (n_rows, H), the hidden state at each row's last token; 0 for a held row.
        """
        self._notice()
        if self._hidden is None or self._ids is None or not th.equal(self._ids, ids):
            self._hidden, self._ids = self.once(ids), ids.clone()
        return self._hidden

    def held_bytes(self) -> int:
        """Return the size of what is kept of the tokens seen so far."""
        return 0


class CachedDecoder(Decoder):
    """The last hidden state of every row of an observation batch, at the cost of one token each.

    A row whose observation is the one seen last plus one token is continued; a batch seen
    before is answered from memory; any other row is prefilled into the columns that its finished
    episode leaves behind. Rows never wait for one another, and no row's result depends on
    another's. A row of nothing but -1 is held: its state is 0, and once a quarter of the slots
    belong to held rows, these slots are dropped.

    Layers whose attention has a window keep the whole sequence all the same, and mask what is out
    of the window: a column is a token for all rows.
    """

    _shape: th.Size  # of the observation batch
    _rows: th.Tensor  # (n_slots,) int64, the row of each slot
    _length: th.Tensor  # (n_slots,) int64, tokens seen
    _first: th.Tensor  # (n_slots,) int64, the first column that each slot uses

    def _forget_rows(self) -> None:
        super()._forget_rows()
        self._cache: Cache | None = None
        self._layers: list[SlotLayer] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is cached, too."""
        return {**super().__getstate__(), "_cache": None, "_layers": []}

    def takes(self, ids: th.Tensor) -> bool:
        """Say whether the batch has the shape of the one that is held (or none is held)."""
        return self._ids is None or ids.shape == self._shape

    def held_bytes(self) -> int:
        """Return the size of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    @th.no_grad()
    def hidden(self, ids: th.Tensor) -> th.Tensor:
        """Return each row's last hidden state, as `Decoder.hidden` does."""
        self._notice()
        live = ids[:, 0] != PAD
        rows = live.nonzero()[:, 0]
        if len(rows) == 0:
            return th.zeros(len(ids), width(self.lm), dtype=self._dtype, device=ids.device)
        if self._ids is None or not self._has_slots(ids, live):
            self._begin(ids, rows)
        elif len(rows) <= 0.75 * len(self._rows):
            self._drop_held(live)
        try:
            found = self._hidden_of(ids[self._rows])
        except BaseException:  # interrupted, or out of memory: the cache is half-written
            self.forget()
            raise
        whole = found.new_zeros(len(ids), found.shape[1])
        whole[self._rows] = found
        return whole.masked_fill_(~live[:, None], 0)

    def _has_slots(self, ids: th.Tensor, live: th.Tensor) -> bool:
        """Say whether the batch has the shape that is held, and a slot for each live row."""
        if ids.shape != self._shape:
            return False
        slots = th.zeros_like(live)
        slots[self._rows] = True
        return not bool((live & ~slots).any())

    def _drop_held(self, live: th.Tensor) -> None:
        """Keep only the slots of live rows."""
        kept = live[self._rows].nonzero()[:, 0]
        self._rows, self._length, self._first = (
            x[kept] for x in (self._rows, self._length, self._first)
        )
        assert self._ids is not None and self._hidden is not None
        self._ids, self._hidden = self._ids[kept], self._hidden[kept]
        self._keep(kept)

    def _keep(self, slots: th.Tensor) -> None:
        """Drop the contents of all slots but these."""
        for layer in self._layers:
            layer.keep(slots)

    def _hidden_of(self, ids: th.Tensor) -> th.Tensor:
        """Return the last hidden states of rows that have slots: (n_slots, L) to (n_slots, H)."""
        assert self._ids is not None
        ids = self._filled(ids)
        if self._hidden is not None and bool((self._ids == ids).all()):
            return self._hidden
        length = lengths(ids)
        fresh = ~self._continues(ids, length)
        self._hidden = self._go_on(ids, length, fresh.nonzero()[:, 0])
        self._ids, self._length = ids, length
        return self._hidden

    def _go_on(self, ids: th.Tensor, length: th.Tensor, fresh: th.Tensor) -> th.Tensor:
        """Return the states of rows (n_slots, L) of which all but the `fresh` ones are cached."""
        if len(fresh):
            self._prefill(ids, length, fresh)
        self._make_room(self._window.end + 1)
        return self._decode(ids.gather(1, length[:, None] - 1), length)

    def _begin(self, ids: th.Tensor, rows: th.Tensor) -> None:
        """Start over with an empty slot for each of these rows of a batch of this shape."""
        self._follow()
        n_slots, longest = len(rows), ids.shape[1]
        self._open(longest)
        self._shape, self._rows = ids.shape, rows
        self._ids = ids.new_full((n_slots, longest), PAD)
        self._hidden = None
        self._length = ids.new_zeros(n_slots)
        self._first = ids.new_zeros(n_slots)

    def _open(self, longest: int) -> None:
        """Make an empty cache for sequences of up to `longest` tokens."""
        self._window = Window(longest + max(16, longest // 8))
        self._layers = [SlotLayer(self._window) for _ in range(n_layers(self._source))]
        self._cache = Cache(layers=self._layers)

    def _continues(self, ids: th.Tensor, length: th.Tensor) -> th.Tensor:
        """Say per slot whether its row is the one seen last plus one token: (n_slots,) bool."""
        assert self._ids is not None
        same = (self._ids == ids) | (self._ids == PAD)
        return (length == self._length + 1) & (self._length > 0) & same.all(dim=1)

    def _prefill(self, ids: th.Tensor, length: th.Tensor, rows: th.Tensor) -> None:
        """Bring all but the last token of `rows` into the columns that end where the window does.

        The sub-batch is right-padded, as causal attention needs no mask then, and each row's keys
        are shifted to the right afterwards.
        """
        known = self._line_up(length, rows)
        longest = int(known.max())
        if longest > 0:
            prompt = ids[rows, :longest].clamp(min=0)
            cache = Cache(layers=[DynamicLayer() for _ in self._layers])
            run(self.lm, input_ids=prompt, past_key_values=cache, use_cache=True)
            self._take_over(cache, known, rows, len(ids))

    def _line_up(self, length: th.Tensor, rows: th.Tensor) -> th.Tensor:
        """Let the window have room for `rows` (k,); return how many tokens to prefill of each.

        Args:
            length: (n_slots,) int64, tokens of each slot's row.
            rows: Slots that begin anew.
        """
        known = length[rows] - 1
        longest = int(known.max())
        if len(rows) == len(length):
            self._window.start = self._window.end = longest
        elif longest > self._window.end:
            self._move(longest)
        self._first[rows] = self._window.end - known
        self._window.start = int(self._first.min())
        return known

    def _take_over(self, cache: Cache, known: th.Tensor, rows: th.Tensor, n_slots: int) -> None:
        """Write keys and values of the `known` first tokens of `rows`, both (k,), to their slots.

        Args:
            cache: Of the rows, right-padded.
            known: Tokens of each.
            rows: Their slots.
            n_slots: All slots there are.
        """
        longest, end = int(known.max()), self._window.end
        if longest > 0:
            column = th.arange(longest, device=rows.device) - (longest - known)[:, None]
            column = column.clamp(min=0)[:, None, :, None]  # (k, 1, longest, 1)
            for slot, source in zip(self._layers, cache.layers, strict=True):
                if not slot.is_initialized:
                    slot.allocate(source.keys, source.values, n_slots)
                for states, new in ((slot.keys, source.keys), (slot.values, source.values)):
                    new = new[:, :, :longest]
                    states[rows, :, end - longest : end] = new.gather(2, column.expand_as(new))

    def _decode(self, token: th.Tensor, length: th.Tensor) -> th.Tensor:
        """Run one token (n_slots, 1) per slot over the window; return (n_slots, H)."""
        window = self._window
        column = th.arange(window.start, window.end + 1, device=token.device)
        states = run(
            self.lm,
            input_ids=token,
            attention_mask=(column >= self._first[:, None]).long(),
            position_ids=length[:, None] - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        window.end += 1
        return states[:, -1]

    def _make_room(self, end: int) -> None:
        """Drop columns that no row uses any more; move the window left if it is at the end."""
        self._window.start = int(self._first.min())
        if end > self._window.width:
            self._move(self._window.end - self._window.start)

    def _move(self, end: int) -> None:
        """Shift the window so that it ends before column `end`."""
        for layer in self._layers:
            layer.move(end)
        shift = end - self._window.end
        self._window.start += shift
        self._window.end += shift
        self._first += shift


def n_layers(lm: PreTrainedModel) -> int:
    """Count the layers that keep keys and values."""
    return len(cache_of(lm).layers)


def cache_of(lm: PreTrainedModel) -> DynamicCache:
    """Return the cache that transformers would make for a model, or for its decoder."""
    return DynamicCache(config=(lm.get_decoder() if lm.config.is_encoder_decoder else lm).config)
