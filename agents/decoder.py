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
from agents.packed import can_pack, pack_linears
from agents.ranks import whole
from agents.sequences import PAD, lengths


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


class CachedDecoder:
    """The last hidden state of every row of an observation batch, at the cost of one token each.

    A row whose observation is the one seen last plus one token is continued; a batch seen
    before is answered from memory; any other row is prefilled into the columns that its finished
    episode leaves behind. Rows never wait for one another, and no row's result depends on
    another's. A row of nothing but -1 is held: its state is 0, and once a quarter of the slots
    belong to held rows, these slots are dropped.
    """

    _shape: th.Size  # of the observation batch
    _rows: th.Tensor  # (n_slots,) int64, the row of each slot
    _length: th.Tensor  # (n_slots,) int64, tokens seen
    _first: th.Tensor  # (n_slots,) int64, the first column that each slot uses
    _version: int  # of the weights that were copied

    def __init__(self, lm: PreTrainedModel, dtype: th.dtype = th.float32) -> None:
        """Decode with `lm`, or with a copy of its weights: in another dtype, or packed.

        Args:
            lm: The causal LM.
            dtype: What to compute in. The copy is made anew after `forget`; on the CPU its
                linear layers are packed (`agents.packed`).

        Raises:
            ValueError: If the model's layers keep anything else than keys and values.
        """
        layers = DynamicCache(config=lm.config.get_text_config()).layers
        odd = sorted({type(layer).__name__ for layer in layers if not is_attention(layer)})
        if odd:
            raise ValueError(
                f"expected a causal LM with attention layers only, got {odd} in "
                f"{type(lm).__name__}: such a state cannot be cut at a token; use another model"
            )
        self._source, self._dtype, self._sharded = lm, dtype, False
        self._n_layers = len(layers)
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
        self._cache: Cache | None = None
        self._layers: list[SlotLayer] = []
        self._watched: tuple[th.Tensor, ...] = ()
        self.derived: dict[str, Any] = {}  # what users made of the weights: dropped with them

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
        if self._sharded:
            return
        packs = can_pack(self._source.device, self._dtype)
        self._watched = tuple(self._source.parameters())
        self._version = sum(p._version for p in self._watched)
        if self._copy is not None or (self._dtype == th.float32 and not packs):
            return
        self._copy = self._copied()
        if packs:
            pack_linears(self._copy.base_model)
        if packs and self._dtype != th.float32:
            use_one_query_attention(self._copy)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what packed weights cannot do: be copied or pickled."""
        forgotten = dict.fromkeys(("_copy", "_ids", "_hidden", "_cache", "_layers"))
        return {**self.__dict__, **forgotten, "_watched": (), "derived": {}}

    def takes(self, ids: th.Tensor) -> bool:
        """Say whether the batch has the shape of the one that is held (or none is held)."""
        return self._ids is None or ids.shape == self._shape

    @th.no_grad()
    def once(self, ids: th.Tensor) -> th.Tensor:
        """Return each row's last hidden state as `hidden` does, remembering nothing."""
        self._notice()
        self._follow()
        held = ids[:, 0] == PAD
        length = lengths(ids).clamp(min=1)
        ids = ids[:, : int(length.max())].clamp(min=0)
        states = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        last = states[th.arange(len(ids), device=ids.device), length - 1]
        return last.masked_fill(held[:, None], 0)

    @th.no_grad()
    def hidden(self, ids: th.Tensor) -> th.Tensor:
        """Return each row's last hidden state.

        Args:
            ids: (n_rows, L) int64 observations, right-padded with -1.

        Returns:
            (n_rows, H), the hidden state at each row's last token; 0 for a held row.
        """
        self._notice()
        live = ids[:, 0] != PAD
        rows = live.nonzero()[:, 0]
        if len(rows) == 0:
            size = self.lm.config.get_text_config().hidden_size
            return th.zeros(len(ids), size, dtype=self._dtype, device=ids.device)
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
        for layer in self._layers:
            layer.keep(kept)

    def _hidden_of(self, ids: th.Tensor) -> th.Tensor:
        """Return the last hidden states of rows that have slots: (n_slots, L) to (n_slots, H)."""
        assert self._ids is not None
        ids[ids[:, 0] == PAD, 0] = 0  # any token: what comes of it is not used
        if self._hidden is not None and bool((self._ids == ids).all()):
            return self._hidden
        length = lengths(ids)
        fresh = ~self._continues(ids, length)
        if bool(fresh.any()):
            self._prefill(ids, length, fresh.nonzero()[:, 0])
        self._make_room(self._window.end + 1)
        self._hidden = self._decode(ids.gather(1, length[:, None] - 1), length)
        self._ids, self._length = ids, length
        return self._hidden

    def _begin(self, ids: th.Tensor, rows: th.Tensor) -> None:
        """Start over with an empty slot for each of these rows of a batch of this shape."""
        self._follow()
        n_slots, longest = len(rows), ids.shape[1]
        self._window = Window(longest + max(16, longest // 8))
        self._layers = [SlotLayer(self._window) for _ in range(self._n_layers)]
        self._cache = Cache(layers=self._layers)
        self._shape, self._rows = ids.shape, rows
        self._ids = ids.new_full((n_slots, longest), PAD)
        self._hidden = None
        self._length = ids.new_zeros(n_slots)
        self._first = ids.new_zeros(n_slots)

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
        known = length[rows] - 1
        longest = int(known.max())
        if len(rows) == len(ids):
            self._window.start = self._window.end = longest
        elif longest > self._window.end:
            self._move(longest)
        end = self._window.end
        self._first[rows] = end - known
        if longest > 0:
            prompt = ids[rows, :longest].clamp(min=0)
            cache = Cache(layers=[DynamicLayer() for _ in range(self._n_layers)])
            self.lm.base_model(input_ids=prompt, past_key_values=cache, use_cache=True)
            column = th.arange(longest, device=ids.device) - (longest - known)[:, None]
            column = column.clamp(min=0)[:, None, :, None]  # (k, 1, longest, 1)
            for slot, source in zip(self._layers, cache.layers, strict=True):
                if not slot.is_initialized:
                    slot.allocate(source.keys, source.values, len(ids))
                for states, new in ((slot.keys, source.keys), (slot.values, source.values)):
                    states[rows, :, end - longest : end] = new.gather(2, column.expand_as(new))
        self._window.start = int(self._first.min())

    def _decode(self, token: th.Tensor, length: th.Tensor) -> th.Tensor:
        """Run one token (n_slots, 1) per slot over the window; return (n_slots, H)."""
        window = self._window
        column = th.arange(window.start, window.end + 1, device=token.device)
        output = self.lm.base_model(
            input_ids=token,
            attention_mask=(column >= self._first[:, None]).long(),
            position_ids=length[:, None] - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        window.end += 1
        return output.last_hidden_state[:, -1]

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


def is_attention(layer: object) -> bool:
    """Say whether a cache layer holds keys and values alone (a sliding window counts)."""
    return type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")
